"""The DEVICE tier on a real GPU: CuPy arrays above the device limit go down and come back as they were."""

from __future__ import annotations

from typing import Any

import dask.array as da
import numpy as np
import pytest
from clusters import local_cluster
from distributed import Client, wait

import dask_gpurt

pytestmark = pytest.mark.gpu

#: Two workers, 64 MiB of device memory each, and 512 MiB of data.
LIMIT = "64 MiB"
SHAPE, CHUNKS = (8192, 8192), (1024, 1024)


def _figures(dask_worker: Any) -> dict[str, int]:
    figures: dict[str, int] = dask_worker.extensions["gpurt"].memory.metrics()
    return figures


def test_an_array_of_four_times_the_device_limit_is_computed_right() -> None:
    cupy = pytest.importorskip("cupy")
    host = np.random.default_rng(3).random(SHAPE)
    with (
        local_cluster(2) as cluster,
        Client(cluster) as client,
    ):
        answer = dask_gpurt.install(client, config={"memory.device-limit": LIMIT})
        assert answer.installed("memory"), str(answer)
        x = da.from_array(host, chunks=CHUNKS).map_blocks(cupy.asarray).persist()
        wait(x)
        device, back = (x + x.T).sum(axis=0), (x + x.T).sum(axis=0).map_blocks(cupy.asnumpy)
        np.testing.assert_allclose(cupy.asnumpy(device.compute()), (host + host.T).sum(axis=0))
        np.testing.assert_allclose(back.compute(), (host + host.T).sum(axis=0))
        figures = list(client.run(_figures).values())
    assert sum(f["device_written_nbytes"] for f in figures) > 0, figures
    assert all(f["device_held_nbytes"] <= 2 * 64 * 2**20 for f in figures), figures
