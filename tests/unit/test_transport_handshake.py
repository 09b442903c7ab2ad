"""Greetings: who is met by them, and all that is refused."""

from __future__ import annotations

import pickle

import pytest

from dask_gpurt.secret import Secret
from dask_gpurt.shuffle.transport.address import ADDRESS_NBYTES_MAX, Address, Part, on_wire
from dask_gpurt.shuffle.transport.handshake import (
    HANDSHAKE_S,
    MAX_ANSWERED,
    MESSAGE_NBYTES_MAX,
    Handshake,
    Met,
    Say,
    StrangerError,
)

SECRET = Secret.new()
A, B, C = (Address(number, b"address of %d" % number) for number in (1, 2, 3))


def hello(a: Handshake, to: Address = B) -> bytes:
    return a.greet(to, 0.0)


def answer(b: Handshake, message: bytes) -> bytes:
    said = b.hear(message, 0.0)
    assert isinstance(said, Say)
    return said.message


def proof(a: Handshake, message: bytes) -> bytes:
    met = a.hear(message, 0.0)
    assert isinstance(met, Met)
    return met.message


@pytest.fixture
def a() -> Handshake:
    return Handshake(SECRET, A)


@pytest.fixture
def b() -> Handshake:
    return Handshake(SECRET, B)


def test_both_know_each_other_after_three_messages(a: Handshake, b: Handshake) -> None:
    message = hello(a)
    assert not a.met(2)
    said = b.hear(message, 0.0)
    assert isinstance(said, Say)
    assert said.peer == A
    assert not b.proven(1)
    met = a.hear(said.message, 0.0)
    assert isinstance(met, Met)
    assert met.peer == B
    assert a.met(2)
    assert b.hear(met.message, 0.0) is None
    assert b.proven(1)
    # One way: what B sends to A needs a greeting by B.
    assert not b.met(1)
    assert not a.proven(2)
    tag = on_wire(5, Part.MANIFEST)
    seal = a.seal(2, tag, b"said")
    assert b.verifies(1, tag, b"said", seal)
    assert not b.verifies(1, tag, b"paid", seal)
    assert not b.verifies(1, on_wire(5, Part.WITHDRAWAL), b"said", seal)
    assert not a.pending
    assert not b.pending


def test_a_transport_meets_itself(a: Handshake) -> None:
    assert a.hear(proof(a, answer(a, hello(a, A))), 0.0) is None
    assert a.met(1)
    assert a.proven(1)


def test_who_does_not_know_the_secret_gets_no_answer_and_leaves_nothing(b: Handshake) -> None:
    stranger = Handshake(Secret.new(), A)
    with pytest.raises(StrangerError, match="without a proof"):
        b.hear(hello(stranger), 0.0)
    assert not b.pending


def test_nobody_is_met_by_the_answer_of_a_stranger(a: Handshake) -> None:
    stranger = Handshake(Secret.new(), B)
    # It cannot read the greeting, and knows all that is in it.
    message = stranger.greet(A, 0.0)
    forged = answer(Handshake(stranger._secret, A), message)
    hello(a)
    with pytest.raises(StrangerError):
        a.hear(forged, 0.0)
    assert not a.met(2)


def test_a_greeting_is_for_one_receiver(a: Handshake) -> None:
    with pytest.raises(StrangerError):
        Handshake(SECRET, C).hear(hello(a, B), 0.0)
    # Nor is it taken by one in the place of the receiver, or by its own sender.
    with pytest.raises(StrangerError):
        Handshake(SECRET, Address(9, B.ucx)).hear(hello(a, B), 0.0)
    with pytest.raises(StrangerError):
        a.hear(hello(a, B), 0.0)


def test_what_was_recorded_proves_nothing(a: Handshake, b: Handshake) -> None:
    first = hello(a)
    second = answer(b, first)
    third = proof(a, second)
    assert b.hear(third, 0.0) is None
    for message in (second, third):
        with pytest.raises(StrangerError):
            a.hear(message, 0.0)
        with pytest.raises(StrangerError):
            b.hear(message, 0.0)
    # The first is answered, to A, who did not ask; the proof of before does not fit.
    with pytest.raises(StrangerError, match="no greeting"):
        a.hear(answer(b, first), 0.0)
    with pytest.raises(StrangerError, match="proof of nothing"):
        b.hear(third, 0.0)
    # What was proven stays so, by the key that it had.
    assert b.verifies(1, 7, b"said", a.seal(2, 7, b"said"))


def test_steps_are_not_taken_for_each_other(a: Handshake, b: Handshake) -> None:
    message = bytearray(answer(b, hello(a)))
    # The seal of an answer as a proof of B's.
    forged = bytes([3]) + bytes(message[1:17]) + B.incarnation.to_bytes(8, "little")
    with pytest.raises(StrangerError):
        a.hear(forged, 0.0)


def test_greetings_expire(a: Handshake, b: Handshake) -> None:
    message = hello(a)
    answer(b, message)
    assert a.expire(HANDSHAKE_S - 0.1).silent == []
    expired = a.expire(HANDSHAKE_S)
    assert (expired.silent, expired.unproven) == ([2], [])
    expired = b.expire(HANDSHAKE_S)
    assert (expired.silent, expired.unproven) == ([], [1])
    assert not a.pending
    assert not b.pending
    with pytest.raises(StrangerError):
        a.hear(answer(b, message), HANDSHAKE_S)


def test_greetings_that_are_not_proven_are_bounded(b: Handshake) -> None:
    for number in range(10, 10 + MAX_ANSWERED + 5):
        answer(b, hello(Handshake(SECRET, Address(number, b"x"))))
    assert f"{MAX_ANSWERED} unproven" in repr(b)


def test_a_connection_that_fails_asks_for_a_new_greeting_and_a_peer_that_is_gone_for_all(
    a: Handshake, b: Handshake
) -> None:
    b.hear(proof(a, answer(b, hello(a))), 0.0)
    a.lost(2)
    assert not a.met(2)
    b.lost(1)
    assert b.proven(1)
    b.gone(1)
    assert not b.proven(1)


@pytest.mark.parametrize("message", [b"", b"\x01", b"\x02" * 49, b"\x03" * 25, b"\x09" * 40, b"\x01" * 33])
def test_what_is_no_greeting_is_refused(b: Handshake, message: bytes) -> None:
    with pytest.raises(StrangerError):
        b.hear(message, 0.0)


def test_a_greeting_has_a_largest_size(b: Handshake) -> None:
    largest = Address(4, bytes(ADDRESS_NBYTES_MAX - len(Address(4, b"").encode(SECRET))))
    message = hello(Handshake(SECRET, largest))
    assert len(message) == MESSAGE_NBYTES_MAX
    answer(b, message)
    with pytest.raises(StrangerError, match="bytes"):
        b.hear(message + b"\0", 0.0)


def test_a_secret_shows_itself_to_nobody() -> None:
    key = bytes(range(32))
    secret = Secret(key)
    for text in (repr(secret), str(secret), f"{secret!r:>40}", repr(Handshake(secret, A)), repr(secret.derive("x"))):
        assert key.hex() not in text
        assert repr(key) not in text
    with pytest.raises(ValueError, match="has 32 bytes, not 3") as raised:
        Secret(b"abc")
    assert "abc" not in str(raised.value)
    again = pickle.loads(pickle.dumps(secret))
    assert again.verifies(secret.sign("x", b"y"), "x", b"y")
    assert not secret.derive("x").verifies(secret.sign("x", b"y"), "x", b"y")
