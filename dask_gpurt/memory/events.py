"""What happens to blocks, and what is to be done about it: the vocabulary of the spiller.

Events go into :meth:`dask_gpurt.memory.spiller.Spiller.handle`; instructions come out, for the shell to carry out in
order. Both are data: they hold names and numbers, never values.

An operation that takes time carries the *epoch* of its block. A block gets a new epoch whenever its name is put anew,
so that an answer which arrives too late (the name was deleted, or means another value by now) is told apart.

Pure: no I/O, no clock, no dask.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from dask_gpurt.memory.ledger import Reservation, Tier

__all__ = [
    "Adopted",
    "Deleted",
    "Drop",
    "Event",
    "Grown",
    "Instruction",
    "Move",
    "MoveFailed",
    "Moved",
    "Pinned",
    "Pressed",
    "Put",
    "Raised",
    "Read",
    "ReadFailed",
    "ReadPutOff",
    "RemoveCopy",
    "Replace",
    "Retried",
    "Unpinned",
    "Wanted",
    "Write",
    "WriteFailed",
    "Written",
]

Name = Hashable


@dataclass(slots=True)
class Put:
    """A new value is in memory."""

    name: Name
    #: Identity of the buffer it lies in; blocks that share one count once.
    buffer: Hashable
    #: Bytes of that buffer.
    buffer_nbytes: int
    #: Bytes of the value itself, which are written when it goes down.
    nbytes: int
    reservation: Reservation | None = None


@dataclass(slots=True)
class Adopted:
    """A value has a copy below and is not in memory."""

    name: Name
    nbytes: int
    copy_nbytes: int = 0


@dataclass(slots=True)
class Grown:
    """A value that is in memory became larger. What lies below is out of date."""

    name: Name
    nbytes: int
    reservation: Reservation | None = None


@dataclass(slots=True)
class Deleted:
    """A name is not wanted any more."""

    name: Name


@dataclass(slots=True)
class Pinned:
    """Values must stay where they are, in memory or on their way to it."""

    names: tuple[Name, ...]


@dataclass(slots=True)
class Unpinned:
    """Takes back one :class:`Pinned`. Names that were deleted meanwhile are passed over."""

    names: tuple[Name, ...]


@dataclass(slots=True)
class Wanted:
    """A value is needed in memory. The reservation pays for it."""

    name: Name
    reservation: Reservation | None = None


@dataclass(slots=True)
class Raised:
    """A value was read back."""

    name: Name
    epoch: int
    buffer: Hashable
    buffer_nbytes: int


@dataclass(slots=True)
class ReadFailed:
    """A value cannot be read back. It is lost."""

    name: Name
    epoch: int


@dataclass(slots=True)
class ReadPutOff:
    """There was no memory to read a value into. The copy is as good as before."""

    name: Name
    epoch: int


@dataclass(slots=True)
class Written:
    """A copy is complete."""

    name: Name
    epoch: int
    nbytes: int


@dataclass(slots=True)
class WriteFailed:
    """No copy was made. The value is still in memory."""

    name: Name
    epoch: int
    #: Whether the value itself cannot be written, rather than the tier below be full or broken.
    value_is_to_blame: bool


@dataclass(slots=True)
class Moved:
    """A copy of a copy is complete, in another tier below. It is to be removed again unless the answer is :class:`Replace`."""

    name: Name
    epoch: int
    nbytes: int


@dataclass(slots=True)
class MoveFailed:
    """A copy stays where it is."""

    name: Name
    epoch: int


@dataclass(slots=True)
class Pressed:
    """So many bytes should go whatever the limits say, for example because the process grows. 0: look again."""

    nbytes: int


@dataclass(slots=True)
class Retried:
    """Time has passed since a write failed: try again."""


Event = (
    Put
    | Adopted
    | Grown
    | Deleted
    | Pinned
    | Unpinned
    | Wanted
    | Raised
    | ReadFailed
    | ReadPutOff
    | Written
    | WriteFailed
    | Moved
    | MoveFailed
    | Pressed
    | Retried
)


@dataclass(slots=True, frozen=True)
class Write:
    """Copy a value to a tier below; answer with Written or WriteFailed."""

    name: Name
    epoch: int
    #: Which tier; None: the only one there is, whose books are kept elsewhere.
    tier: Tier | None


@dataclass(slots=True, frozen=True)
class Read:
    """Bring a value back; answer with Raised or ReadFailed. The copy stays."""

    name: Name
    epoch: int


@dataclass(slots=True, frozen=True)
class Drop:
    """Let go of the value in memory."""

    name: Name


@dataclass(slots=True, frozen=True)
class RemoveCopy:
    """Remove the copy below."""

    name: Name


@dataclass(slots=True, frozen=True)
class Move:
    """Copy the copy below to another tier below; answer with Moved or MoveFailed."""

    name: Name
    #: Of this move alone.
    epoch: int
    tier: Tier


@dataclass(slots=True, frozen=True)
class Replace:
    """Put the copy that has just been moved in the place of the one it was made of, and remove that."""

    name: Name


Instruction = Write | Read | Drop | RemoveCopy | Move | Replace
