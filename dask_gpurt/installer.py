"""``install``, ``uninstall`` and ``status``: what a user calls, on a running cluster.

Covers: the checks before anything is touched (configuration, versions, places for spilled data), the order of the steps,
the answer. Does not cover: the parts themselves; the same by preload, see :mod:`dask_gpurt.preload`.

Order of an installation: (1) the configuration is parsed on the client; (2) scheduler and workers look at themselves
and answer, and nothing has changed so far; (3) the scheduler sets itself up, then its workers, which report back. What
is wrong in (1) or (2) is raised, and the cluster is as it was; a part that fails in (3) is left stock and named.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from packaging.version import Version

import dask_gpurt
from dask_gpurt import seams
from dask_gpurt.config import MemorySettings, Settings
from dask_gpurt.errors import ConfigError, InstallError, SpillError
from dask_gpurt.installation import Installation, PartStatus
from dask_gpurt.memory import cipher
from dask_gpurt.memory.blocks import BlockPool
from dask_gpurt.memory.objects import ObjectFolder
from dask_gpurt.urls import shown

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["install", "install_settings", "object_store_refusal", "status", "uninstall"]


def install(
    client: Client,
    *,
    placement: bool | None = None,
    shuffle: bool | None = None,
    memory: bool | None = None,
    config: Mapping[str, object] | None = None,
) -> Installation:
    """Install dask-gpurt on the cluster of ``client``, on all its workers, now and later.

    No code of the user changes. Installing again replaces the earlier installation. Data that the workers hold, in
    memory or on disk, is kept.

    Parameters
    ----------
    client
        A client of a running cluster. For an asynchronous client the answer is to be awaited.
    placement, shuffle, memory
        Whether that part is installed; None: as configured (all are on by default).
    config
        Settings on top of Dask's configuration, by dotted key: ``{"memory.host-limit": "8 GiB"}``.

    Returns
    -------
    Installation
        What was installed where, and what was left stock and why.

    Raises
    ------
    ConfigError
        A key is unknown, a value is not allowed, or a place for spilled data cannot be written by some worker.
    InstallError
        The scheduler or all workers lack dask-gpurt, or their Dask is out of the supported range.
        In both cases the cluster is left as it was.
    """
    overrides: dict[str, object] = dict(config or {})
    for part, enabled in (("placement", placement), ("shuffle", shuffle), ("memory", memory)):
        if enabled is not None:
            overrides[f"{part}.enabled"] = enabled
    return install_settings(client, Settings.load(overrides))


def install_settings(client: Client, settings: Settings) -> Installation:
    """Install with settings that are there already, such as those of an earlier installation; see :func:`install`."""
    answer: Installation = client.sync(_install, client, settings)
    return answer


def uninstall(client: Client) -> Installation:
    """Put stock Dask back on the cluster of ``client``. Data that the workers hold is kept.

    Where nothing is installed, nothing happens.
    """
    answer: Installation = client.sync(_uninstall, client)
    return answer


def status(client: Client) -> Installation:
    """Say what is installed where on the cluster of ``client``."""
    answer: Installation = client.sync(_status, client)
    return answer


async def _install(client: Client, settings: Settings) -> Installation:
    _raise_if_unfit(await _look_at_cluster(client, settings))
    await client.run_on_scheduler(_set_up, settings)
    return await _status(client)


async def _uninstall(client: Client) -> Installation:
    try:
        await client.run_on_scheduler(_take_away)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "dask_gpurt":
            return Installation(dask_gpurt.__version__)  # the scheduler does not have it: so there is nothing there
        raise
    return await _status(client)


async def _status(client: Client) -> Installation:
    answer: Installation = await client.run_on_scheduler(_describe)
    return answer


async def _set_up(settings: Settings, dask_scheduler: Any) -> None:
    from dask_gpurt.plugins.scheduler import set_up

    await set_up(dask_scheduler, settings)


async def _take_away(dask_scheduler: Any) -> None:
    from dask_gpurt.plugins.scheduler import take_away

    await take_away(dask_scheduler)


def _describe(dask_scheduler: Any) -> Installation:
    from dask_gpurt.plugins.scheduler import NAME

    plugin = dask_scheduler.plugins.get(NAME)
    missing = PartStatus(False, "not installed" if plugin is None else "dask-gpurt did not start on this worker")
    workers = {
        address: (plugin.workers.get(address) if plugin is not None else None)
        or {"memory": missing, "shuffle": missing}
        for address in dask_scheduler.workers
    }
    if plugin is None:
        return Installation(dask_gpurt.__version__, {}, workers)
    return Installation(dask_gpurt.__version__, plugin.parts, workers, plugin.tiers())


@dataclass(frozen=True)
class _Look:
    """What a server says of itself before an installation."""

    gpurt: str
    dask: str
    distributed: str
    #: The spill folder that cannot be used and why, or None.
    directory: tuple[str, str] | None = None
    #: The same for the URL of the OBJECT tier.
    object_url: tuple[str, str] | None = None
    #: Why nothing can be encrypted, where that is wanted.
    encryption: str | None = None


async def _look_at_cluster(client: Client, settings: Settings) -> dict[str, _Look | Exception]:
    try:
        looks: dict[str, _Look | Exception] = {"the scheduler": await client.run_on_scheduler(_look, None)}
    except ImportError as error:
        raise InstallError(f"the scheduler cannot import dask_gpurt: {error}") from error
    looks.update(await client.run(_look_with_places, settings.memory, on_error="return"))
    return looks


async def _look_with_places(memory: MemorySettings) -> _Look:
    look = _look(memory.directory if memory.enabled else None)
    if memory.enabled and memory.encryption:
        look = replace(look, encryption=cipher.refusal())
    if memory.object_url is None or not memory.enabled:
        return look
    # A store may take its time to say no, which must not hold up the worker's event loop.
    reason = await asyncio.to_thread(object_store_refusal, memory.object_url)
    return look if reason is None else replace(look, object_url=(shown(memory.object_url), reason))


def object_store_refusal(object_url: str) -> str | None:
    """Say why nothing can be written to ``object_url``, if so."""
    try:
        folder = ObjectFolder(object_url, BlockPool(0))
        folder.begin()
    except SpillError as error:
        return str(error)
    folder.close()
    return None


def _look(directory: str | None) -> _Look:
    problem = None
    if directory is not None:
        try:
            os.makedirs(directory, mode=0o700, exist_ok=True)
            with tempfile.TemporaryFile(dir=directory):
                pass
        except OSError as error:
            problem = (directory, str(error))
    return _Look(dask_gpurt.__version__, version("dask"), version("distributed"), problem)


def _raise_if_unfit(looks: Mapping[str, _Look | Exception]) -> None:
    lowest, highest = map(Version, seams.SUPPORTED)
    lacking = {}
    for server, look in looks.items():
        if isinstance(look, Exception):
            lacking[server] = look
            continue
        for library, found in (("dask", look.dask), ("distributed", look.distributed)):
            if not lowest <= Version(found) < highest:
                raise InstallError(
                    f"{server} runs {library} {found}; dask-gpurt {dask_gpurt.__version__} works with "
                    f"{library} >= {lowest}, < {highest}"
                )
        if look.gpurt != dask_gpurt.__version__:
            raise InstallError(f"{server} has dask-gpurt {look.gpurt}, the client {dask_gpurt.__version__}")
        if look.directory is not None:
            folder, reason = look.directory
            raise ConfigError("gpurt.memory.directory", folder, f"a folder that {server} can write ({reason})")
        if look.encryption is not None:
            # Not left stock: stock would spill what is to be encrypted as it is.
            raise ConfigError("gpurt.memory.encryption", True, f"false: on {server}, {look.encryption}")
        if look.object_url is not None:
            url, reason = look.object_url
            raise ConfigError("gpurt.memory.object-url", url, f"a URL that {server} can write ({reason})")
    workers = len(looks) - 1
    if lacking and len(lacking) == workers:
        server, error = next(iter(lacking.items()))
        raise InstallError(f"no worker can load dask_gpurt; {server} says: {error!r}") from error
