"""What is to be done with each message that arrives: a state machine, without I/O.

Covers: matching the messages of a delivery with the receiver that has asked for it, in whichever order they come;
deliveries that are cancelled, withdrawn, or not what was announced; peers that are gone.
Does not cover: taking and refusing itself; see :mod:`dask_gpurt.shuffle.transport.engine`, which feeds this with events
and does what the returned instructions say.

Theory of operation
    The messages of a delivery come in the order manifest, frames, perhaps a withdrawal; UCX keeps the order of what one
    peer sends. The receiver asks for the delivery (:meth:`Inbox.want`) before, between or after them.

    No buffer is handed to UCX before the message that is to go into it has arrived and its size was found to be right.
    So a receiver that gives up has nothing to take back but what is being written just then, and a sender
    cannot make anybody write outside of a buffer.

    Every message that arrives is either taken, or refused, which ends the send on the other side, or kept until one of
    both is decided. Whoever asks for a delivery hears of it exactly once: all its frames are taken, or it fails.

    A delivery that ends early leaves a *stone*, because messages of it, or the receiver, may come later. Stones are few
    and bounded: if the oldest is dropped, what comes for it is kept until its sender withdraws it or is gone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from dask_gpurt.shuffle.transport.address import Manifest, owner_of

__all__ = ["MAX_STONES", "Fail", "Inbox", "Instruction", "Receipt", "Refuse", "Take"]

#: Deliveries that ended early and are remembered. A sender has a few dozen under way at most.
MAX_STONES = 4096


@dataclass(eq=False)
class Receipt:
    """A receiver's request for a delivery.

    Parameters
    ----------
    tag
        Tag of the delivery.
    sizes
        Sizes of its frames, as they were announced.
    """

    tag: int
    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Take:
    """Receive ``message`` as frame ``index`` of ``receipt``."""

    message: Any
    receipt: Receipt
    index: int


@dataclass(frozen=True)
class Refuse:
    """Let ``message`` end without its data."""

    message: Any


@dataclass(frozen=True)
class Fail:
    """Tell the receiver that nothing more will come."""

    receipt: Receipt
    reason: str


Instruction = Take | Refuse | Fail


@dataclass(eq=False)
class _Incoming:
    manifest: Manifest | None = None
    receipt: Receipt | None = None
    #: Messages that wait for manifest or receipt, with their sizes.
    waiting: deque[tuple[int, Any]] = field(default_factory=deque)
    #: Frames that were taken or refused.
    seen: int = 0
    #: Why the delivery ended early, if it did.
    ended: str = ""


class Inbox:
    """The deliveries to one worker that are not complete. Every method returns what is to be done now, in order."""

    def __init__(self) -> None:
        #: Tag to what is known of the delivery.
        self._incoming: dict[int, _Incoming] = {}
        #: Tags of deliveries that ended early, oldest first.
        self._stones: dict[int, None] = {}

    def __repr__(self) -> str:
        wanted = sum(incoming.receipt is not None for incoming in self._incoming.values())
        return f"<Inbox {len(self._incoming)} deliveries, {wanted} wanted, {len(self._stones)} ended early>"

    def __len__(self) -> int:
        return len(self._incoming)

    @property
    def tags(self) -> list[int]:
        """Tags of the deliveries that are not complete."""
        return list(self._incoming)

    def want(self, receipt: Receipt) -> list[Instruction]:
        """A receiver asks for a delivery."""
        incoming = self._of(receipt.tag)
        if incoming.receipt is not None:
            return [Fail(receipt, f"delivery {receipt.tag:#x} is being received already")]
        if incoming.ended:
            # It has its answer now. What is still to come is refused as before.
            return [Fail(receipt, incoming.ended)]
        incoming.receipt = receipt
        return list(self._settle(receipt.tag, incoming))

    def cancel(self, receipt: Receipt, reason: str = "cancelled by its receiver") -> list[Instruction]:
        """The receiver does not want the delivery any more; it is not told so."""
        incoming = self._incoming.get(receipt.tag)
        if incoming is None or incoming.receipt is not receipt:
            return []
        incoming.receipt = None
        self._end(receipt.tag, incoming, reason)
        return list(self._settle(receipt.tag, incoming))

    def announced(self, tag: int, manifest: Manifest) -> list[Instruction]:
        """A manifest has arrived."""
        incoming = self._of(tag)
        instructions: list[Instruction] = []
        if incoming.manifest is None:
            incoming.manifest = manifest
        else:
            instructions = self._fail(tag, incoming, f"delivery {tag:#x} was announced twice")
        return instructions + list(self._settle(tag, incoming))

    def arrived(self, tag: int, nbytes: int, message: Any) -> list[Instruction]:
        """A frame has arrived."""
        incoming = self._of(tag)
        incoming.waiting.append((nbytes, message))
        return list(self._settle(tag, incoming))

    def withdrawn(self, tag: int) -> list[Instruction]:
        """The sender has given up; it sends nothing more of this delivery."""
        incoming = self._of(tag)
        instructions = self._fail(tag, incoming, "withdrawn by its sender")
        instructions += [Refuse(message) for _, message in incoming.waiting]
        incoming.waiting.clear()
        # Complete, in a way: what is left is the receiver, who may not have asked yet.
        return instructions

    def gone(self, incarnation: int, reason: str) -> list[Instruction]:
        """A peer is gone; nothing more comes from it."""
        instructions: list[Instruction] = []
        for tag in [tag for tag in self._incoming if owner_of(tag) == incarnation]:
            incoming = self._incoming[tag]
            if incoming.receipt is not None:
                instructions.append(Fail(incoming.receipt, reason))
            instructions += [Refuse(message) for _, message in incoming.waiting]
            self._forget(tag)
        return instructions

    def _of(self, tag: int) -> _Incoming:
        return self._incoming.setdefault(tag, _Incoming())

    def _forget(self, tag: int) -> None:
        del self._incoming[tag]
        self._stones.pop(tag, None)

    def _end(self, tag: int, incoming: _Incoming, reason: str) -> None:
        incoming.ended = incoming.ended or reason
        self._stones[tag] = None
        if len(self._stones) > MAX_STONES:
            self._forget(next(iter(self._stones)))

    def _fail(self, tag: int, incoming: _Incoming, reason: str) -> list[Instruction]:
        receipt, incoming.receipt = incoming.receipt, None
        self._end(tag, incoming, reason)
        return [] if receipt is None else [Fail(receipt, reason)]

    def _settle(self, tag: int, incoming: _Incoming) -> Iterator[Instruction]:
        manifest, receipt = incoming.manifest, incoming.receipt
        if receipt is not None and manifest is not None and not incoming.seen:
            expected = Manifest.of(receipt.sizes)
            if manifest != expected:
                yield from self._fail(
                    tag,
                    incoming,
                    f"the sender has {manifest.count} frames, {expected.count} were announced"
                    if manifest.count != expected.count
                    else "the sender has frames of other sizes than were announced",
                )
        while incoming.waiting and (incoming.ended or (manifest is not None and incoming.receipt is not None)):
            nbytes, message = incoming.waiting.popleft()
            index = incoming.seen
            incoming.seen += 1
            receipt = incoming.receipt
            if receipt is None:
                yield Refuse(message)
            elif nbytes != receipt.sizes[index]:
                yield Refuse(message)
                reason = f"frame {index} has {nbytes} bytes, {receipt.sizes[index]} were announced"
                yield from self._fail(tag, incoming, reason)
            else:
                yield Take(message, receipt, index)
            if manifest is not None and incoming.seen == manifest.count:
                break
        if manifest is not None and incoming.seen >= manifest.count and (incoming.receipt or incoming.ended):
            for _, message in incoming.waiting:
                yield Refuse(message)
            self._forget(tag)
