"""Where messages of dask-gpurt go: where Dask's own go, and nowhere else.

Covers: :class:`ToDask`, the one handler of the logger ``dask_gpurt``.
Does not cover: what is logged. Most of it is below the level of warnings, and not shown unless Dask's configuration
(``logging: {dask_gpurt: info}``) or :mod:`logging` says so.

Dask keeps the latest messages of a scheduler and of a worker for ``client.get_worker_logs()`` and its dashboard, and writes to the standard
error of the process, by handlers on its own loggers, which other libraries' messages do not reach. So they are handed to these handlers, with
the level that Dask's loggers have. Where Dask has none, because it was not imported, nothing is shown; where the application
has its own (on the root logger, or on ``dask_gpurt``), Dask's do not show it a second time.
"""

from __future__ import annotations

import logging

__all__ = ["ToDask"]

#: Dask's loggers with handlers: what a scheduler and a worker remember, and what a process shows.
_DASK = ("distributed.scheduler", "distributed.worker", "distributed")


class ToDask(logging.Handler):
    """Hands messages to the handlers of Dask."""

    def emit(self, record: logging.LogRecord) -> None:
        """Hand on one message."""
        own = [
            other for name in ("dask_gpurt", None) for other in logging.getLogger(name).handlers if other is not self
        ]
        loggers = [logging.getLogger(name) for name in _DASK]
        handlers = [handler for each in loggers if each.isEnabledFor(record.levelno) for handler in each.handlers]
        for handler in dict.fromkeys(handlers):
            shown = own and isinstance(handler, logging.StreamHandler)
            if not shown and record.levelno >= handler.level:
                handler.handle(record)
