"""The threads that move data by UCX, apart from whatever else the process of the tests does."""

from __future__ import annotations

import threading
import time

__all__ = ["busy_s", "ucx_threads"]


def ucx_threads() -> list[threading.Thread]:
    """Return those of all transports of this process."""
    return [thread for thread in threading.enumerate() if thread.name == "gpurt-ucx"]


def busy_s() -> float:
    """Return the processor time that they have taken, of which there has to be one."""
    threads = ucx_threads()
    assert threads
    return sum(time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) for thread in threads if thread.ident)
