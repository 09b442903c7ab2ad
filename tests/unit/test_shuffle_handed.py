"""How long a run keeps shards that it has handed out."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from dask_gpurt.memory.store import Buffer
from dask_gpurt.shuffle.dataframe import FrameRun


class FakeShelf:
    async def flush(self) -> None:
        pass

    async def take(self, partition: int) -> list[Buffer]:
        return [b"%d" % partition]


@pytest.mark.parametrize(
    ("state", "kept"),
    [(None, False), ("memory", False), ("released", False), ("executing", True), ("ready", True), ("error", True)],
)
def test_shards_are_kept_until_their_task_has_its_result(state: str | None, kept: bool) -> None:
    tasks: dict[str, Any] = {} if state is None else {"first": SimpleNamespace(state=state)}
    run = object.__new__(FrameRun)
    vars(run).update(
        closed=False,
        _exception=None,
        _handed={},
        _gone=set(),
        _shelf=FakeShelf(),
        _worker=SimpleNamespace(state=SimpleNamespace(tasks=tasks)),
    )

    async def main() -> None:
        assert await run._hand_out(0, "first") == [b"0"]
        assert await run._hand_out(1, "second") == [b"1"]

    asyncio.run(main())
    assert (0 in run._handed) is kept
    assert (0 in run._gone) is not kept
