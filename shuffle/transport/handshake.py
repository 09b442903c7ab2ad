"""Peers prove to each other that they know the secret of their installation, before anything else is said.

Covers: the three messages of a greeting, what becomes of each that arrives, and the seals of what is said after it. Pure:
no I/O; who calls brings the time.
Does not cover: which messages of UCX these are (:mod:`dask_gpurt.shuffle.transport.engine`); how workers come by the secret
(:mod:`dask_gpurt.plugins.scheduler`); the addresses themselves, which carry a seal
(:mod:`dask_gpurt.shuffle.transport.address`).

Theory of operation
    Whoever reaches the port of a UCX worker can send it messages, and UCX does not say from whom one is. So a message
    counts only by what it proves. A sender A greets a receiver B before its first delivery::

        A -> B  HELLO   nonce of A, address of A                     seal over: both addresses, nonce of A
        B -> A  ANSWER  incarnation of B, of A, nonce of B           seal over: both addresses, both nonces
        A -> B  PROOF   incarnation of A                             seal over: both addresses, both nonces

    An address names the UCX worker and its incarnation, and nonces are random: a seal is good for these two, this time, this
    step. After the ANSWER, A knows that B is there now and knows the secret; after the PROOF, B knows it of A. A
    HELLO that was recorded makes B answer its true sender, who has not asked; a recorded ANSWER or PROOF has other nonces.
    B keeps nothing, connects to nobody, and answers nothing, for a HELLO without a good seal.

    Both make a session key of the secret, the addresses and the nonces. Everything that A says about deliveries is sealed
    with it (:meth:`Handshake.seal`). The frames of a delivery are not, for to hash them would take longer than to carry
    them: what is told apart by its tag is kept from those who cannot see the tags. See docs/security.md.

    Greetings that stay without an answer, or without a proof, are forgotten after :data:`HANDSHAKE_S`. B holds
    :data:`MAX_ANSWERED` of them at most.
"""

from __future__ import annotations

import secrets
import struct
from dataclasses import dataclass

from dask_gpurt.secret import SEAL_NBYTES, Secret
from dask_gpurt.shuffle.transport.address import ADDRESS_NBYTES_MAX, Address, TransportError

__all__ = ["HANDSHAKE_S", "MAX_ANSWERED", "MESSAGE_NBYTES_MAX", "Expired", "Handshake", "Met", "Say", "StrangerError"]

#: How long a peer may take to answer. Its UCX thread does so at once, whatever its event loop and its tasks do.
HANDSHAKE_S = 10.0
#: Greetings that were answered and not proven yet; each is of a worker of this installation, or was recorded.
MAX_ANSWERED = 4096

_NONCE_NBYTES = 16
_HELLO, _ANSWER, _PROOF = 1, 2, 3
_HELLO_HEAD = struct.Struct(f"<B{SEAL_NBYTES}s{_NONCE_NBYTES}s")
_ANSWER_BODY = struct.Struct(f"<B{SEAL_NBYTES}sQQ{_NONCE_NBYTES}s")
_PROOF_BODY = struct.Struct(f"<B{SEAL_NBYTES}sQ")
#: No message of a greeting is larger.
MESSAGE_NBYTES_MAX = _HELLO_HEAD.size + ADDRESS_NBYTES_MAX


class StrangerError(TransportError):
    """A message that nobody who knows the secret has sent, or not now, or not to here."""


@dataclass(frozen=True)
class Say:
    """Send ``message`` to ``peer``."""

    peer: Address
    message: bytes


@dataclass(frozen=True)
class Met:
    """Send ``message`` to ``peer``, and then whatever is for it."""

    peer: Address
    message: bytes


@dataclass(frozen=True)
class Expired:
    """What has taken too long.

    Parameters
    ----------
    silent
        Incarnations that did not answer a greeting.
    unproven
        Incarnations that greeted, and did not prove it.
    """

    silent: list[int]
    unproven: list[int]


@dataclass(frozen=True)
class _Greeting:
    """A greeting under way, on either side."""

    peer: Address
    #: What is sealed: address of the sender, of the receiver, nonce of the sender, and of the receiver.
    parts: tuple[bytes, ...]
    until_s: float


