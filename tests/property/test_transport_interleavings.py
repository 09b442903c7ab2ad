"""The inbox under any interleaving: everybody hears once, every message ends, nothing is taken that was not announced."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dask_gpurt.shuffle.transport.address import Manifest, TagCounter
from dask_gpurt.shuffle.transport.inbox import Fail, Inbox, Instruction, Receipt, Refuse, Take

SIZES = st.lists(st.integers(1, 3), min_size=1, max_size=4).map(tuple)


@st.composite
def deliveries(draw: st.DrawFn) -> list[tuple[tuple[int, ...], tuple[int, ...], bool, bool]]:
    """Sizes sent, sizes announced, whether the sender withdraws, whether the receiver cancels."""
    found = []
    for _ in range(draw(st.integers(1, 3))):
        sent = draw(SIZES)
        found.append((sent, draw(st.one_of(st.just(sent), SIZES)), draw(st.booleans()), draw(st.booleans())))
    return found


@given(deliveries(), st.data())
def test_any_interleaving(
    found: list[tuple[tuple[int, ...], tuple[int, ...], bool, bool]], data: st.DataObject
) -> None:
    inbox, counter = Inbox(), TagCounter(5)
    lanes: list[list[tuple[str, int, int]]] = []
    receipts: dict[int, Receipt] = {}
    sent_sizes: dict[int, tuple[int, ...]] = {}
    withdrawn: set[int] = set()
    for sent, announced, withdraws, cancels in found:
        tag = counter.next()
        receipts[tag], sent_sizes[tag] = Receipt(tag, announced), sent
        frames = [("frame", tag, index) for index in range(len(sent))]
        kept = data.draw(st.integers(0, len(frames))) if withdraws else len(frames)
        lanes.append([("manifest", tag, 0), *frames[:kept], *([("withdraw", tag, 0)] if withdraws else [])])
        lanes.append([("want", tag, 0), *([("cancel", tag, 0)] if cancels else [])])
        if withdraws:
            withdrawn.add(tag)
    outcomes: Counter[tuple[int, int]] = Counter()
    taken: dict[int, list[int]] = {tag: [] for tag in receipts}
    failed: Counter[int] = Counter()
    cancelled: set[int] = set()
    arrived: set[tuple[int, int]] = set()

    def follow(instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case Take(message, receipt, index):
                    tag, frame = message
                    assert receipt is receipts[tag]
                    assert frame == index == len(taken[tag])
                    assert receipt.sizes == sent_sizes[tag]
                    assert tag not in cancelled
                    assert not failed[tag]
                    taken[tag].append(frame)
                    outcomes[message] += 1
                case Refuse(message):
                    outcomes[message] += 1
                case Fail(receipt, reason):
                    assert reason
                    assert receipt.tag not in cancelled
                    failed[receipt.tag] += 1

    while any(lanes):
        lane = data.draw(st.sampled_from([lane for lane in lanes if lane]))
        what, tag, frame = lane.pop(0)
        if what == "manifest":
            follow(inbox.announced(tag, Manifest.of(sent_sizes[tag])))
        elif what == "frame":
            arrived.add((tag, frame))
            follow(inbox.arrived(tag, sent_sizes[tag][frame], (tag, frame)))
        elif what == "withdraw":
            follow(inbox.withdrawn(tag))
        elif what == "want":
            follow(inbox.want(receipts[tag]))
        else:
            complete = len(taken[tag]) == len(receipts[tag].sizes) or failed[tag]
            follow(inbox.cancel(receipts[tag]))
            if not complete:
                cancelled.add(tag)
        assert not outcomes or max(outcomes.values()) == 1

    for tag, receipt in receipts.items():
        complete = taken[tag] == list(range(len(receipt.sizes)))
        assert failed[tag] + complete + (tag in cancelled) == 1
        if receipt.sizes != sent_sizes[tag]:
            assert not taken[tag]
    # Every message has ended, so no sender waits.
    assert set(outcomes) == arrived
