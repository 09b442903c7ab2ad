"""dask-gpurt: placement, spilling and shuffling for Dask clusters, with and without GPUs.

>>> import dask_gpurt
>>> dask_gpurt.install(client)  # doctest: +SKIP
dask-gpurt 0.1.0 on 2 workers
  memory     installed on all workers
  shuffle    installed on all workers
  placement  installed on the scheduler
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

from dask_gpurt.logs import ToDask

if TYPE_CHECKING:
    from dask_gpurt.config import Settings
    from dask_gpurt.errors import ConfigError, GpurtError, InstallError
    from dask_gpurt.explainer import explain
    from dask_gpurt.explanation import Explanation
    from dask_gpurt.installation import Installation
    from dask_gpurt.installer import install, status, uninstall
    from dask_gpurt.observe.journal import ShuffleRun
    from dask_gpurt.observe.shuffles import Shuffles
    from dask_gpurt.reporter import Report, report, shuffles

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "Explanation",
    "GpurtError",
    "InstallError",
    "Installation",
    "Report",
    "Settings",
    "ShuffleRun",
    "Shuffles",
    "__version__",
    "dask_setup",
    "explain",
    "install",
    "report",
    "shuffles",
    "status",
    "uninstall",
]

logging.getLogger(__name__).addHandler(ToDask())

# Loaded on first use: `import dask_gpurt` alone must not import distributed.
_HOMES = {
    "ConfigError": "errors",
    "Explanation": "explanation",
    "GpurtError": "errors",
    "InstallError": "errors",
    "Installation": "installation",
    "Report": "reporter",
    "Settings": "config",
    "ShuffleRun": "observe.journal",
    "Shuffles": "observe.shuffles",
    "explain": "explainer",
    "install": "installer",
    "report": "reporter",
    "shuffles": "reporter",
    "status": "installer",
    "uninstall": "installer",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Not kept in this module's globals: `dask_gpurt.installer` the function must win over the submodule of that name.
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


async def dask_setup(server: Any) -> None:
    """Install on a scheduler or worker that was started with ``--preload dask_gpurt``."""
    from dask_gpurt.preload import set_up_server

    await set_up_server(server)
