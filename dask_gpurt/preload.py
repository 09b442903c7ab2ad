"""Installation by preload: ``--preload dask_gpurt``, or the environment variables that do the same.

A scheduler that preloads dask_gpurt brings it to all its workers; nothing else is needed. A worker that preloads it
has its own parts (memory) even where the scheduler does not.
Errors (a bad configuration, say) are logged by Dask, which then goes on without the preload.
"""

from __future__ import annotations

from typing import Any

__all__ = ["set_up_server"]


async def set_up_server(server: Any) -> None:
    """Install on the scheduler or worker that is starting."""
    from distributed.protocol.pickle import dumps
    from distributed.scheduler import Scheduler
    from distributed.worker import Worker

    from dask_gpurt.config import Settings
    from dask_gpurt.plugins.scheduler import NAME, GpurtSchedulerPlugin
    from dask_gpurt.plugins.worker import GpurtWorkerPlugin
    from dask_gpurt.secret import Secret

    settings = Settings.load()
    if isinstance(server, Scheduler):
        # There are no workers yet: those that come are given the plugin as they join.
        server.worker_plugins[NAME] = dumps(GpurtWorkerPlugin(settings, Secret.new()))
        await server.register_scheduler_plugin(GpurtSchedulerPlugin(settings), name=NAME, idempotent=True)
    elif isinstance(server, Worker):
        await server.plugin_add(GpurtWorkerPlugin(settings, report=False), name=NAME)
