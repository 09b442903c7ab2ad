"""Keeps what is built on NVIDIA's CUDA runtime out of every process that uses the emulated driver; see ../README.md."""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

#: Their tests are those for a real GPU.
REFUSED = frozenset({"cudf", "cupy", "cupyx", "cuml", "kvikio", "pylibcudf", "rmm"})


class _Refuse(MetaPathFinder):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is not used with the emulated CUDA driver", name=name)


sys.meta_path.insert(0, _Refuse())
