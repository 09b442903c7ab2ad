"""A worker's first input of a shuffle is counted before its run exists, and the count goes with the question for the run.

Covers: when a sample is taken, and how it travels.
Does not cover: what is in it (:mod:`dask_gpurt.shuffle.sizes`), and what the scheduler does with it
(:mod:`dask_gpurt.shuffle.assigner`).

Theory of operation: a worker asks the scheduler for a shuffle's run when its first input is there. This stands before
that question, and asks it with a sample, so there is no message more than in stock Dask. It decides nothing: workers that
do not have it ask as they always do, and where the scheduler does not know the question, the stock one is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from distributed.core import clean_exception

from dask_gpurt import seams
from dask_gpurt.shuffle.extension import Extension
from dask_gpurt.shuffle.sizes import Sample, sample_of

if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["COLUMNS", "SAMPLED_ROWS_MIN", "Sampler"]

#: The columns by which dask.dataframe tells a shuffle where rows go: a join, and all others.
COLUMNS = ("__hash_partition", "_partitions")

#: Inputs of fewer rows say little, and the third of a millisecond that a look takes would be felt in small shuffles.
SAMPLED_ROWS_MIN = 1024


class Sampler(Extension):
    """Takes samples on one worker.

    Parameters
    ----------
    worker
        The worker.
    """

    def __init__(self, worker: Worker) -> None:
        super().__init__(worker)
        #: Shuffle to the sample that goes with the question for its run.
        self._samples: dict[str, Sample] = {}

    def extend(self, plugin: Any) -> Callable[[], None]:
        """Stand before the plugin's own methods; returns how to undo it."""
        stock = seams.shuffle_hooks(plugin)

        def add_partition(data: Any, partition_id: Any, id: str, **kwargs: Any) -> Any:  # noqa: A002  stock's name
            if not seams.has_shuffle_run(plugin, id) and (sample := self._sample(data)) is not None:
                self._samples[id] = sample
            try:
                return stock.add_partition(data, partition_id, id, **kwargs)
            finally:
                # Where another thread was first, nobody has asked with it.
                self._samples.pop(id, None)

        async def fetch(shuffle_id: str, key: Any = None) -> Any:
            sample = None if key is None else self._samples.pop(shuffle_id, None)
            found = None if sample is None else await self._ask(shuffle_id, key, sample)
            return await stock.fetch(shuffle_id, key) if found is None else found

        return seams.override_shuffle_hooks(plugin, seams.ShuffleHooks(add_partition, fetch))

    def _sample(self, data: Any) -> Sample | None:
        import pandas as pd

        if type(data) is not pd.DataFrame or len(data) < SAMPLED_ROWS_MIN or not data.columns.is_unique:
            return None
        column = next((column for column in COLUMNS if column in data.columns), None)
        if column is None:
            return None
        return sample_of(column, np.asarray(data[column]), int(data.memory_usage().sum()))

    async def _ask(self, shuffle_id: str, key: Any, sample: Sample) -> Any:
        reply = await self.worker.scheduler.gpurt_shuffle_open(
            shuffle_id=shuffle_id, key=key, worker=self.worker.address, sample=sample.to_message()
        )
        if reply is None:
            # The scheduler has our part no more.
            return None
        if reply["status"] == "error":
            _, error, traceback = clean_exception(**reply)
            assert error is not None
            raise error.with_traceback(traceback)
        return reply["run_spec"]
