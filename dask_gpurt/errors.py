"""Exceptions of dask-gpurt. All of them derive from :class:`GpurtError`."""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "CorruptDataError",
    "DeviceFullError",
    "GpurtError",
    "InstallError",
    "SeamError",
    "SpillError",
]


class GpurtError(Exception):
    """Root of every error that dask-gpurt raises on purpose."""


class ConfigError(GpurtError, ValueError):
    """A configuration key is unknown or its value is not allowed.

    Parameters
    ----------
    key
        Dotted name of the key, for example ``gpurt.memory.host-limit``.
    value
        What was configured.
    allowed
        What would have been accepted, in words.
    """

    def __init__(self, key: str, value: object, allowed: str) -> None:
        # All three go to Exception.args: the error crosses processes by pickle.
        super().__init__(key, value, allowed)
        self.key = key
        self.value = value
        self.allowed = allowed

    def __str__(self) -> str:
        return f"{self.key}: {self.value!r} is not allowed; expected {self.allowed}"


class InstallError(GpurtError, RuntimeError):
    """dask-gpurt cannot be installed on this cluster; the cluster was left as it was."""


class SeamError(GpurtError, RuntimeError):
    """A private name of Dask that a part relies on has moved."""


class SpillError(GpurtError, OSError):
    """A lower tier cannot take or give back data, for example because the disk is full."""


class CorruptDataError(SpillError):
    """Data read back from a lower tier is not what was written there."""


class DeviceFullError(GpurtError, MemoryError):
    """A device has no room for data that is to come back to it. The data stays below, and nothing is lost."""
