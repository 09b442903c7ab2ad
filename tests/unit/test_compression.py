"""When to compress: the model, its borders, and what samples may cost."""

from __future__ import annotations

import pytest

from dask_gpurt.compression import (
    FAST_BANDWIDTH,
    KINDS_MAX,
    KNOWN_TRANSFERS,
    SAMPLE_MESSAGES,
    SAMPLE_SHARE,
    Figures,
    LinkCompression,
)
from dask_gpurt.topology import Link

MESSAGE = 8 * 2**20
LZ4 = Figures(ratio=0.4, compress_speed=800e6, decompress_speed=3e9)
ZSTD = Figures(ratio=0.2, compress_speed=400e6, decompress_speed=1.2e9)
RANDOM = {"lz4": Figures(1.0, 4e9, 20e9), "zstd": Figures(1.0, 5e9, 20e9)}
NUMBERS = {"lz4": LZ4, "zstd": ZSTD}


def on(bandwidth: float, transfers: int = 20) -> LinkCompression:
    link = Link()
    for _ in range(transfers):
        link.observe(MESSAGE, MESSAGE / bandwidth)
    compression = LinkCompression(link)
    compression.carried(transfers * MESSAGE / bandwidth)
    return compression


@pytest.mark.parametrize(
    ("bandwidth", "codec"), [(5e6, "zstd"), (30e6, "zstd"), (120e6, "lz4"), (160e6, None), (450e6, None), (2e9, None)]
)
def test_the_slower_the_link_the_more_is_done(bandwidth: float, codec: str | None) -> None:
    compression = on(bandwidth)
    compression.sampled("run", NUMBERS, 0.001)
    assert compression.codec("run") == codec


@pytest.mark.parametrize("bandwidth", [1e6, 30e6, 300e6, 10e9])
def test_what_does_not_become_smaller_goes_as_it_is(bandwidth: float) -> None:
    compression = on(bandwidth)
    compression.sampled("run", RANDOM, 0.001)
    assert compression.codec("run") is None


@pytest.mark.parametrize("bandwidth", [FAST_BANDWIDTH * 1.1, 9e9])
def test_a_fast_link_is_neither_sampled_nor_compressed(bandwidth: float) -> None:
    compression = on(bandwidth)
    assert not any(compression.wants_sample("run", MESSAGE) for _ in range(1000))
    compression.sampled("run", {"lz4": Figures(0.01, 20e9, 20e9)}, 0.001)
    assert compression.codec("run") is None


def test_a_link_that_is_not_known_is_left_alone() -> None:
    compression = on(1e6, transfers=KNOWN_TRANSFERS - 1)
    assert not compression.wants_sample("run", MESSAGE)
    assert compression.codec("run") is None


def test_kinds_of_data_are_told_apart() -> None:
    compression = on(30e6)
    compression.sampled("numbers", NUMBERS, 0.001)
    compression.sampled("random", RANDOM, 0.001)
    assert [compression.codec(kind) for kind in ("numbers", "random", "new")] == ["zstd", None, None]


def test_about_the_border_nothing_changes() -> None:
    compression = on(100e6)
    # Saves 30 %: too little to begin with, too much to end with.
    middling = {"lz4": Figures(0.55, 1e9, 2e9)}
    assert 0.65 < 100e6 * middling["lz4"].byte_s(100e6) < 0.75
    compression.sampled("run", middling, 0.001)
    assert compression.codec("run") is None
    compression.sampled("run", {"lz4": Figures(0.3, 1e9, 2e9)}, 0.001)
    assert compression.codec("run") == "lz4"
    compression.sampled("run", middling, 0.001)
    assert compression.codec("run") == "lz4"
    compression.sampled("run", {"lz4": Figures(0.9, 1e9, 2e9)}, 0.001)
    assert compression.codec("run") is None


def test_a_link_that_has_become_fast_is_not_compressed_any_more() -> None:
    compression = on(30e6)
    compression.sampled("run", NUMBERS, 0.001)
    assert compression.codec("run") == "zstd"
    for _ in range(20):
        compression._link.observe(MESSAGE, MESSAGE / 5e9)
    assert compression.codec("run") is None


def test_messages_that_were_compressed_are_learned_from() -> None:
    compression = on(30e6)
    compression.sampled("run", NUMBERS, 0.001)
    assert compression.codec("run") == "zstd"
    compression.compressed("run", "zstd", ratio=1.0, speed=400e6)
    assert compression.codec("run") == "lz4"
    compression.compressed("run", "lz4", ratio=1.0, speed=400e6)
    assert compression.codec("run") is None


@pytest.mark.parametrize("sample_s", [0.0003, 0.01])
def test_samples_take_their_share_and_no_more(sample_s: float) -> None:
    bandwidth = 100e6
    compression = on(bandwidth)
    busy_s = 20 * MESSAGE / bandwidth
    samples = 0
    for message in range(5000):
        if compression.wants_sample("run", MESSAGE):
            samples += 1
            compression.sampled("run", RANDOM, sample_s)
        busy_s += MESSAGE / bandwidth
        compression.carried(MESSAGE / bandwidth)
        assert samples <= 1 + message // SAMPLE_MESSAGES
        # The first one may take longer than it was thought to.
        assert samples <= 1 or samples * sample_s <= SAMPLE_SHARE * busy_s
    assert samples > 5


def test_the_first_sample_waits_until_the_link_has_been_busy() -> None:
    link = Link()
    for _ in range(KNOWN_TRANSFERS):
        link.observe(2**18, 2**18 / 50e6)
    compression = LinkCompression(link)
    assert compression.slow
    assert not compression.wants_sample("run", 2**14)
    compression.carried(1.0)
    assert compression.wants_sample("run", 2**18)


def test_kinds_are_bounded() -> None:
    compression = on(30e6)
    for number in range(10 * KINDS_MAX):
        compression.sampled(str(number), NUMBERS, 0.0)
    assert len(compression._kinds) == KINDS_MAX
    assert compression.codec(str(10 * KINDS_MAX - 1)) == "zstd"
