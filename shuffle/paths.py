"""Which path a message takes to a peer: UCX, unless Dask's comms were measured to be clearly quicker.

Covers: :class:`PathChooser`, one for a peer. Pure: given the same messages and observations it chooses the same.
Does not cover: a path that fails, which is not used again (:mod:`dask_gpurt.shuffle.carrier`); what a path costs
(:mod:`dask_gpurt.topology`).

Theory of operation
    One path is in use, the other at rest. A message of :data:`~dask_gpurt.topology.LARGE_NBYTES` or more is a *trial* of
    the one at rest when enough messages went by since the last one, and only where that can pay: where the path at
    rest at its :data:`BEST` would be quicker than the one in use is found to be. UCX within a host is so quick that
    Dask's comms are never tried.

    The paths change places when the one at rest is quicker by :data:`MARGIN` for a message of the present size; one
    trial is enough for that, since nothing is measured quicker than it can be. After each trial that changes nothing,
    twice as many messages go by before the next one. So trials of a path that stays worse cost next to nothing, and one
    that has become better is found out in the end.
"""

from __future__ import annotations

from dask_gpurt.topology import LARGE_NBYTES, Link, Rate

__all__ = ["BEST", "COMM", "MARGIN", "TRIAL_MESSAGES", "TRIAL_MESSAGES_MAX", "TRIAL_NBYTES_MAX", "UCX", "PathChooser"]

#: The two paths.
UCX, COMM = "ucx", "comm"

#: A path is left for another that is quicker by this factor: less is within the error, and every change costs.
MARGIN = 1.3
#: What each path can be expected to do in the best case. Dask's comms copy through sockets on the event loop.
BEST = {UCX: Rate(latency_s=0.0, bandwidth=12e9), COMM: Rate(latency_s=0.0005, bandwidth=2.5e9)}
#: Messages on the path in use before the first trial of the other one, and before the last ones.
TRIAL_MESSAGES, TRIAL_MESSAGES_MAX = 8, 4096
#: A larger message is no trial: it would wait long where the path is bad.
TRIAL_NBYTES_MAX = 2**25


class PathChooser:
    """Chooses between UCX and Dask's comms for the messages to one peer.

    Parameters
    ----------
    links
        Path to its link, whose prices are what the choice is made by.
    """

    def __init__(self, links: dict[str, Link]) -> None:
        self.links = links
        #: The path in use.
        self.path = UCX
        self._patience = self._left = TRIAL_MESSAGES

    def __repr__(self) -> str:
        return f"<PathChooser {self.path} in use, trial after {self._left} messages, {self.links}>"

    def choose(self, nbytes: int) -> str:
        """Return the path for the next message, of ``nbytes``."""
        self._left -= 1
        used, rest = self.links[self.path], self.links[other := COMM if self.path == UCX else UCX]
        if nbytes < LARGE_NBYTES or not used.transfers:
            return self.path
        price_s = used.price(nbytes)
        if rest.transfers and rest.price(nbytes) * MARGIN < price_s:
            self.path = other
            self._patience = self._left = TRIAL_MESSAGES
            return other
        if self._left <= 0 and nbytes <= TRIAL_NBYTES_MAX and BEST[other].price(nbytes) * MARGIN < price_s:
            self._patience = self._left = min(2 * self._patience, TRIAL_MESSAGES_MAX)
            return other
        return self.path
