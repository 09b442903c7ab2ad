"""Messages go where Dask's go, once, and nowhere where Dask is not."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

import dask_gpurt
from dask_gpurt.logs import ToDask

LOUD = "import logging, dask_gpurt{also}; logging.getLogger('dask_gpurt.memory').warning('is heard')"


def _stderr(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stderr


def test_without_dask_nothing_is_shown() -> None:
    assert _stderr(LOUD.format(also="")) == ""


def test_beside_dask_it_looks_like_dask() -> None:
    lines = _stderr(LOUD.format(also=", distributed")).splitlines()
    assert len(lines) == 1
    assert lines[0].endswith(" - dask_gpurt.memory - WARNING - is heard")


def test_an_application_with_its_own_handler_sees_it_once() -> None:
    own = LOUD.format(also=", distributed; logging.basicConfig(format='own: %(message)s')")
    assert _stderr(own) == "own: is heard\n"


def test_a_level_in_the_configuration_of_dask_is_kept_and_shown_once() -> None:
    code = (
        "import dask; dask.config.set({'logging': {'distributed': 'info', 'dask_gpurt': 'info'}}); import distributed, dask_gpurt;"
        "import logging; logging.getLogger('dask_gpurt.memory').info('is heard')"
    )
    assert [line.rpartition(" - ")[2] for line in _stderr(code).splitlines()] == ["is heard"]


def test_there_is_one_handler() -> None:
    assert [type(handler) for handler in logging.getLogger(dask_gpurt.__name__).handlers] == [ToDask]


@pytest.fixture
def kept() -> Iterator[io.StringIO]:
    """What a handler of Dask's workers is given that wants warnings; it is no stream handler, as Dask's is none."""

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text.write(record.getMessage() + "\n")

    text, handler, logger = io.StringIO(), Kept(logging.WARNING), logging.getLogger("distributed.worker")
    logger.addHandler(handler)
    yield text
    logger.removeHandler(handler)


def test_workers_remember_it(kept: io.StringIO) -> None:
    logger = logging.getLogger("dask_gpurt.memory")
    logger.warning("is kept")
    logger.info("is not")
    assert kept.getvalue() == "is kept\n"


def test_what_dask_does_not_want_to_hear_is_not_handed_on(kept: io.StringIO) -> None:
    logger = logging.getLogger("distributed.worker")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        logging.getLogger("dask_gpurt.memory").error("is not")
    finally:
        logger.setLevel(level)
    assert kept.getvalue() == ""
