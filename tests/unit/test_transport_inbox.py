"""What the inbox answers to each event, in each order."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dask_gpurt.shuffle.transport import inbox as module
from dask_gpurt.shuffle.transport.address import Manifest, TagCounter
from dask_gpurt.shuffle.transport.inbox import Fail, Inbox, Receipt, Refuse, Take

PEER = 77
TAG = TagCounter(PEER).next()
SIZES = (100, 200)


def reasons(instructions: list[module.Instruction]) -> list[str]:
    return [instruction.reason for instruction in instructions if isinstance(instruction, Fail)]


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_a_delivery_is_taken_in_order_whenever_it_is_asked_for(position: int) -> None:
    inbox, receipt = Inbox(), Receipt(TAG, SIZES)
    events: list[Callable[[], list[module.Instruction]]] = [
        lambda: inbox.announced(TAG, Manifest.of(SIZES)),
        lambda: inbox.arrived(TAG, 100, "first"),
        lambda: inbox.arrived(TAG, 200, "second"),
    ]
    events.insert(position, lambda: inbox.want(receipt))
    done = [instruction for event in events for instruction in event()]
    assert done == [Take("first", receipt, 0), Take("second", receipt, 1)]
    assert not len(inbox)


def test_nothing_is_taken_before_it_is_asked_for() -> None:
    inbox = Inbox()
    assert inbox.announced(TAG, Manifest.of(SIZES)) == []
    assert inbox.arrived(TAG, 100, "first") == []


@pytest.mark.parametrize("announced", [(100,), (100, 200, 300), (200, 100)])
def test_another_delivery_than_was_announced_fails_and_is_refused(announced: tuple[int, ...]) -> None:
    inbox, receipt = Inbox(), Receipt(TAG, announced)
    assert inbox.announced(TAG, Manifest.of(SIZES)) == []
    assert inbox.arrived(TAG, 100, "first") == []
    failed, refused = inbox.want(receipt)
    assert isinstance(failed, Fail)
    assert refused == Refuse("first")
    assert inbox.arrived(TAG, 200, "second") == [Refuse("second")]
    assert not len(inbox)


def test_a_frame_of_another_size_than_its_sender_said_fails() -> None:
    inbox, receipt = Inbox(), Receipt(TAG, SIZES)
    inbox.want(receipt)
    inbox.announced(TAG, Manifest.of(SIZES))
    refused, failed = inbox.arrived(TAG, 101, "first")
    assert refused == Refuse("first")
    assert isinstance(failed, Fail)
    assert "101 bytes" in failed.reason


def test_a_receiver_that_gives_up_has_the_rest_refused() -> None:
    inbox, receipt = Inbox(), Receipt(TAG, SIZES)
    inbox.want(receipt)
    inbox.announced(TAG, Manifest.of(SIZES))
    assert inbox.arrived(TAG, 100, "first") == [Take("first", receipt, 0)]
    assert inbox.cancel(receipt) == []
    assert inbox.arrived(TAG, 200, "second") == [Refuse("second")]
    assert not len(inbox)


def test_a_receiver_that_gives_up_before_anything_came_has_all_refused() -> None:
    inbox, receipt = Inbox(), Receipt(TAG, SIZES)
    inbox.want(receipt)
    assert inbox.cancel(receipt) == []
    assert inbox.announced(TAG, Manifest.of(SIZES)) == []
    assert inbox.arrived(TAG, 100, "first") == [Refuse("first")]
    assert inbox.arrived(TAG, 200, "second") == [Refuse("second")]
    assert not len(inbox)


def test_giving_up_what_is_complete_does_nothing() -> None:
    inbox, receipt = Inbox(), Receipt(TAG, (100,))
    inbox.want(receipt)
    inbox.announced(TAG, Manifest.of((100,)))
    inbox.arrived(TAG, 100, "first")
    assert inbox.cancel(receipt) == []
    assert not len(inbox)


def test_a_sender_that_gives_up_has_its_frames_refused() -> None:
    inbox, receipt = Inbox(), Receipt(TAG, SIZES)
    inbox.announced(TAG, Manifest.of(SIZES))
    inbox.arrived(TAG, 100, "first")
    assert inbox.withdrawn(TAG) == [Refuse("first")]
    assert reasons(inbox.want(receipt)) == ["withdrawn by its sender"]


def test_a_receiver_hears_that_the_sender_gives_up() -> None:
    inbox, receipt = Inbox(), Receipt(TAG, SIZES)
    inbox.want(receipt)
    assert reasons(inbox.withdrawn(TAG)) == ["withdrawn by its sender"]


def test_a_delivery_has_one_receiver() -> None:
    inbox, receipt = Inbox(), Receipt(TAG, SIZES)
    assert inbox.want(receipt) == []
    second = Receipt(TAG, SIZES)
    (failed,) = inbox.want(second)
    assert isinstance(failed, Fail)
    assert failed.receipt is second
    # The first is as it was.
    inbox.announced(TAG, Manifest.of(SIZES))
    assert inbox.arrived(TAG, 100, "first") == [Take("first", receipt, 0)]


def test_a_tag_that_is_announced_twice_fails() -> None:
    inbox, receipt = Inbox(), Receipt(TAG, SIZES)
    inbox.want(receipt)
    inbox.announced(TAG, Manifest.of(SIZES))
    assert len(reasons(inbox.announced(TAG, Manifest.of(SIZES)))) == 1


def test_what_a_lost_peer_had_under_way_ends_and_nothing_else() -> None:
    inbox = Inbox()
    lost, other = Receipt(TAG, SIZES), Receipt(TagCounter(PEER + 1).next(), SIZES)
    inbox.want(lost)
    inbox.want(other)
    inbox.arrived(TAG, 100, "first")
    assert inbox.gone(PEER, "lost") == [Fail(lost, "lost"), Refuse("first")]
    assert inbox.tags == [other.tag]


def test_deliveries_that_ended_early_are_forgotten_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_STONES", 10)
    inbox, counter = Inbox(), TagCounter(PEER)
    for _ in range(100):
        inbox.withdrawn(counter.next())
    assert len(inbox) == 10
    assert "10 ended early" in repr(inbox)
