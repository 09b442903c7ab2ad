"""The configuration of dask-gpurt: the only module that reads ``dask.config``.

Covers: the keys under ``gpurt`` in Dask's configuration, their types, checks and defaults.
Does not cover: what a setting does; see the part that uses it.
See also: ``gpurt.yaml`` (the same defaults, with the reason for each), ``gpurt-schema.yaml``.

A key stands as a dataclass field here, with its parser; everything else (the check for unknown keys, the messages)
follows from the fields. Settings travel to the cluster as one pickled :class:`Settings`, so that scheduler and
workers agree even where their own configuration differs.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import dask
import dask.config
import dask.utils
import yaml

from dask_gpurt.errors import ConfigError
from dask_gpurt.urls import shown

__all__ = ["PARTS", "MemorySettings", "PlacementSettings", "Settings", "ShuffleSettings", "ensure_defaults"]

#: The parts of dask-gpurt, in the order in which they are started.
PARTS = ("memory", "shuffle", "placement")


class _RefusedError(Exception):
    """A parser's way to say no; turned into a ConfigError that names the key."""


def _boolean(value: object) -> bool:
    if isinstance(value, bool):
        return value
    raise _RefusedError


def _count(minimum: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise _RefusedError
        return value

    return parse


def _number(minimum: float) -> Callable[[object], float]:
    def parse(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= minimum:
            raise _RefusedError
        return float(value)

    return parse


def _size(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _RefusedError
    try:
        nbytes = dask.utils.parse_bytes(value)
    except (ValueError, TypeError) as error:
        raise _RefusedError from error
    if nbytes <= 0:
        raise _RefusedError
    return int(nbytes)


def _limit(value: object) -> int | float | None:
    """Parse bytes, a fraction of the worker's memory in (0, 1], or "auto" (None)."""
    if value == "auto":
        return None
    if isinstance(value, float):
        if 0 < value <= 1:
            return value
        if value < 1:
            raise _RefusedError
    return _size(value)


def _optional_limit(value: object) -> int | float | None:
    """Parse as :func:`_limit`, where null stands for no limit."""
    return None if value is None else _limit(value)


def _folder(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value or "\0" in value:
        raise _RefusedError
    return os.path.abspath(os.path.expanduser(value))


def _url(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or not all(value.partition("://")):
        raise _RefusedError
    return value


def _duration(value: object) -> float | None:
    """Parse seconds, or null for never."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise _RefusedError
    try:
        seconds = float(dask.utils.parse_timedelta(value, default="s"))
    except (ValueError, KeyError, OverflowError) as error:
        raise _RefusedError from error
    if not 0 < seconds < float("inf"):
        raise _RefusedError
    return seconds


def _racks(value: object) -> tuple[tuple[str, str], ...]:
    """Parse patterns of hosts, each with the label of its rack; the first that fits counts."""
    if not isinstance(value, Mapping):
        raise _RefusedError
    if not all(isinstance(text, str) and text for pair in value.items() for text in pair):
        raise _RefusedError
    return tuple(value.items())


def _transport(value: object) -> str:
    if value not in ("auto", "dask"):
        raise _RefusedError
    return str(value)


def _compression(value: object) -> str:
    # A bare `off` in a YAML file is read as false.
    if value is False or value == "off":
        return "off"
    if value != "auto":
        raise _RefusedError
    return "auto"


def _key(default: object, parse: Callable[[object], object], allowed: str, *, url: bool = False) -> Any:
    # Settings are shown where a call of Dask fails that they go with: a URL may have a password in it.
    return dataclasses.field(default=default, repr=not url, metadata={"parse": parse, "allowed": allowed})


def _said(value: object) -> object:
    """Return what an error tells of a value: what was meant for a URL may stand anywhere."""
    return shown(value) if isinstance(value, str) else value


_BOOLEAN = "true or false"
_LIMIT = 'a size such as "4 GiB", a fraction of the worker\'s memory in (0, 1], or "auto"'


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Section:
    section: ClassVar[str]

    @classmethod
    def parse(cls, values: Mapping[str, object], prefix: str) -> Self:
        fields = {f.name.replace("_", "-"): f for f in dataclasses.fields(cls)}
        parsed = {}
        for key, value in values.items():
            name = key.replace("_", "-")
            if name not in fields:
                raise ConfigError(f"{prefix}.{name}", _said(value), "one of the keys " + ", ".join(sorted(fields)))
            field = fields[name]
            try:
                parsed[field.name] = field.metadata["parse"](value)
            except _RefusedError as error:
                raise ConfigError(f"{prefix}.{name}", _said(value), field.metadata["allowed"]) from error
        return cls(**parsed)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementSettings(_Section):
    """Settings of the placement, under ``gpurt.placement``."""

    section = "placement"
    #: Whether the part is installed.
    enabled: bool = _key(True, _boolean, _BOOLEAN)
    #: Patterns of hosts, and for each the label of its rack: workers with one label are near to each other.
    racks: tuple[tuple[str, str], ...] = _key((), _racks, 'a mapping of hosts, such as "10.0.1.*", to labels')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShuffleSettings(_Section):
    """Settings of the peer-to-peer shuffle, under ``gpurt.shuffle``."""

    section = "shuffle"
    #: Whether the part is installed.
    enabled: bool = _key(True, _boolean, _BOOLEAN)
    #: Bytes a worker may have under way to its peers, summed over all runs.
    send_limit: int = _key(256 * 2**20, _size, 'a size such as "256 MiB"')
    #: ``"auto"``: UCX where ucxx is installed and Dask's comms are not encrypted; ``"dask"``: Dask's comms.
    transport: str = _key("auto", _transport, '"auto" or "dask"')
    #: ``"auto"``: messages are compressed where that pays on their link; ``"off"``: never.
    compression: str = _key("auto", _compression, '"auto" or "off"')
    #: Bytes of what it has sent that a worker keeps in case that a peer is lost, summed over all runs; None: a lost worker costs a restart.
    keep_sent: int | None = _key(None, lambda v: None if v is None else _size(v), 'a size such as "10 GiB", or null')
    #: Seconds without progress after which a run that waits for something is reported; None: never.
    watchdog: float | None = _key(60.0, _duration, 'a time such as "60s", or null')


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemorySettings(_Section):
    """Settings of the tiered store, under ``gpurt.memory``."""

    section = "memory"
    #: Whether the part is installed.
    enabled: bool = _key(True, _boolean, _BOOLEAN)
    #: Bytes (int) or fraction of the worker's memory limit (float) that HOST may hold; None: what the worker's
    #: own ``distributed.worker.memory.target`` says.
    host_limit: int | float | None = _key(None, _limit, _LIMIT)
    #: Bytes (int) or fraction of the device's memory (float) that DEVICE may hold; None: dask-cuda's limit where the
    #: worker has one, else 0.8 of the device.
    device_limit: int | float | None = _key(None, _limit, _LIMIT)
    #: Bytes that DISK may hold; None: as much as the disk takes.
    disk_limit: int | None = _key(None, lambda v: None if v is None else _size(v), 'a size such as "100 GiB", or null')
    #: Folder for spilled data; None: the worker's own local directory.
    directory: str | None = _key(None, _folder, "the path of a folder that can be written, or null")
    #: ``"auto"``: copies on DISK and OBJECT are compressed where that pays; ``"off"``: never.
    compression: str = _key("auto", _compression, '"auto" or "off"')
    #: Whether copies on DISK and OBJECT are encrypted, with a key of the process.
    encryption: bool = _key(False, _boolean, _BOOLEAN)
    #: What the OBJECT tier lies below, which takes what DISK does not; None: there is no such tier.
    object_url: str | None = _key(
        None, _url, 'a URL that fsspec opens, such as "s3://bucket/folder", or null', url=True
    )
    #: Bytes that OBJECT may hold; None: any number.
    object_limit: int | None = _key(
        None, lambda v: None if v is None else _size(v), 'a size such as "100 GiB", or null'
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that can be set, parsed and checked.

    Examples
    --------
    >>> Settings.load({"gpurt.memory.host-limit": "1 GiB"}).memory.host_limit
    1073741824
    >>> Settings.load({"gpurt.memory.host-limit": "plenty"})
    Traceback (most recent call last):
        ...
    dask_gpurt.errors.ConfigError: gpurt.memory.host-limit: 'plenty' is not allowed; expected a size such as "4 GiB", ...
    """

    placement: PlacementSettings = dataclasses.field(default_factory=PlacementSettings)
    shuffle: ShuffleSettings = dataclasses.field(default_factory=ShuffleSettings)
    memory: MemorySettings = dataclasses.field(default_factory=MemorySettings)

    @classmethod
    def load(cls, overrides: Mapping[str, object] | None = None) -> Settings:
        """Read Dask's configuration, with ``overrides`` (dotted keys, with or without ``gpurt.``) on top.

        Raises
        ------
        ConfigError
            If a key is unknown or a value is not allowed.
        """
        tree: dict[str, dict[str, object]] = {}
        sections = {f.name for f in dataclasses.fields(cls)}
        # Looked at before the defaults are merged in, which would paper over a value that is no mapping; and what is
        # missing has its default in the dataclasses: the defaults in Dask's configuration are there to be seen, and go
        # with the end of a `dask.config.set` within which they were put there.
        configured = dask.config.get("gpurt", {})
        if not isinstance(configured, Mapping):
            raise ConfigError("gpurt", configured, "a mapping with the keys " + ", ".join(sorted(sections)))
        for section, values in configured.items():
            if section not in sections:
                raise ConfigError(f"gpurt.{section}", values, "one of the keys " + ", ".join(sorted(sections)))
            if not isinstance(values, Mapping):
                raise ConfigError(f"gpurt.{section}", values, "a mapping")
            tree[section] = {key.replace("_", "-"): value for key, value in values.items()}
        for dotted, value in (overrides or {}).items():
            section, _, key = dotted.removeprefix("gpurt.").partition(".")
            if section not in sections or not key:
                raise ConfigError(dotted, _said(value), "a key such as gpurt.memory.host-limit")
            tree.setdefault(section, {})[key.replace("_", "-")] = value
        ensure_defaults()
        return cls(
            placement=PlacementSettings.parse(tree.get("placement", {}), "gpurt.placement"),
            shuffle=ShuffleSettings.parse(tree.get("shuffle", {}), "gpurt.shuffle"),
            memory=MemorySettings.parse(tree.get("memory", {}), "gpurt.memory"),
        )

    def enabled(self, part: str) -> bool:
        """Whether ``part`` (one of :data:`~dask_gpurt.config.PARTS`) is to be installed."""
        section = getattr(self, part)
        return bool(section.enabled)


@functools.cache  # dask.config keeps every mapping of defaults that it is given
def ensure_defaults() -> None:
    """Put the defaults of ``gpurt.yaml`` into Dask's configuration, below what the user set."""
    path = os.path.join(os.path.dirname(__file__), "gpurt.yaml")
    with open(path, encoding="utf-8") as file:
        defaults = yaml.safe_load(file)
    dask.config.update_defaults(defaults)
