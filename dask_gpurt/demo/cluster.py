"""The clusters of the demonstration, and the two sides that run on them.

Covers: a LocalCluster of processes, or a LocalCUDACluster where there is a GPU; installing a side; warming up.
Does not cover: what runs there; see :mod:`dask_gpurt.demo.runner`.

Each run has a cluster of its own. Taking turns on one cluster would hand the second side a heap that the first has
grown and fragmented, and memory is what is measured here; two clusters side by side would halve the memory. What a
fresh cluster lacks, imported libraries and a first run of each path, the warm-up brings, to both sides alike and
outside of what is measured.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from distributed import Client, LocalCluster

from dask_gpurt.config import PARTS

__all__ = ["GPURT", "STOCK", "ClusterSpec", "Side", "count_gpus", "open_client", "warm_up"]


@dataclass(frozen=True)
class Side:
    """One of those that are compared: Dask with these parts of dask-gpurt and these of its settings, or with none."""

    name: str
    parts: tuple[str, ...] = ()
    settings: tuple[tuple[str, object], ...] = ()

    def install(self, client: Client) -> None:
        """Install the parts; nothing is touched where there are none."""
        if self.parts:
            from dask_gpurt import install

            chosen = {part: part in self.parts for part in PARTS}
            install(
                client,
                placement=chosen["placement"],
                shuffle=chosen["shuffle"],
                memory=chosen["memory"],
                config=dict(self.settings),
            )


STOCK = Side("stock")
GPURT = Side("dask-gpurt", PARTS)


@dataclass(frozen=True)
class ClusterSpec:
    """What a cluster is made of.

    Parameters
    ----------
    workers
        Worker processes.
    threads
        Threads a worker.
    memory_limit_nbytes
        Memory of a worker: of the process, or of the device where there is one.
    gpu
        Whether the workers have a GPU each.
    """

    workers: int = 2
    threads: int = 1
    memory_limit_nbytes: int = 5 * 2**28
    gpu: bool = False

    def open(self) -> AbstractContextManager[Client]:
        """Start such a cluster, and connect to it."""
        return open_client(self)

    @property
    def array_module(self) -> str:
        """Library of array blocks."""
        return "cupy" if self.gpu else "numpy"


def count_gpus() -> int:
    """Return how many GPUs dask-cuda finds; 0 where it, or CuPy, is not installed."""
    if any(importlib.util.find_spec(module) is None for module in ("dask_cuda", "cupy", "pynvml")):
        return 0
    import pynvml
    from dask_cuda.utils import get_n_gpus

    try:
        return int(get_n_gpus())
    except pynvml.NVMLError:
        return 0


@contextlib.contextmanager
def open_client(spec: ClusterSpec, *, as_default: bool = True) -> Iterator[Client]:
    """Start a cluster, and connect to it.

    Parameters
    ----------
    spec
        What the cluster is made of.
    as_default
        Whether Dask computes there, until the end. Of several clusters that don't end in turn, none may be the default.
    """
    import dask

    common: dict[str, Any] = {
        "n_workers": spec.workers,
        "threads_per_worker": spec.threads,
        "host": "127.0.0.1",
        "protocol": "tcp",
        "dashboard_address": "127.0.0.1:0",
        "silence_logs": logging.CRITICAL,
    }
    backends = {}
    if spec.gpu:
        from dask_cuda import LocalCUDACluster

        cluster = LocalCUDACluster(device_memory_limit=spec.memory_limit_nbytes, **common)
        backends["array.backend"] = "cupy"
        if importlib.util.find_spec("dask_cudf") is not None:
            backends["dataframe.backend"] = "cudf"
    else:
        cluster = LocalCluster(processes=True, memory_limit=spec.memory_limit_nbytes, **common)
    with dask.config.set(backends), cluster, Client(cluster, set_as_default=as_default) as client:
        client.wait_for_workers(spec.workers)
        client.run(_be_quiet)
        yield client


def _be_quiet() -> None:
    # A run that fails is reported with its reason; the log of the workers would tear the progress display apart.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)


def warm_up(client: Client) -> None:
    """Run each path once on next to nothing: a shuffle, a join, a rechunk, a product."""
    import dask.array as da
    import dask.dataframe as dd
    import pandas as pd

    left = dd.from_pandas(pd.DataFrame({"key": range(8), "name": list("abcdefgh")}), npartitions=4)
    right = dd.from_pandas(pd.DataFrame({"key": range(8), "value": 0.5}), npartitions=4)
    joined = left.merge(right, on="key", shuffle_method="p2p").groupby("name").value.sum()
    x = da.ones((8, 8), chunks=(8, 2))
    product = (x @ x.T).rechunk((2, 8)).sum()
    client.gather([client.compute(joined), client.compute(product)])
