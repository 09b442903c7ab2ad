"""What a workload costs a cluster: time, bytes between workers, bytes written, peak memory.

Covers: one instrument, :class:`Meter`, that is put on every worker of either side, and :func:`measure`, which reads it
around a workload.
Does not cover: traffic by other means than Dask's comms and the shuffle's UCX; memory of a device.
See also: :mod:`dask_gpurt.demo.runner`, which alternates the sides.

Theory of operation
-------------------
*Bytes between workers.* ``Comm.write`` returns the bytes it sent, so the meter wraps it and adds up by connection, a
pair (own endpoint, endpoint of the peer). Only the side that opened a connection sees a known address at the other
end; the side that accepted it sees an ephemeral port. The connections of all workers together tell whose port that
is: :func:`traffic` joins them, and what is left (scheduler, client, nanny) is not counted. Both directions are summed.
What a worker sends to itself over a socket, as stock's p2p shuffle does, is kept apart: it costs time, but crosses no
link. Bytes are those on the wire, after compression if there is any. What the shuffle sends by UCX, always to another
worker, is added: the meter wraps that transport's ``send`` too.

*Bytes written.* The ``wchar`` counter of ``/proc/self/io``: bytes handed to ``write`` and its kin. Sockets use
``send``, which is not part of it, so for a workload that writes no files itself these are the bytes spilled. Unlike
``write_bytes`` of the same file it also counts a tmpfs, and pages that are overwritten before the kernel got around to
them; unlike a counter inside a spill buffer it sees every path to the disk alike (spilled keys, shards of a shuffle).
A file that is written through ``mmap`` is not seen.

*Peak memory.* The kernel's own high-water mark of the resident set (``VmHWM``), set back at the start through
``/proc/self/clear_refs``; None where the kernel refuses that. No sampling, so that no peak is missed.

The meter is per process: workers that share a process (``processes=False``) would each report the whole of it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distributed import Client, Worker, WorkerPlugin

from dask_gpurt import seams
from dask_gpurt.shuffle.transport.ucx import UCXTransport

__all__ = ["Meter", "Reading", "Usage", "measure", "traffic"]

Endpoint = str
#: Own endpoint, endpoint of the peer.
Connection = tuple[Endpoint, Endpoint]


@dataclass(frozen=True)
class Reading:
    """What the meter of one worker says."""

    pid: int
    #: Connection -> bytes sent on it since the meter was installed.
    sent_nbytes: Mapping[Connection, int]
    #: Bytes sent to other workers by the shuffle's UCX since the meter was installed.
    ucx_nbytes: int
    #: Bytes handed to ``write`` since the process started.
    written_nbytes: int
    #: Processor time of the process.
    cpu_s: float
    #: Highest resident set since the last reset; None: not known.
    peak_nbytes: int | None


@dataclass
class Usage:
    """What a workload cost. All fields are filled in when the ``with`` block of :func:`measure` ends."""

    wall_s: float = 0.0
    #: Processor time of all workers.
    cpu_s: float = 0.0
    #: Bytes that went from one worker to another.
    moved_nbytes: int = 0
    #: Bytes that workers sent to themselves over a socket.
    looped_nbytes: int = 0
    #: Bytes that the workers wrote to files.
    written_nbytes: int = 0
    #: Sum of the workers' peaks, which need not have come at the same moment; None: not known.
    peak_nbytes: int | None = None
    #: Workers that were there at the start and not at the end; their share is missing in the figures.
    lost_workers: int = 0


class Meter(WorkerPlugin):
    """A worker plugin that counts what the process sends.

    Installing costs about a microsecond a message. Removing it puts the comms back as they were.
    """

    name = "gpurt-meter"

    def setup(self, worker: Worker) -> None:  # noqa: ARG002
        """Wrap what sends."""
        self._sent_nbytes: dict[Connection, int] = {}
        self._ucx_nbytes = 0
        self._originals: list[tuple[Any, str, Any]] = []
        for cls in seams.comm_classes():
            self._replace(cls, "write", _counting(cls.write, self._sent_nbytes))
        self._replace(UCXTransport, "send", self._counting_ucx(UCXTransport.send))

    def _replace(self, cls: Any, name: str, function: Any) -> None:
        self._originals.append((cls, name, getattr(cls, name)))
        setattr(cls, name, function)

    def _counting_ucx(self, send: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(send)
        async def counting(transport: Any, peer: bytes, tag: int, buffers: Sequence[Any]) -> None:
            await send(transport, peer, tag, buffers)
            self._ucx_nbytes += sum(buffer.nbytes for buffer in buffers)

        return counting

    def teardown(self, worker: Worker) -> None:  # noqa: ARG002
        """Put all back as it was."""
        for cls, name, function in self._originals:
            setattr(cls, name, function)

    def read(self) -> Reading:
        """Read all counters of this process."""
        times = os.times()
        return Reading(
            pid=os.getpid(),
            sent_nbytes=dict(self._sent_nbytes),
            ucx_nbytes=self._ucx_nbytes,
            written_nbytes=_proc_number("/proc/self/io", "wchar") or 0,
            cpu_s=times.user + times.system,
            peak_nbytes=_peak_nbytes(),
        )


def _counting(write: Callable[..., Any], sent_nbytes: dict[Connection, int]) -> Callable[..., Any]:
    @functools.wraps(write)
    async def counting(comm: Any, *args: Any, **kwargs: Any) -> Any:
        nbytes = await write(comm, *args, **kwargs)
        connection = (comm.local_address, comm.peer_address)
        sent_nbytes[connection] = sent_nbytes.get(connection, 0) + nbytes
        return nbytes

    return counting


def traffic(sent: Mapping[Endpoint, Mapping[Connection, int]]) -> tuple[int, int]:
    """Add up what workers sent to each other, and what they sent to themselves.

    Parameters
    ----------
    sent
        Address of a worker -> connection -> bytes that the worker sent on it.

    Returns
    -------
    tuple of int
        Bytes between different workers, and bytes from workers to themselves.

    Examples
    --------
    ``a`` asks ``b`` for 1,000 bytes through its port 9, and writes a line to the scheduler ``s``:

    >>> traffic({"a": {("a:9", "b"): 10, ("a:8", "s"): 80}, "b": {("b", "a:9"): 1000}})
    (1010, 0)
    """
    owner = {address: address for address in sent}
    for worker, connections in sent.items():
        for own, _ in connections:
            owner.setdefault(own, worker)
    moved = looped = 0
    for worker, connections in sent.items():
        for (_, peer), nbytes in connections.items():
            receiver = owner.get(peer)
            if receiver == worker:
                looped += nbytes
            elif receiver is not None:
                moved += nbytes
    return moved, looped


@contextlib.contextmanager
def measure(client: Client) -> Iterator[Usage]:
    """Measure what happens on the cluster of ``client`` inside the ``with`` block.

    Examples
    --------
    >>> with measure(client) as usage:  # doctest: +SKIP
    ...     frame.compute()
    >>> usage.moved_nbytes  # doctest: +SKIP
    123456
    """
    client.register_plugin(Meter())
    before: dict[str, Reading] = client.run(_start)
    usage = Usage()
    started = time.perf_counter()
    try:
        yield usage
    finally:
        usage.wall_s = time.perf_counter() - started
    # Not part of the finally: where the workload failed, its error is the news, and the cluster may not answer.
    after: dict[str, Reading] = client.run(_read)
    _subtract(usage, before, after)


def _subtract(usage: Usage, before: Mapping[str, Reading], after: Mapping[str, Reading]) -> None:
    stayed = [address for address, reading in before.items() if address in after and after[address].pid == reading.pid]
    usage.lost_workers = len(before) - len(stayed)
    sent = {}
    peaks = []
    ucx_nbytes = 0
    for address in stayed:
        start, end = before[address], after[address]
        sent[address] = {
            connection: nbytes - start.sent_nbytes.get(connection, 0) for connection, nbytes in end.sent_nbytes.items()
        }
        usage.written_nbytes += end.written_nbytes - start.written_nbytes
        ucx_nbytes += end.ucx_nbytes - start.ucx_nbytes
        usage.cpu_s += end.cpu_s - start.cpu_s
        peaks.append(end.peak_nbytes)
    moved_nbytes, usage.looped_nbytes = traffic(sent)
    usage.moved_nbytes = moved_nbytes + ucx_nbytes
    known = [peak for peak in peaks if peak is not None]
    usage.peak_nbytes = sum(known) if known and len(known) == len(peaks) else None


def _meter(worker: Worker) -> Meter:
    meter = worker.plugins[Meter.name]
    assert isinstance(meter, Meter)
    return meter


def _start(dask_worker: Worker) -> Reading:
    _reset_peak()
    return _meter(dask_worker).read()


def _read(dask_worker: Worker) -> Reading:
    return _meter(dask_worker).read()


def _reset_peak() -> None:
    """Set the high-water mark back to what is resident now; see proc_pid_clear_refs(5)."""
    with contextlib.suppress(OSError), open("/proc/self/clear_refs", "w", encoding="ascii") as file:
        file.write("5")


def _peak_nbytes() -> int | None:
    if not os.access("/proc/self/clear_refs", os.W_OK):
        # Without a reset the mark would be that of an earlier workload.
        return None
    kib = _proc_number("/proc/self/status", "VmHWM")
    return None if kib is None else kib * 1024


def _proc_number(path: str, key: str) -> int | None:
    """Read the number after ``key:`` in a file of ``/proc``; None where there is no such file or line."""
    try:
        with open(path, encoding="ascii") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name == key:
                    return int(value.split()[0])
    except FileNotFoundError:
        pass
    return None
