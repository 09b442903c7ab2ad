"""Handlers that do not keep alive whose method they are.

Covers: :func:`weak`, and :func:`strong` for who stands before another one's handler, and has to outlive it.

distributed keeps every function that it has ever called as a handler, in a cache that looks at its signature, and a
connection that rests keeps the handler of its last message. A method would keep its object, and with it all that an
installation had: its memory, its connections, its books.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

__all__ = ["strong", "weak"]


def weak(method: Callable[..., Any], *, late_is_no_error: bool = False) -> Callable[..., Any]:
    """Return a function that calls ``method`` for as long as its object is there, and has its name and signature.

    Parameters
    ----------
    method
        The method.
    late_is_no_error
        Whether to be called after that does nothing: an error in what comes by the stream of the scheduler would close the
        worker. Else it is a RuntimeError, for whoever has called.

    Examples
    --------
    >>> class Door:
    ...     def knock(self, comm, times):
    ...         return times
    >>> door = Door()
    >>> handler = weak(door.knock)
    >>> handler.__name__, inspect.signature(handler), handler(None, times=2)
    ('knock', <Signature (comm, times)>, 2)
    >>> del door
    >>> handler(None, times=2)
    Traceback (most recent call last):
    RuntimeError: dask-gpurt is not here any more, to which 'knock' belonged
    """
    reference = weakref.WeakMethod(method)
    name = method.__name__

    def handler(*args: Any, **kwargs: Any) -> Any:
        found = reference()
        if found is None:
            if late_is_no_error:
                return None
            raise RuntimeError(f"dask-gpurt is not here any more, to which {name!r} belonged")
        return found(*args, **kwargs)

    functools.update_wrapper(handler, method)
    # It would lead to the method.
    del handler.__wrapped__  # type: ignore[attr-defined]
    handler.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    handler.reference = reference  # type: ignore[attr-defined]
    return handler


def strong(handler: Callable[..., Any]) -> Callable[..., Any]:
    """Return the method that a handler made by :func:`weak` calls, or the handler itself.

    Examples
    --------
    >>> class Door:
    ...     def knock(self): ...
    >>> door = Door()
    >>> strong(weak(door.knock)) == door.knock, strong(len) is len
    (True, True)
    """
    reference = getattr(handler, "reference", None)
    found: Callable[..., Any] | None = reference() if isinstance(reference, weakref.WeakMethod) else None
    return handler if found is None else found
