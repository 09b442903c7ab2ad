"""All 22 TPC-H queries beside stock Dask, in time.

Cases: ``q1`` to ``q22``, and ``geomean``: the geometric mean of their ratios, so that no query weighs more for taking
longer. The figure is the wall time of ``query.compute()``; opening the tables and ordering the few rows that are left
is not in it. Every answer of every run is compared with DuckDB's. Quick takes a tenth of the tables and one pair.

Two clusters that were started alike live side by side, each of two worker processes of one thread: stock Dask has one
that dask-gpurt never touched; ours is installed on the other before the first query and stays, with its defaults, as its
users have it. Installing and uninstalling in turn on one cluster would take from ours what it keeps from one query to
the next, and leave to stock what ours left in the processes. While one cluster works the other does nothing but
send heartbeats, and since they take turns query by query, a drift of the machine weighs on both. What a first run finds
cold belongs to neither side: each query runs once on each before its pairs begin.

Processes that were started alike are not equally quick: with stock Dask on both sides, ten pairs of q1 on one pair of
clusters had ratios from 0.89 to 1.05 on six pairs of clusters, q6 from 0.97 to 1.22, with narrow quartiles each. So the pairs
of each query are spread over :data:`OPENINGS` pairs of clusters. A line of one query is good for what is far from 1 even so;
with stock on both sides ``geomean`` was 0.996.

The workers have several times the memory that the queries need, so that what is measured is placement, the shuffle and
the overhead of all three parts. The subject ``demo`` has memory that is scarce, and so has this one at a larger scale
(``--scale 10``), where it asks which queries come to their end at all: :mod:`benchmarks.tpch_large`.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence

import pandas as pd
from distributed import Client

from benchmarks import tpch_large
from benchmarks.frame import Line, Subject, WrongAnswerError, line_of_pairs, turns
from benchmarks.tpch_queries import NAMES, differences, finish, queries
from dask_gpurt import InstallError, status
from dask_gpurt.demo.cluster import GPURT, STOCK, ClusterSpec, Side, open_client, warm_up
from dask_gpurt.demo.data import default_cache, ensure_tables
from dask_gpurt.demo.tpch import Query, Reader, reader, truth

#: Pairs of clusters.
OPENINGS = 3
#: Pairs of runs of each query on each of them; of a short one there are up to three times as many, for so long.
LEAST_PAIRS = 1
PAIRS_S = 4.0

SPEC = ClusterSpec(workers=2, threads=1, memory_limit_nbytes=4 * 2**30)


def run(*, quick: bool, side: Side = GPURT, names: Sequence[str] | None = None) -> Iterator[Line]:
    """Yield a line a query, then the one for all of them.

    Parameters
    ----------
    quick
        Whether to take a tenth of the tables, and one pair of clusters.
    side
        What stock Dask is compared with.
    names
        Queries to run; all of them unless said. The line ``geomean`` is for all only.
    """
    scale, openings = (0.1, 1) if quick else (1.0, OPENINGS)
    folder = ensure_tables(scale, default_cache())
    every = queries(scale)
    chosen = every if names is None else {name: every[name] for name in names}
    # Before there is a cluster: DuckDB takes every core.
    expected = {name: truth(query, folder) for name, query in chosen.items()}
    read = reader(folder)
    walls: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in chosen}
    for opening in range(openings):
        with contextlib.ExitStack() as stack:
            stock, ours = (stack.enter_context(_open(each)) for each in (STOCK, side))
            for name, query in chosen.items():
                pairs = compare(query, read, expected[name], ours=ours, peer=stock, ours_first=opening % 2 == 1)
                for one_side, more in zip(walls[name], pairs, strict=True):
                    one_side.extend(more)
                if opening == openings - 1:
                    yield line_of_pairs(name, "wall_s", *walls[name], peer_name=STOCK.name)
    if chosen.keys() == every.keys():
        yield line_of_all(list(walls.values()))


@contextlib.contextmanager
def _open(side: Side) -> Iterator[Client]:
    """Start a side's cluster, with all of the side's parts on it."""
    with open_client(SPEC) as client:
        side.install(client)
        installation = status(client)
        missing = [part for part in side.parts if not installation.installed(part)]
        if missing:
            raise InstallError(f"{', '.join(missing)} can't be installed:\n{installation}")
        with client.as_current():
            warm_up(client)
        yield client


def compare(
    query: Query,
    read: Reader,
    expected: pd.DataFrame,
    *,
    ours: Client,
    peer: Client,
    ours_first: bool = False,
    least: int = LEAST_PAIRS,
) -> tuple[list[float], list[float]]:
    """Run a query on both clusters in turns; return the times of ours and of the peer, pair by pair.

    There are ``least`` pairs, and up to three times as many of a query that is so short that they take no longer than
    :data:`PAIRS_S`. ``ours_first`` says which side begins the first of them.

    Raises
    ------
    WrongAnswerError
        If an answer, of either side, is not the expected one.
    """
    walls: dict[bool, list[float]] = {True: [], False: []}
    clients = {True: ours, False: peer}
    pair_s = sum(timed(query, read, expected, client) for client in clients.values())
    pairs = max(least, min(3 * least, int(PAIRS_S / pair_s)))
    for _, second in turns(pairs):
        is_ours = second != ours_first
        walls[is_ours].append(timed(query, read, expected, clients[is_ours]))
    return walls[True], walls[False]


def timed(query: Query, read: Reader, expected: pd.DataFrame, client: Client) -> float:
    """Run a query on a cluster, check the answer, and return how long ``compute`` took."""
    with client.as_current():
        collection = query.build(read)
        started = time.perf_counter()
        computed = collection.compute()
        elapsed_s = time.perf_counter() - started
    found = differences(query, finish(query, computed), expected)
    if found:
        raise WrongAnswerError(f"{query.name}: {'; '.join(found)}")
    return elapsed_s


def line_of_all(walls: Sequence[tuple[Sequence[float], Sequence[float]]]) -> Line:
    """Make the line for all queries of their times, ours and the peer's: geometric means throughout.

    The ratio is that of the queries' ratios. The quartiles are those of the pairs: the first pairs of all queries
    together, then the second ones, for as many as every query has.

    Examples
    --------
    >>> line = line_of_all([([1.0, 1.0], [2.0, 4.0]), ([3.0, 3.0], [6.0, 6.0])])
    >>> round(line.ratio, 3), round(line.ours, 3), line.pairs
    (2.449, 1.732, 2)
    """
    of_queries = [line_of_pairs("", "", ours, peer, peer_name="") for ours, peer in walls]
    pairs = min(len(ours) for ours, _ in walls)
    of_pairs = line_of_pairs(
        "geomean",
        "wall_s",
        ours=[statistics.geometric_mean(ours[number] for ours, _ in walls) for number in range(pairs)],
        peer=[statistics.geometric_mean(peer[number] for _, peer in walls) for number in range(pairs)],
        peer_name=STOCK.name,
    )
    return Line(
        case=of_pairs.case,
        metric=of_pairs.metric,
        ratio=statistics.geometric_mean(line.ratio for line in of_queries),
        ours=statistics.geometric_mean(line.ours for line in of_queries),
        peer=statistics.geometric_mean(line.peer for line in of_queries),
        peer_name=of_pairs.peer_name,
        quartiles=of_pairs.quartiles,
        pairs=pairs,
    )


def _scaled(scale: float) -> Subject:
    def case(*names: str) -> Callable[[bool], Iterator[Line]]:
        return lambda quick: tpch_large.run(scale, names=names)  # noqa: ARG005 - one run is as quick as it gets

    return Subject("tpch", SUBJECT.title, case(*NAMES), cases={name: case(name) for name in NAMES})


def _alone(name: str) -> Callable[[bool], Iterator[Line]]:
    return lambda quick: run(quick=quick, names=[name])


SUBJECT = Subject(
    "tpch",
    "the 22 TPC-H queries beside stock Dask",
    lambda quick: run(quick=quick),
    cases={name: _alone(name) for name in NAMES},
    scaled=_scaled,
)
