"""The virtual clock: events in the order of their times, and of their making where these are equal.

Covers: :class:`Clock`; :class:`Fluid`, amounts that shrink at rates that change.
Does not cover: who shares what; see :mod:`benchmarks.simulation.network` and :mod:`benchmarks.simulation.worker`.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any

__all__ = ["Clock", "Event", "Flow", "Fluid"]


class Event:
    """Something that will happen.

    Attributes
    ----------
    act
        What is done then; None once it is cancelled.
    """

    __slots__ = ("act",)

    def __init__(self, act: Callable[[], Any]) -> None:
        self.act: Callable[[], Any] | None = act

    def cancel(self) -> None:
        """Let it not happen."""
        self.act = None


class Clock:
    """Time that stands still while anything is computed, and jumps to the next event.

    Attributes
    ----------
    now
        Seconds since the beginning.
    """

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Event]] = []
        self._made = itertools.count()

    def at(self, when: float, act: Callable[[], Any]) -> Event:
        """Let ``act`` be called at a time, or now if that is past."""
        event = Event(act)
        heapq.heappush(self._events, (max(when, self.now), next(self._made), event))
        return event

    def after(self, delay_s: float, act: Callable[[], Any]) -> Event:
        """Let ``act`` be called in a while."""
        return self.at(self.now + delay_s, act)

    def every(self, period_s: float, act: Callable[[], Any], *, first_s: float) -> None:
        """Let ``act`` be called again and again, until it answers False."""

        def tick() -> None:
            if act() is not False:
                self.after(period_s, tick)

        self.after(first_s, tick)

    def step(self) -> bool:
        """Let the next event happen; False if there is none."""
        while self._events:
            when, _, event = heapq.heappop(self._events)
            if event.act is not None:
                self.now = when
                event.act()
                return True
        return False


class Flow:
    """An amount that shrinks, and what is done when it is gone."""

    __slots__ = ("done", "end", "rate", "remaining", "since")

    def __init__(self, amount: float, since: float, done: Callable[[], Any]) -> None:
        self.remaining = amount
        self.rate = 0.0
        #: When ``remaining`` was right.
        self.since = since
        self.done = done
        self.end: Event | None = None


class Fluid:
    """Change the rates of flows.

    Examples
    --------
    >>> clock = Clock()
    >>> fluid = Fluid(clock)
    >>> flow = fluid.begin(10.0, lambda: print("done at", clock.now))
    >>> fluid.set_rate(flow, 1.0)
    >>> _ = clock.at(4.0, lambda: fluid.set_rate(flow, 3.0))
    >>> while clock.step(): pass
    done at 6.0
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def begin(self, amount: float, done: Callable[[], Any]) -> Flow:
        """Make a flow, which has no rate yet."""
        return Flow(amount, self._clock.now, done)

    def set_rate(self, flow: Flow, rate: float) -> None:
        """Let a flow go on at another rate; 0: let it stand."""
        if rate == flow.rate:
            return
        now = self._clock.now
        flow.remaining = max(0.0, flow.remaining - flow.rate * (now - flow.since))
        flow.since = now
        flow.rate = rate
        if flow.end is not None:
            flow.end.cancel()
        flow.end = self._clock.after(flow.remaining / rate, flow.done) if rate else None
