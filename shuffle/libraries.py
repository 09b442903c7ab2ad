"""The libraries that a worker knows, by the package of their values.

Covers: :class:`Registry`, the one mechanism behind arrays (:mod:`dask_gpurt.shuffle.device`) and frames
(:mod:`dask_gpurt.shuffle.tables`).
Does not cover: what a library does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from dask_gpurt.errors import GpurtError

__all__ = ["Library", "LibraryMissingError", "Registry"]


class LibraryMissingError(GpurtError, RuntimeError):
    """A worker has to make values of a library that it does not have."""


class Library(Protocol):
    """What is asked of every library."""

    @property
    def name(self) -> str:
        """The package of its values."""

    def owns(self, value: object) -> bool:
        """Whether ``value`` is one of its values."""


L = TypeVar("L", bound=Library)


class Registry(Generic[L]):
    """Libraries of one kind.

    Parameters
    ----------
    what
        The kind, in the plural.
    package, make
        The one that is known without being registered, and what makes it where it can be imported.
    """

    def __init__(self, what: str, package: str, make: Callable[[], L]) -> None:
        self._what = what
        self._package = package
        self._make = make
        self._known: dict[str, L] = {}

    def add(self, library: L) -> None:
        """Make a library known, in place of one of that name."""
        self._known[library.name] = library

    def named(self, name: str) -> L:
        """Return a library.

        Raises
        ------
        LibraryMissingError
            If it is not known in this process, or cannot be imported.
        """
        if name not in self._known:
            if name != self._package:
                raise LibraryMissingError(f"{self._what} of {name!r} are not known to this worker")
            try:
                self.add(self._make())
            except ImportError as error:
                reason = f"{self._what} of {name!r} are wanted, and this worker cannot import it"
                raise LibraryMissingError(reason) from error
        return self._known[name]

    def of(self, value: object) -> L | None:
        """Return the library whose value ``value`` is; None if it is none that is known here."""
        package = type(value).__module__.partition(".")[0]
        if package not in self._known and package != self._package:
            return None
        library = self.named(package)
        return library if library.owns(value) else None
