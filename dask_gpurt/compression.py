"""Whether a message is compressed, and how: where it pays on its link, for data of its kind.

Covers: :class:`LinkCompression`, one for each peer and path: when to sample, and which codec to use. Pure.
Does not cover: the codecs and the form on the wire (:mod:`dask_gpurt.codecs`); the bandwidth of a link
(:mod:`dask_gpurt.topology`).

Theory of operation
    *Model.* A byte that is sent as it is costs 1 / bandwidth; one that is compressed costs 1 / compression speed +
    ratio / bandwidth + 1 / decompression speed. That is as though nothing overlapped. In truth two messages are under way
    to a peer, and the slowest stage alone counts; but the processor time of the others is taken from the tasks, so
    it is charged in full. A sample tells the speed of a core; a message that was compressed, what is left of that where
    others want the cores, which makes links slow, too.

    *Kinds.* Data of one kind compress alike: the messages of one run. For each kind there is what codecs made of
    the last sample, at most 64 KiB from all over a message, and of the last message that was compressed.

    *Samples* are taken of links that are slower than :data:`FAST_BANDWIDTH`, and known by :data:`KNOWN_TRANSFERS`
    transfers: above that no codec pays for data that is not next to empty, and what is within a host is far above. (A peer on the
    same host is left alone however slow it seems to be: :mod:`dask_gpurt.shuffle.ways`.) They are taken of the first message of a kind, then of every :data:`SAMPLE_MESSAGES`-th, and only while all of them together
    take no more than :data:`SAMPLE_SHARE` of the time that the link was busy.

    *Hysteresis.* Compression begins where it saves two fifths, ends where it saves less than one, and changes to another
    codec that saves a tenth more. So an estimate that wavers about the border changes nothing. And it takes that much to
    be worth it: a link carries while the tasks compute, where a codec computes in their place.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field

from dask_gpurt.topology import Link

__all__ = [
    "FAST_BANDWIDTH",
    "KINDS_MAX",
    "KNOWN_TRANSFERS",
    "SAMPLE_MESSAGES",
    "SAMPLE_SHARE",
    "Figures",
    "LinkCompression",
]

#: Bytes per second from which on a link is left alone.
FAST_BANDWIDTH = 500e6
#: Large transfers after which the bandwidth of a link is taken for known.
KNOWN_TRANSFERS = 3
#: Messages of a kind from one sample to the next.
SAMPLE_MESSAGES = 32
#: Share of a link's busy time that samples may take.
SAMPLE_SHARE = 0.01
#: Processor seconds that the first sample is expected to take.
SAMPLE_S = 0.001
#: Kinds that are remembered for each link: more than a worker has runs at a time.
KINDS_MAX = 32

_BEGIN, _END, _CHANGE = 0.6, 0.8, 0.9


@dataclass(frozen=True)
class Figures:
    """What a codec makes of data.

    Parameters
    ----------
    ratio
        Compressed size over raw size.
    compress_speed, decompress_speed
        Raw bytes per second of one thread.
    """

    ratio: float
    compress_speed: float
    decompress_speed: float

    def byte_s(self, bandwidth: float) -> float:
        """Seconds for each byte on a link of ``bandwidth``.

        Examples
        --------
        >>> Figures(ratio=0.5, compress_speed=100.0, decompress_speed=200.0).byte_s(50.0)
        0.025
        """
        return 1 / self.compress_speed + self.ratio / bandwidth + 1 / self.decompress_speed


@dataclass
class _Kind:
    #: Codec to what it made of the last sample.
    figures: dict[str, Figures] = field(default_factory=dict)
    #: Messages since that.
    messages: int = SAMPLE_MESSAGES
    #: What is used now.
    codec: str | None = None


class LinkCompression:
    """Decides about the messages on one link.

    Parameters
    ----------
    link
        The link.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._kinds: OrderedDict[str, _Kind] = OrderedDict()
        self._busy_s = 0.0
        self._sampled_s = 0.0
        self._sample_s = SAMPLE_S

    def __repr__(self) -> str:
        codecs = {name: kind.codec for name, kind in self._kinds.items()}
        return f"<LinkCompression {codecs}, {self._sampled_s:.3f} s of {self._busy_s:.3f} s sampling>"

    @property
    def slow(self) -> bool:
        """Whether the link is known, and slow enough for compression to be thought of."""
        return self._link.transfers >= KNOWN_TRANSFERS and self._link.rate.bandwidth < FAST_BANDWIDTH

    def carried(self, elapsed_s: float) -> None:
        """Note that the link was busy for so long."""
        self._busy_s += elapsed_s

    def wants_sample(self, kind: str, nbytes: int) -> bool:
        """Say whether the next message of ``kind``, which has ``nbytes``, is to be sampled. Call it once a message."""
        known = self._kind(kind)
        known.messages += 1
        if not self.slow or known.messages < SAMPLE_MESSAGES:
            return False
        if self._sampled_s + self._sample_s > SAMPLE_SHARE * (self._busy_s + self._link.price(nbytes)):
            return False
        # Not asked for again while it is being taken.
        known.messages = 0
        return True

    def sampled(self, kind: str, figures: Mapping[str, Figures], elapsed_s: float) -> None:
        """Learn from a sample, which has taken ``elapsed_s``."""
        self._kind(kind).figures.update(figures)
        self._sample_s = elapsed_s
        self._sampled_s += elapsed_s

    def compressed(self, kind: str, codec: str, ratio: float, speed: float) -> None:
        """Learn from a message that was compressed at ``speed`` bytes per second."""
        figures = self._kind(kind).figures
        if codec in figures:
            figures[codec] = Figures(ratio, speed, figures[codec].decompress_speed)

    def codec(self, kind: str) -> str | None:
        """Return the codec for the next message of ``kind``; None: it goes as it is."""
        known = self._kind(kind)
        if not self.slow or not known.figures:
            known.codec = None
            return None
        bandwidth = self._link.rate.bandwidth
        costs_s = {name: figures.byte_s(bandwidth) for name, figures in known.figures.items()}
        best = min(costs_s, key=lambda name: (costs_s[name], name))
        plain_s = 1 / bandwidth
        if known.codec is None or costs_s[known.codec] > _END * plain_s:
            known.codec = best if costs_s[best] < _BEGIN * plain_s else None
        elif costs_s[best] < _CHANGE * costs_s[known.codec]:
            known.codec = best
        return known.codec

    def _kind(self, kind: str) -> _Kind:
        known = self._kinds.setdefault(kind, _Kind())
        self._kinds.move_to_end(kind)
        while len(self._kinds) > KINDS_MAX:
            self._kinds.popitem(last=False)
        return known
