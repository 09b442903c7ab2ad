"""Who is sent a large result when."""

from __future__ import annotations

from dask_gpurt.plugins.turns import WAITING_MAX, WORTH_S, Turns


def rounds(npeers: int, elapsed_s: float) -> int:
    """Count the rounds of copies until ``npeers`` have asked one holder, and all have been served; who was sent away asks the latest copy."""
    holders: list[Turns[int]] = [Turns()]
    serving: dict[int, int] = {}
    for peer in range(npeers):
        if holders[0].enter("x", peer):
            serving[0] = peer
    done = 0
    while serving:
        done += 1
        following: dict[int, int] = {}
        for holder in list(serving):
            served, away = holders[holder].leave("x", elapsed_s)
            holders.append(Turns())
            if served is not None:
                following[holder] = served
            for peer in away:
                if holders[-1].enter("x", peer):
                    following[len(holders) - 1] = peer
        serving = following
    assert len(holders) == npeers + 1, "all have it"
    return done


def test_copies_double_where_they_take_long() -> None:
    assert rounds(7, elapsed_s=1.0) == 3
    assert rounds(63, elapsed_s=1.0) == 6


def test_where_copies_are_quick_all_are_served_by_the_first() -> None:
    assert rounds(7, elapsed_s=WORTH_S / 100) == 7


def test_keys_have_turns_of_their_own() -> None:
    turns: Turns[str] = Turns()
    assert turns.enter("x", "a")
    assert turns.enter("y", "a")
    assert turns.enter("x", "b") is False
    assert turns.leave("y", 1.0) == (None, [])
    assert len(turns) == 1


def test_after_a_failure_nobody_is_sent_to_a_copy_that_is_not_there() -> None:
    turns: Turns[int] = Turns()
    for peer in range(5):
        turns.enter("x", peer)
    assert turns.leave("x", None) == (1, [])
    assert turns.leave("x", 1.0) == (2, [4])


def test_no_more_than_so_many_wait() -> None:
    turns: Turns[int] = Turns()
    answers = [turns.enter("x", peer) for peer in range(WAITING_MAX + 3)]
    assert answers == [True] + [False] * WAITING_MAX + [None] * 2
