"""The package: nothing forgotten, cheap to import, one copy of everything."""

from __future__ import annotations

import importlib
import pathlib
import subprocess
import sys
import tomllib

import pytest

import dask_gpurt

ROOT = pathlib.Path(__file__).parents[2]


def test_every_subpackage_is_in_the_wheel() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    package = pathlib.Path(dask_gpurt.__file__).parent
    # `**` does not follow the links to plugins and shuffle: both levels are listed by hand.
    found = {"dask_gpurt"} | {f"dask_gpurt.{init.parent.name}" for init in package.glob("*/__init__.py")}
    for folder in ("plugins", "shuffle"):
        found |= {f"dask_gpurt.{folder}.{init.parent.name}" for init in (ROOT / folder).glob("*/__init__.py")}
    assert set(listed) == found


def test_the_version_is_said_once() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == dask_gpurt.__version__


def test_importing_does_not_import_distributed() -> None:
    code = "import sys, dask_gpurt; sys.exit('distributed' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0


def test_importing_takes_no_time() -> None:
    """At most 50 ms of a processor more than Dask alone; it takes less than one."""
    code = "import dask, time; t = time.process_time(); import dask_gpurt; print(time.process_time() - t)"
    taken_s = [float(subprocess.check_output([sys.executable, "-c", code], timeout=60)) for _ in range(3)]
    assert min(taken_s) < 0.05


@pytest.mark.parametrize("name", dask_gpurt.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(dask_gpurt, name) is not None
    assert name in dir(dask_gpurt)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = dask_gpurt.no_such_name


@pytest.mark.parametrize("name", ["plugins", "shuffle"])
def test_a_second_copy_cannot_be_imported(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    with pytest.raises(ImportError, match=f"dask_gpurt.{name}"):
        importlib.import_module(name)
