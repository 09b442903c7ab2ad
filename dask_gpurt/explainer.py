"""``explain``: why tasks went where they went, asked from a client.

Covers: which keys are meant, asking the scheduler.
Does not cover: what the answer looks like, see :mod:`dask_gpurt.explanation`; what is remembered of decisions, see
:mod:`dask_gpurt.plugins.decisions`; the same on the command line, see :mod:`dask_gpurt.cli`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dask_gpurt.explanation import Explanation, TaskExplanation

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["LIMIT", "explain"]

#: Tasks that one answer is about at most.
LIMIT = 1_000


def explain(client: Client, what: Any) -> Explanation:
    """Say why tasks went where they went.

    The scheduler remembers its latest decisions, some ten thousand. Of a task that waits, it says for which worker it is planned.

    Parameters
    ----------
    client
        A client of the cluster. For an asynchronous client the answer is to be awaited.
    what
        A key, a future, or a collection, whose outputs are meant; or a list of these. A tuple is a key.

    Returns
    -------
    Explanation
        For each task, of 1,000 at most, where it is, and the decisions about it: the reason, the workers that were compared with the
        bytes to fetch, the wait and the price in seconds, and the tasks it was planned with. What Dask itself decided is
        said, too.

    Examples
    --------
    >>> x = x.persist()  # doctest: +SKIP
    >>> dask_gpurt.explain(client, x)  # doctest: +SKIP
    """
    keys = list(dict.fromkeys(_keys(what)))
    answer: Explanation = client.sync(_explain, client, keys)
    return answer


def _keys(what: Any) -> Iterable[Any]:
    from dask.base import is_dask_collection
    from dask.core import flatten
    from distributed import Future
    from distributed.client import futures_of

    if isinstance(what, Future):
        return [what.key]
    if is_dask_collection(what):
        return [future.key for future in futures_of(what)] or flatten(what.__dask_keys__())
    if isinstance(what, list):
        return itertools.chain.from_iterable(map(_keys, what))
    return [what]


async def _explain(client: Client, keys: Sequence[Any]) -> Explanation:
    try:
        answer: Explanation = await client.run_on_scheduler(_ask, list(keys[:LIMIT]), len(keys[LIMIT:]))
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "dask_gpurt":
            return _without_placement(keys)  # the scheduler does not have it: so there is nothing there
        raise
    return answer


def _ask(keys: list[Any], omitted: int, dask_scheduler: Any) -> Explanation:
    from dask_gpurt.plugins.scheduler import NAME

    placement = getattr(dask_scheduler.plugins.get(NAME), "placement", None)
    if placement is None:
        return _without_placement(keys)
    return Explanation(tuple(placement.explain(keys)), omitted=omitted)


def _without_placement(keys: Sequence[Any]) -> Explanation:
    return Explanation(tuple(TaskExplanation(key, "unknown") for key in keys), installed=False)
