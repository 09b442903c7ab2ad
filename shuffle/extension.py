"""What stands before something of Dask's own shuffle plugin on a worker, from start to stop.

Covers: :class:`Extension`, the coming and going of one.
Does not cover: what each does; see :mod:`dask_gpurt.shuffle.sampler`, :mod:`dask_gpurt.shuffle.links` and
:mod:`dask_gpurt.shuffle.shortcut`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["Extension"]


class Extension(ABC):
    """Extends the plugin of one worker.

    Parameters
    ----------
    worker
        The worker.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self._started = False
        self._restore: Callable[[], None] | None = None

    @abstractmethod
    def extend(self, plugin: Any) -> Callable[[], None]:
        """Extend Dask's own plugin; returns how to undo it."""

    def start(self) -> None:
        """Begin, or do so with the first run on a worker that preloads dask-gpurt, and has Dask's own plugin later."""
        self._started = True
        self.attach()

    def attach(self) -> None:
        """Extend Dask's own plugin, if that is there, and this has been started."""
        plugin = self.worker.extensions.get("shuffle")
        if self._started and self._restore is None and plugin is not None:
            self._restore = self.extend(plugin)

    def stop(self) -> None:
        """Put stock back."""
        self._started = False
        if self._restore is not None:
            self._restore()
            self._restore = None
