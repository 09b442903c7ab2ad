"""The sdist and the wheel: built from the sources alone, complete, and of use in an environment that has nothing else of ours."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile

import pytest

import dask_gpurt

ROOT = pathlib.Path(__file__).parents[2]
#: All that a build may need.
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "dask_gpurt", "plugins", "shuffle")
#: What setuptools is asked for, in the folder of the sources.
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, 'build_' + sys.argv[1])(sys.argv[2]))"


def _run(*command: str, cwd: pathlib.Path, **variables: str) -> str:
    # As from a shell that knows nothing of this checkout.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _build(kind: str, sources: pathlib.Path, target: pathlib.Path) -> pathlib.Path:
    return target / _run(sys.executable, "-c", BUILD, kind, str(target), cwd=sources).splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """The sdist of a copy of the sources, and the wheel that was built of it, as a user's pip does."""
    folder = tmp_path_factory.mktemp("build")
    sources = folder / "sources"
    sources.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, sources / name, symlinks=True, ignore=ignored)
        else:
            shutil.copy(ROOT / name, sources)
    sdist = _build("sdist", sources, folder)
    with tarfile.open(sdist) as archive:
        # Python 3.11.0 to 3.11.3 have no filters.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(folder / "unpacked")
    [unpacked] = (folder / "unpacked").iterdir()
    return sdist, _build("wheel", unpacked, folder)


def test_they_have_name_and_version(built: tuple[pathlib.Path, pathlib.Path]) -> None:
    stem = f"dask_gpurt-{dask_gpurt.__version__}"
    assert [path.name for path in built] == [f"{stem}.tar.gz", f"{stem}-py3-none-any.whl"]


def test_the_wheel_has_every_file_of_the_package_once(built: tuple[pathlib.Path, pathlib.Path]) -> None:
    wanted = {
        path.relative_to(ROOT).as_posix()
        for folder in ("dask_gpurt", "plugins", "shuffle")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix in {".py", ".yaml", ".html", ".typed"}
    }
    # Through the links, or beside them: in the wheel they are where Python looks.
    wanted = {f"dask_gpurt/{name.removeprefix('dask_gpurt/')}" for name in wanted}
    with zipfile.ZipFile(built[1]) as wheel:
        names = wheel.namelist()
    assert len(names) == len(set(names))
    assert {name for name in names if ".dist-info/" not in name} == wanted
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_it_serves_in_an_environment_of_its_own(
    built: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    install = ("install", "--quiet", "--no-index", "--no-deps", "--disable-pip-version-check")
    _run(sys.executable, "-m", "pip", "--python", str(python), *install, str(built[1]), cwd=tmp_path)
    # What it needs comes from here; what is editable here does not, as that wants a file that only an environment's own folder may have.
    here = {"PYTHONPATH": str(pathlib.Path(pytest.__file__).parents[1])}
    code = "import dask_gpurt, dask_gpurt.plugins.worker, dask_gpurt.shuffle.worker as it; print(it.__file__)"
    [place] = _run(str(python), "-c", code, cwd=tmp_path, **here).splitlines()
    assert pathlib.Path(place).is_relative_to(tmp_path / "venv")
    assert "Usage" in _run(str(python), "-m", "dask", "gpurt", "--help", cwd=tmp_path, **here)
