"""``report`` and ``shuffles``: what happened on a cluster, asked from a client.

Covers: beginning and ending a recording, writing the file; asking for the runs of shuffles.
Does not cover: what is recorded (:mod:`dask_gpurt.observe.recording`), and how it looks (:mod:`dask_gpurt.observe.document`); the same on
the command line (:mod:`dask_gpurt.cli`).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import time
import uuid
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from dask_gpurt import webpage
from dask_gpurt.errors import GpurtError, InstallError
from dask_gpurt.observe.journal import join
from dask_gpurt.observe.shuffles import Shuffles
from dask_gpurt.terminal import progress

if TYPE_CHECKING:
    from distributed import Client

    from dask_gpurt.observe.recording import Recording

__all__ = ["Report", "record", "report", "shuffles"]


def report(filename: str | os.PathLike[str] = "dask-gpurt-report.html", *, client: Client | None = None) -> Report:
    """Write an HTML file of what happens inside a ``with`` block.

    What was moved by which path, who sent to whom, bytes by tier over time with their limits, runs of shuffles with their phases,
    reasons of the placement, stalls, event loops; of the whole cluster, whoever causes it. The file opens without a network.

    It is written if the block fails, too. Beside Dask's own ``performance_report``, which shows tasks.

    Parameters
    ----------
    filename
        The file; one that is there is replaced. Its folder has to exist.
    client
        A client of a cluster on which dask-gpurt is installed; None: the current one. With an asynchronous client it is
        ``async with``.

    Raises
    ------
    InstallError
        At the beginning: dask-gpurt is not installed on the cluster.
    GpurtError
        At the beginning: Bokeh is not installed here, or too many reports are being recorded. At the end: dask-gpurt was
        uninstalled or installed anew in the block.
    FileNotFoundError
        At the beginning: there is no such folder.

    Examples
    --------
    >>> with dask_gpurt.report("run.html"):  # doctest: +SKIP
    ...     x.compute()
    """
    return Report(filename, client)


def shuffles(client: Client) -> Shuffles:
    """Say which shuffles run on the cluster of ``client``, and which ran lately.

    Each worker remembers the 32 runs that ended last. Shuffles that Dask's own data plane did are not among them.

    Parameters
    ----------
    client
        A client of the cluster. For an asynchronous client the answer is to be awaited.

    Returns
    -------
    Shuffles
        ``runs``, the latest first: phases, bytes by path, seconds that were waited for room. It prints, and shows itself in a
        notebook, as a table.

    Raises
    ------
    InstallError
        If dask-gpurt is not installed on the cluster.
    """
    answer: Shuffles = client.sync(_shuffles, client)
    return answer


async def _shuffles(client: Client) -> Shuffles:
    journals, names = await _on_scheduler(client, _tell)
    return Shuffles(tuple(join({names.get(address, address): journal for address, journal in journals.items()})))


def record(client: Client, filename: str | os.PathLike[str], seconds: float) -> None:
    """Write a report of the next seconds, or of those until an interrupt; says on a terminal how long it has been."""
    with report(filename, client=client), progress() as say, contextlib.suppress(KeyboardInterrupt):
        end_s = time.monotonic() + seconds
        while (left_s := end_s - time.monotonic()) > 0:
            say(f"Recording: {seconds - left_s:.0f} of {seconds:g} s, Ctrl-C ends it")
            time.sleep(min(1.0, left_s))


class Report:
    """A report that is being recorded; see :func:`report`."""

    def __init__(self, filename: str | os.PathLike[str], client: Client | None) -> None:
        self.path = Path(filename)
        self._client = client
        self._name = uuid.uuid4().hex

    def __repr__(self) -> str:
        return f"<Report {str(self.path)!r}>"

    def _prepare(self) -> Client:
        if importlib.util.find_spec("bokeh") is None:
            raise GpurtError("a report needs Bokeh, which is not installed here: pip install bokeh")
        folder = self.path.absolute().parent
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder} to write {self.path.name} to")
        if self._client is None:
            from distributed import get_client

            self._client = get_client()
        return self._client

    def __enter__(self) -> Self:
        client = self._prepare()
        if client.asynchronous:
            raise TypeError("with an asynchronous client: async with dask_gpurt.report(...)")
        client.sync(_on_scheduler, client, _begin, client.id, self._name)
        return self

    async def __aenter__(self) -> Self:
        client = self._prepare()
        await _on_scheduler(client, _begin, client.id, self._name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        client = self._client
        assert client is not None
        with _noted_on(error):
            self._write(client.sync(_on_scheduler, client, _end, client.id, self._name))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        client = self._client
        assert client is not None
        with _noted_on(error):
            recording = await _on_scheduler(client, _end, client.id, self._name)
            await asyncio.to_thread(self._write, recording)

    def _write(self, recording: Recording | None) -> None:
        if recording is None:
            raise GpurtError("there is no report: dask-gpurt was installed anew while it was recorded")
        from dask_gpurt.observe.document import render

        webpage.write(self.path, render(recording, self.path.stem))


@contextlib.contextmanager
def _noted_on(error: BaseException | None) -> Iterator[None]:
    """Let pass what is raised inside; but where the block has failed, that is the news, and this a note on it."""
    try:
        yield
    except Exception as ours:
        if error is None:
            raise
        error.add_note(f"There is no report: {ours!r}")


async def _on_scheduler(client: Client, function: Callable[..., Coroutine[Any, Any, Any]], *args: Any) -> Any:
    """Run a function there, with the observer of what is installed."""
    try:
        return await client.run_on_scheduler(_observed, function, *args)
    except ModuleNotFoundError as error:
        if error.name and error.name.partition(".")[0] == "dask_gpurt":
            raise InstallError("the scheduler does not have dask-gpurt") from error
        raise


async def _observed(function: Callable[..., Coroutine[Any, Any, Any]], *args: Any, dask_scheduler: Any) -> Any:
    from dask_gpurt.plugins.scheduler import NAME

    observer = getattr(dask_scheduler.plugins.get(NAME), "observer", None)
    if observer is None:
        raise InstallError("dask-gpurt is not installed on this cluster: dask_gpurt.install(client) does it")
    return await function(observer, *args)


async def _begin(observer: Any, client: str, name: str) -> None:
    await observer.recorders.begin(client, name)


async def _end(observer: Any, client: str, name: str) -> Recording | None:
    recording: Recording | None = await observer.recorders.end(client, name)
    return recording


async def _tell(observer: Any) -> Any:
    return await observer.journals(), observer.names()
