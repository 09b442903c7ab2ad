"""The doctor on a real GPU: the device is found, and its links carry what a device's do."""

from __future__ import annotations

import importlib.util

import pytest

from dask_gpurt.config import Settings
from dask_gpurt.doctor import checks, links
from dask_gpurt.doctor.facts import Cuda, Missing, Storage, Ucx
from dask_gpurt.doctor.gather import gather

pytestmark = pytest.mark.gpu


def test_the_device_is_found_and_measured() -> None:
    pytest.importorskip("cuda.bindings.driver")
    facts = gather("machine", Settings())
    assert isinstance(facts.cuda, Cuda)
    assert isinstance(facts.cuda.driver, str)
    device = facts.cuda.devices[0]
    assert device.total_nbytes > 2**30
    assert device.capability >= checks.CAPABILITY_MIN
    assert device.near_cpus
    for measure in (measures := links.to_devices("here", facts.cuda.devices)):
        assert not isinstance(measure.rate, Missing), measure
    bandwidth = {
        (m.source.tier, m.target.tier, m.path): m.rate.bandwidth for m in measures if not isinstance(m.rate, Missing)
    }
    # Memory of a device is faster than any way to it.
    assert bandwidth["device 0", "device 0", "copy"] > bandwidth["host", "device 0", "pinned"] > 1e9
    assert not any(finding.level == "broken" for finding in checks.of_server("here", facts, Settings()))


def test_what_its_libraries_can_do_is_told() -> None:
    facts = gather("machine", Settings())
    if importlib.util.find_spec("kvikio") is not None:
        assert isinstance(facts.storage, Storage), facts.storage
    if importlib.util.find_spec("ucxx") is not None:
        assert isinstance(facts.ucx, Ucx), facts.ucx
        assert "cuda_copy" in {resource.partition("/")[0] for resource in facts.ucx.resources}
