"""What the spiller chooses, where it can be counted."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from dask_gpurt.memory import events as ev
from dask_gpurt.memory.horizon import Kind, Use
from dask_gpurt.memory.ledger import Ledger, Tier
from dask_gpurt.memory.spiller import Spiller

MB = 2**20


class ByName:
    """The longer the name, the sooner it is needed."""

    def uses(self, names: Sequence[Hashable]) -> list[Use]:
        return [Use(Kind.NEXT, 100.0 / len(str(name))) for name in names]


def writes(instructions: list[ev.Instruction]) -> list[ev.Write]:
    return [instruction for instruction in instructions if isinstance(instruction, ev.Write)]


def test_what_views_of_one_buffer_free_is_counted_once_when_the_last_has_gone() -> None:
    spiller = Spiller(Ledger({Tier.HOST: 5 * MB}), ByName())
    for name in ("a", "b"):
        spiller.handle(ev.Put(name, "base", 4 * MB, 3 * MB))
    first, second = writes(spiller.handle(ev.Put("needed soon", "own", 4 * MB, 4 * MB)))
    # The first of them is written, and free is nothing yet: that is no reason to take more.
    assert spiller.handle(ev.Written(first.name, first.epoch, 3 * MB)) == [ev.Drop(first.name)]
    assert spiller.handle(ev.Written(second.name, second.epoch, 3 * MB)) == [ev.Drop(second.name)]
    assert spiller.ledger.used(Tier.HOST) == 4 * MB
    assert not spiller.busy


def test_a_copy_that_has_become_too_large_is_given_up_and_not_tried_again_before_there_is_room() -> None:
    spiller = Spiller(Ledger({Tier.HOST: 5 * MB, Tier.DISK: 5 * MB}), ByName())
    spiller.handle(ev.Put("large", "first", 4 * MB, 4 * MB))
    (write,) = writes(spiller.handle(ev.Put("needed soon", "second", MB + 1, MB + 1)))
    assert write.name == "large"
    # Pickled it takes half as much again: more than DISK may hold. The other one fits.
    instructions = spiller.handle(ev.Written("large", write.epoch, 6 * MB))
    assert ev.RemoveCopy("large") in instructions
    (other,) = writes(instructions)
    assert other.name == "needed soon"
    assert spiller.ledger.used(Tier.DISK) == MB + 1, "what is reserved for the other"
    assert spiller.handle(ev.Written(other.name, other.epoch, MB + 1)) == [ev.Drop(other.name)]
    assert not spiller.busy
    spiller.ledger.set_limit(Tier.DISK, 8 * MB)
    assert writes(spiller.handle(ev.Pressed(MB))) == [ev.Write("large", write.epoch, Tier.DISK)], (
        "the same, now that there is room for it"
    )
