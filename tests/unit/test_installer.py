"""What makes a cluster unfit for an installation is told by name."""

from __future__ import annotations

import dataclasses
import re

import pytest

import dask_gpurt
from dask_gpurt import seams
from dask_gpurt.errors import ConfigError, InstallError
from dask_gpurt.installer import _Look, _raise_if_unfit

GOOD = seams.SUPPORTED[0]
FIT = _Look(dask_gpurt.__version__, GOOD, GOOD)


def test_a_fit_cluster_passes() -> None:
    _raise_if_unfit({"the scheduler": FIT, "w1": FIT})
    _raise_if_unfit({"the scheduler": FIT})


@pytest.mark.parametrize("version", ["2026.6.0", seams.SUPPORTED[1], "2027.1.0"])
def test_a_worker_with_another_dask_is_named(version: str) -> None:
    with pytest.raises(InstallError, match=f"w1 runs distributed {re.escape(version)}"):
        _raise_if_unfit({"the scheduler": FIT, "w1": _Look(dask_gpurt.__version__, GOOD, version)})


def test_a_server_with_another_version_of_ours_is_named() -> None:
    with pytest.raises(InstallError, match=r"the scheduler has dask-gpurt 9\.9"):
        _raise_if_unfit({"the scheduler": _Look("9.9", GOOD, GOOD)})


def test_a_folder_that_cannot_be_written_is_named_with_the_worker() -> None:
    look = _Look(dask_gpurt.__version__, GOOD, GOOD, ("/spill", "Permission denied"))
    with pytest.raises(ConfigError, match=r"gpurt.memory.directory: '/spill'.*w1 can write \(Permission denied\)"):
        _raise_if_unfit({"the scheduler": FIT, "w1": look})


def test_a_url_that_cannot_be_written_is_named_with_the_worker() -> None:
    look = _Look(dask_gpurt.__version__, GOOD, GOOD, object_url=("s3://spill", "Forbidden"))
    with pytest.raises(ConfigError, match=r"gpurt.memory.object-url: 's3://spill'.*w1 can write \(Forbidden\)"):
        _raise_if_unfit({"the scheduler": FIT, "w1": look})


def test_a_worker_that_cannot_encrypt_is_not_left_to_stock() -> None:
    look = dataclasses.replace(FIT, encryption="cryptography cannot be imported: why")
    with pytest.raises(ConfigError, match=r"gpurt.memory.encryption: True .* on w1, cryptography cannot be imported"):
        _raise_if_unfit({"the scheduler": FIT, "w1": look})


def test_one_worker_without_the_package_is_borne_all_are_not() -> None:
    missing = ModuleNotFoundError("No module named 'dask_gpurt'")
    _raise_if_unfit({"the scheduler": FIT, "w1": FIT, "w2": missing})
    with pytest.raises(InstallError, match="no worker can load dask_gpurt"):
        _raise_if_unfit({"the scheduler": FIT, "w1": missing, "w2": missing})
