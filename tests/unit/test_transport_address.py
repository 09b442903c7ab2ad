"""Addresses, tags and manifests of the transport."""

from __future__ import annotations

import pytest

from dask_gpurt.errors import GpurtError
from dask_gpurt.secret import Secret
from dask_gpurt.shuffle.transport.address import (
    ADDRESS_NBYTES_MAX,
    MANIFEST_NBYTES,
    Address,
    Manifest,
    Part,
    TagCounter,
    TransportError,
    off_wire,
    on_wire,
    owner_of,
)

SECRET = Secret.new()


def test_an_address_comes_back_as_it_was() -> None:
    address = Address.new(b"what UCX says")
    assert Address.decode(address.encode(SECRET), SECRET) == address


def test_two_incarnations_of_one_worker_differ() -> None:
    assert Address.new(b"same") != Address.new(b"same")


@pytest.mark.parametrize("encoded", [b"", b"GPUX", b"nonsense that is long enough", Address(1, b"").encode(SECRET), 7])
def test_what_is_no_address_is_refused(encoded: bytes) -> None:
    with pytest.raises(TransportError):
        Address.decode(encoded, SECRET)


def test_another_version_is_refused() -> None:
    encoded = bytearray(Address(1, b"x").encode(SECRET))
    encoded[4] += 1
    with pytest.raises(TransportError, match="version"):
        Address.decode(bytes(encoded), SECRET)


def test_tags_differ_and_say_whose_they_are() -> None:
    incarnation = (1 << 38) - 1
    counter = TagCounter(incarnation)
    tags = [counter.next() for _ in range(1000)]
    assert len(set(tags)) == 1000
    assert {owner_of(tag) for tag in tags} == {incarnation}
    assert not set(tags) & {TagCounter(incarnation - 1).next() for _ in range(1)}


def test_the_part_of_a_message_is_beside_the_tag() -> None:
    tag = TagCounter((1 << 38) - 1).next() + 0xFFFFFF
    for part in Part:
        assert on_wire(tag, part) < 2**64
        assert off_wire(on_wire(tag, part)) == (tag, part)


def test_a_manifest_tells_other_deliveries() -> None:
    manifest = Manifest.of([70000, 80000])
    assert Manifest.decode(manifest.encode()) == manifest
    assert len(manifest.encode()) == MANIFEST_NBYTES
    assert len({manifest, Manifest.of([80000, 70000]), Manifest.of([150000]), Manifest.of([70000, 80000, 0])}) == 4


def test_a_transport_error_is_one_that_is_tried_again() -> None:
    # distributed's `retry` tries again after an OSError.
    assert issubclass(TransportError, OSError)
    assert issubclass(TransportError, GpurtError)


def test_an_address_that_no_member_has_made_is_refused() -> None:
    encoded = Address(7, b"where somebody else waits").encode(Secret.new())
    with pytest.raises(TransportError, match="none of this installation"):
        Address.decode(encoded, SECRET)
    own = bytearray(Address(7, b"where it is").encode(SECRET))
    own[-20] ^= 1
    with pytest.raises(TransportError, match="none of this installation"):
        Address.decode(bytes(own), SECRET)


def test_an_address_has_a_largest_size() -> None:
    with pytest.raises(TransportError, match="bytes are no address"):
        Address.decode(Address(7, bytes(ADDRESS_NBYTES_MAX)).encode(SECRET), SECRET)