class Handshake:
    """The greetings of one transport, and who was met by them.

    Parameters
    ----------
    secret
        What all members know.
    own
        Address of this transport.
    """

    def __init__(self, secret: Secret, own: Address) -> None:
        self._secret = secret
        self._own = own
        self._address = own.encode(secret)
        #: By incarnation: those who were greeted, those who were answered; in the order of their time.
        self._greeted: dict[int, _Greeting] = {}
        self._answered: dict[int, _Greeting] = {}
        #: By incarnation: keys for what is sent to them, and for what comes from them.
        self._to: dict[int, Secret] = {}
        self._from: dict[int, Secret] = {}

    def __repr__(self) -> str:
        return f"<Handshake {len(self._to)} met, {len(self._from)} proven, {len(self._answered)} unproven>"

    @property
    def pending(self) -> bool:
        """Whether there is something that may expire."""
        return bool(self._greeted or self._answered)

    def met(self, incarnation: int) -> bool:
        """Whether this peer has answered a greeting: deliveries may go to it."""
        return incarnation in self._to

    def proven(self, incarnation: int) -> bool:
        """Whether this peer has proven itself: deliveries may come from it."""
        return incarnation in self._from

    def greet(self, peer: Address, now_s: float) -> bytes:
        """Return the message that begins a greeting; an earlier one is forgotten."""
        nonce = secrets.token_bytes(_NONCE_NBYTES)
        parts = (self._address, peer.encode(self._secret), nonce)
        self._greeted.pop(peer.incarnation, None)
        self._greeted[peer.incarnation] = _Greeting(peer, parts, now_s + HANDSHAKE_S)
        return _HELLO_HEAD.pack(_HELLO, self._secret.sign("hello", *parts), nonce) + self._address

    def hear(self, message: bytes, now_s: float) -> Say | Met | None:
        """Take in a message of a greeting; None: there is nothing to be done.

        Raises
        ------
        StrangerError
            If it proves nothing. Then nothing has changed.
        """
        if len(message) > MESSAGE_NBYTES_MAX:
            raise StrangerError(f"a greeting of {len(message)} bytes")
        kind = message[0] if message else 0
        if kind == _HELLO and len(message) > _HELLO_HEAD.size:
            return self._hello(message, now_s)
        if kind == _ANSWER and len(message) == _ANSWER_BODY.size:
            return self._answer(message)
        if kind == _PROOF and len(message) == _PROOF_BODY.size:
            self._proof(message)
            return None
        raise StrangerError(f"{len(message)} bytes are no greeting")

    def _hello(self, message: bytes, now_s: float) -> Say:
        _, seal, nonce = _HELLO_HEAD.unpack_from(message)
        address = message[_HELLO_HEAD.size :]
        if not self._secret.verifies(seal, "hello", address, self._address, nonce):
            raise StrangerError("a greeting without a proof")
        peer = Address.decode(address, self._secret)
        own = secrets.token_bytes(_NONCE_NBYTES)
        parts = (address, self._address, nonce, own)
        self._answered.pop(peer.incarnation, None)
        self._answered[peer.incarnation] = _Greeting(peer, parts, now_s + HANDSHAKE_S)
        if len(self._answered) > MAX_ANSWERED:
            del self._answered[next(iter(self._answered))]
        seal = self._secret.sign("answer", *parts)
        return Say(peer, _ANSWER_BODY.pack(_ANSWER, seal, self._own.incarnation, peer.incarnation, own))

    def _answer(self, message: bytes) -> Met:
        _, seal, incarnation, asked, nonce = _ANSWER_BODY.unpack(message)
        greeting = self._greeted.get(incarnation)
        if greeting is None or asked != self._own.incarnation:
            raise StrangerError("an answer to no greeting")
        parts = (*greeting.parts, nonce)
        if not self._secret.verifies(seal, "answer", *parts):
            raise StrangerError("an answer without a proof")
        del self._greeted[incarnation]
        self._to[incarnation] = self._secret.derive("session", *parts)
        seal = self._secret.sign("proof", *parts)
        return Met(greeting.peer, _PROOF_BODY.pack(_PROOF, seal, self._own.incarnation))

    def _proof(self, message: bytes) -> None:
        _, seal, incarnation = _PROOF_BODY.unpack(message)
        greeting = self._answered.get(incarnation)
        if greeting is None or not self._secret.verifies(seal, "proof", *greeting.parts):
            raise StrangerError("a proof of nothing")
        del self._answered[incarnation]
        self._from[incarnation] = self._secret.derive("session", *greeting.parts)

    def expire(self, now_s: float) -> Expired:
        """Forget what has taken too long."""
        late = []
        for greetings in (self._greeted, self._answered):
            late.append([incarnation for incarnation, greeting in greetings.items() if greeting.until_s <= now_s])
            for incarnation in late[-1]:
                del greetings[incarnation]
        return Expired(*late)

    def lost(self, incarnation: int) -> None:
        """Forget that a peer was met: the connection to it has failed. What comes from it is by its own."""
        self._greeted.pop(incarnation, None)
        self._to.pop(incarnation, None)

    def gone(self, incarnation: int) -> None:
        """Forget a peer, for good."""
        self.lost(incarnation)
        self._answered.pop(incarnation, None)
        self._from.pop(incarnation, None)

    def seal(self, incarnation: int, wire_tag: int, body: bytes) -> bytes:
        """Return the seal of what is said to a peer that was met."""
        return self._to[incarnation].sign("say", struct.pack("<Q", wire_tag), body)

    def verifies(self, incarnation: int, wire_tag: int, body: bytes, seal: bytes) -> bool:
        """Whether a peer that has proven itself has said this."""
        return self._from[incarnation].verifies(seal, "say", struct.pack("<Q", wire_tag), body)
