"""The choice of a path: given what was measured, when is which one taken, and how often is the other one tried."""

from __future__ import annotations

import itertools

from dask_gpurt.shuffle.paths import COMM, TRIAL_MESSAGES, TRIAL_MESSAGES_MAX, TRIAL_NBYTES_MAX, UCX, PathChooser
from dask_gpurt.topology import WINDOW, Link, Rate

MESSAGE = 8 * 2**20


class World:
    """Two paths that take what they take."""

    def __init__(self, ucx: float, comm: float) -> None:
        self.rates = {UCX: Rate(0.0005, ucx), COMM: Rate(0.001, comm)}
        self.chooser = PathChooser({path: Link() for path in (UCX, COMM)})

    def send(self, count: int, nbytes: int = MESSAGE) -> list[str]:
        taken = []
        for _ in range(count):
            path = self.chooser.choose(nbytes)
            self.chooser.links[path].observe(nbytes, self.rates[path].price(nbytes))
            taken.append(path)
        return taken


def test_shared_memory_is_never_left_and_the_other_path_never_tried() -> None:
    assert set(World(ucx=9e9, comm=2e9).send(10_000)) == {UCX}


def test_ucx_is_left_after_one_trial_that_was_clearly_quicker() -> None:
    taken = World(ucx=1e8, comm=1e9).send(1000)
    assert taken[: TRIAL_MESSAGES - 1] == [UCX] * (TRIAL_MESSAGES - 1)
    assert taken.index(COMM) == TRIAL_MESSAGES - 1
    assert taken.count(UCX) < TRIAL_MESSAGES + 10


def test_a_path_that_stays_worse_is_tried_ever_more_seldom() -> None:
    world = World(ucx=1e8, comm=0.9e8)
    taken = world.send(20_000)
    trials = [number for number, path in enumerate(taken) if path == COMM]
    assert 5 < len(trials) < 20
    gaps = [after - before for before, after in itertools.pairwise(trials)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == TRIAL_MESSAGES_MAX
    assert world.chooser.path == UCX


def test_a_path_that_is_better_by_little_is_not_changed_to() -> None:
    world = World(ucx=1e8, comm=1.2e8)
    world.send(5000)
    assert world.chooser.path == UCX


def test_a_path_that_became_better_is_found_out() -> None:
    world = World(ucx=1e8, comm=1e9)
    world.send(100)
    assert world.chooser.path == COMM
    world.rates[UCX] = Rate(0.0005, 9e9)
    taken = world.send(TRIAL_MESSAGES_MAX * 2 * WINDOW)
    assert world.chooser.path == UCX
    assert taken[-1000:].count(UCX) == 1000


def test_small_messages_and_huge_ones_are_no_trials() -> None:
    world = World(ucx=1e8, comm=1e9)
    assert set(world.send(100, nbytes=1000)) == {UCX}
    assert set(world.send(100, nbytes=TRIAL_NBYTES_MAX + 1)) == {UCX}
    assert COMM in world.send(1)


def test_the_same_observations_give_the_same_choices() -> None:
    one, other = World(ucx=3e8, comm=1e9), World(ucx=3e8, comm=1e9)
    assert one.send(500) == other.send(500)
