"""Examines a running cluster: the scheduler and every worker look at themselves, in their own processes.

What one server cannot tell, because it lacks dask-gpurt, is busy or gone, costs none of the others. Links are measured one at a
time: memory and disk by one worker of each host, devices by one worker of each host at a time, and between workers pair by pair.

Covers: :func:`examine`, :func:`measure`.
Does not cover: what servers do (:mod:`dask_gpurt.doctor.gather`, :mod:`dask_gpurt.doctor.links`, :mod:`dask_gpurt.doctor.peers`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from itertools import zip_longest
from typing import Any, TypeVar

from distributed import Client

import dask_gpurt
from dask_gpurt.config import Settings
from dask_gpurt.doctor import links, peers
from dask_gpurt.doctor.facts import DeviceFacts, Facts, Measure, Missing
from dask_gpurt.doctor.gather import gather
from dask_gpurt.plugins.scheduler import NAME
from dask_gpurt.secret import Secret
from dask_gpurt.terminal import Say
from dask_gpurt.topology import Place

__all__ = ["OTHER_VERSION", "PAIRS_MAX", "SCHEDULER", "examine", "installed_settings", "measure"]

T = TypeVar("T")

#: What the scheduler is called here; workers go by their addresses.
SCHEDULER = "the scheduler"
#: Pairs of workers that are measured: a second each.
PAIRS_MAX = 16
#: For one server to say that it is there, and to answer all the rest.
GREETING_LIMIT_S = 10.0
ANSWER_LIMIT_S = 60.0

#: Cause of a fact that is missing because the server has another version of dask-gpurt.
OTHER_VERSION = "OtherVersion"

#: Runs a function on one server.
Run = Callable[..., Awaitable[Any]]


def installed_settings(client: Client) -> Settings | None:
    """Return the settings of what is installed; None if nothing is."""

    async def ask() -> Settings | None:
        found = await _answer(client.run_on_scheduler(_settings))
        return None if isinstance(found, Missing) else found

    answer: Settings | None = client.sync(ask)
    return answer


def examine(client: Client, settings: Settings, say: Say) -> dict[str, Facts | Missing]:
    """Have all servers look at themselves."""
    found: dict[str, Facts | Missing] = client.sync(_examine, client, settings, say)
    return found


def measure(client: Client, facts: Mapping[str, Facts | Missing], say: Say) -> list[Measure]:
    """Measure the links of all hosts, and between workers."""
    found: list[Measure] = client.sync(_measure, client, facts, say)
    return found


async def _examine(client: Client, settings: Settings, say: Say) -> dict[str, Facts | Missing]:
    workers: list[str] = await client.run_on_scheduler(_workers)
    say(f"The scheduler and {len(workers)} worker{'' if len(workers) == 1 else 's'} look at themselves")
    looks = [_look(client.run_on_scheduler, _look_at_scheduler, settings)]
    looks += [_look(partial(_run, client, worker), _look_at_worker, settings) for worker in workers]
    return dict(zip([SCHEDULER, *workers], await asyncio.gather(*looks), strict=True))


async def _run(client: Client, worker: str, function: Callable[..., Any], *args: Any) -> Any:
    return (await client.run(function, *args, workers=[worker]))[worker]


async def _look(run: Run, look: Callable[..., Any], settings: Settings) -> Facts | Missing:
    version = await _answer(run(_own_version), GREETING_LIMIT_S)
    if isinstance(version, Missing):
        return version
    if version != dask_gpurt.__version__:
        return Missing(f"it has dask-gpurt {version}, and here is {dask_gpurt.__version__}", OTHER_VERSION)
    return await _answer(run(look, settings))


async def _answer(asked: Awaitable[T], limit_s: float = ANSWER_LIMIT_S) -> T | Missing:
    try:
        return await asyncio.wait_for(asked, limit_s)
    except TimeoutError:
        return Missing(f"no answer within {limit_s:g} s", "TimeoutError")
    except Exception as error:  # noqa: BLE001  whatever a server answers: it is told, and the others are heard
        return Missing(str(error) or type(error).__name__, type(error).__name__)


def _workers(dask_scheduler: Any) -> list[str]:
    return list(dask_scheduler.workers)


def _settings(dask_scheduler: Any) -> Settings | None:
    plugin = dask_scheduler.plugins.get(NAME)
    return None if plugin is None else plugin.settings


def _own_version() -> str:
    return dask_gpurt.__version__


async def _look_at_scheduler(settings: Settings, dask_scheduler: Any) -> Facts:
    return await asyncio.to_thread(gather, "scheduler", settings, dask_scheduler)


async def _look_at_worker(settings: Settings, dask_worker: Any) -> Facts:
    return await asyncio.to_thread(gather, "worker", settings, dask_worker)


async def _measure(client: Client, facts: Mapping[str, Facts | Missing], say: Say) -> list[Measure]:
    workers = {name: each for name, each in facts.items() if isinstance(each, Facts) and each.role == "worker"}
    hosts: dict[str, list[str]] = {}
    for name, each in workers.items():
        hosts.setdefault(each.host, []).append(name)
    say("Memory and disk of each host")
    firsts = {of_host[0]: (of_host[0], workers[of_host[0]].folder) for of_host in hosts.values()}
    measures = await _each(client, links.memory_and_disk, firsts)
    for number, names in enumerate(zip_longest(*hosts.values())):
        having = {name: devices for name in names if name is not None and (devices := _first_device(workers[name]))}
        if having:
            say(f"Devices, worker {number + 1} of each host")
            measures += await _each(client, links.to_devices, {name: (name, found) for name, found in having.items()})
    return measures + await _between(client, {name: each.host for name, each in workers.items()}, say)


def _first_device(facts: Facts) -> tuple[DeviceFacts, ...]:
    # What the tiers use; dask-cuda shows each worker all of them, in another order.
    return () if isinstance(facts.cuda, Missing) else facts.cuda.devices[:1]


async def _each(client: Client, function: Callable[..., Any], args: Mapping[str, tuple[Any, ...]]) -> list[Measure]:
    """Call ``function`` on these workers at a time, in a thread."""
    runs = [_answer(_run(client, worker, _in_thread, function, *args_)) for worker, args_ in args.items()]
    measures: list[Measure] = []
    for worker, found in zip(args, await asyncio.gather(*runs), strict=True):
        measures += [Measure(Place(worker), Place(worker), "", found)] if isinstance(found, Missing) else found
    return measures


async def _in_thread(function: Callable[..., T], *args: Any) -> T:
    return await asyncio.to_thread(function, *args)


async def _between(client: Client, hosts: Mapping[str, str], say: Say) -> list[Measure]:
    pairs = peers.ring(hosts, PAIRS_MAX)
    taking_part = sorted({worker for pair in pairs for worker in pair})
    measures: list[Measure] = []
    secret = Secret.new()
    try:
        await asyncio.gather(*(_answer(_run(client, worker, peers.open_peer, secret)) for worker in taking_part))
        for number, (source, target) in enumerate(pairs):
            say(f"Between workers, {number + 1} of {len(pairs)}")
            found = await _answer(_run(client, source, peers.measure_to, target))
            if isinstance(found, Missing):
                measures.append(Measure(Place(source), Place(target), "Dask's comms", found))
            else:
                measures += found
    finally:
        await asyncio.gather(*(_answer(_run(client, worker, peers.close_peer)) for worker in taking_part))
    return measures
