"""The example notebooks do what they say, each in a kernel of its own; their last cells compare with NumPy and pandas."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

import dask_gpurt
from docs.notebooks import EXAMPLES, execute

#: As little as workers get along with. Stock Dask on a busy machine may come so near to the limit that it pauses, and then for good: that is not what
#: is tested.
SMALL = {
    "EXAMPLE_WORKER_MEMORY": "512 MiB",
    **{f"DASK_DISTRIBUTED__WORKER__MEMORY__{mark}": "False" for mark in ("PAUSE", "TERMINATE")},
}

#: Run after the last cell: which interpreter that was, which package, where the workers listened, and what lay on DISK at last.
ASKED = """
import json, sys
status = [shown for shown in Out.values() if isinstance(shown, dask_gpurt.Installation)][-1]
print(json.dumps({
    "interpreter": sys.executable,
    "package": dask_gpurt.__file__,
    "workers": sorted(status.workers),
    "on_disk_nbytes": [tiers["disk"].used_nbytes for tiers in status.tiers.values()],
}))
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(example: pathlib.Path) -> None:
    notebook = execute(example, SMALL, then=ASKED)
    [printed] = notebook.cells[-1].outputs
    answers = json.loads(printed.text)
    assert answers["interpreter"] == sys.executable
    assert answers["package"] == dask_gpurt.__file__
    assert answers["workers"]
    assert all(address.startswith("tcp://127.0.0.1:") for address in answers["workers"])
    # Without a GPU, what does not fit lies there.
    assert sum(answers["on_disk_nbytes"]) > 0
