"""Who may speak: a mutual challenge and response over the cluster secret, the same on every kind of link.

    dialler                                  listener
      Greeting(version, nonce)        ->
                                      <-     Challenge(version, nonce, proof over both nonces)
      Response(proof, Hello)          ->
                                      <-     Welcome, or Refusal(reason)

Each side proves that it knows the secret without showing it, and sees the other's proof before it acts on anything.
Until then only these four small messages are decoded, nothing is unpickled. Cloudpickle executes code: whoever passes
here is trusted as the user is. No sockets here: both the Trio links and the blocking one drive these objects.
"""

import hmac
import secrets
from hashlib import sha256
from typing import Any

import msgspec

from trio_ray.runtime.core.messages import Address, NodeInfo

VERSION = 1
"""Of the wire: frames, handshake and messages. Peers of another version are refused."""
NONCE_BYTES = 32


class AuthenticationError(Exception):
    """The peer does not know the cluster's secret, or speaks another version."""


class Hello(msgspec.Struct, frozen=True):
    """Who dials."""

    role: str
    """``driver``, ``worker`` or ``node``."""
    pid: int = 0
    number: int = 0
    """Of the ``StartWorker`` that a worker answers."""
    shares_memory: bool = True
    node: Address = ""
    """For a node: its address."""
    info: NodeInfo | None = None


class Welcome(msgspec.Struct, frozen=True):
    """What the listener tells whoever may come in."""

    process: Address
    """The dialler's own address from now on."""
    node: Address
    arena_path: str = ""
    arena_bytes: int = 0
    inline_limit: int = 100 * 1024
    shards: int = 1
    session_dir: str = ""
    clock: float = 0.0
    """The node's clock now."""
    sys_path: tuple[str, ...] = ()
    policy: str = ""
    """The cluster's."""


class Greeting(msgspec.Struct, frozen=True, tag=True):
    """The dialler's first word."""

    version: int
    nonce: bytes


class Challenge(msgspec.Struct, frozen=True, tag=True):
    """The listener proves itself and asks the same."""

    version: int
    nonce: bytes
    proof: bytes


class Response(msgspec.Struct, frozen=True, tag=True):
    """The dialler's proof, and who it is."""

    proof: bytes
    hello: Hello


class Accepted(msgspec.Struct, frozen=True, tag=True):
    """Come in."""

    welcome: Welcome


class Refusal(msgspec.Struct, frozen=True, tag=True):
    """Either side's last word."""

    reason: str


Word = Greeting | Challenge | Response | Accepted | Refusal
_decoder: "msgspec.msgpack.Decoder[Word]" = msgspec.msgpack.Decoder(Word)
_encode = msgspec.msgpack.Encoder().encode

WRONG_SECRET = "the cluster secret of the {who} is not the one this {me} has; use the secret file of the same cluster"


def _proof(secret: bytes, side: bytes, own: bytes, other: bytes) -> bytes:
    return hmac.new(secret, b"trio-ray " + side + own + other, sha256).digest()


def _decode(body: Any) -> Word:
    try:
        return _decoder.decode(body)
    except msgspec.MsgspecError as error:
        raise AuthenticationError(f"the peer does not speak trio-ray's handshake ({error})") from None


def _other_version(theirs: int) -> str:
    return f"one side speaks version {VERSION} of the protocol, the other {theirs}; install the same trio-ray on both"


class Dialler:
    """The side that connects. Send ``first``, then what each ``received`` answers, until ``welcome`` is there."""

    def __init__(self, secret: bytes, hello: Hello) -> None:
        self._secret = secret
        self._hello = hello
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self.welcome: Welcome | None = None
        self.first = _encode(Greeting(VERSION, self._nonce))

    def received(self, body: Any) -> bytes | None:
        """The listener's next message; answers with ours, or None when there is none to send.

        Raises AuthenticationError; ``last_word`` is then to be sent before the link is closed.
        """
        message = _decode(body)
        if isinstance(message, Refusal):
            raise AuthenticationError(f"the peer refused the connection: {message.reason}")
        if isinstance(message, Challenge):
            if message.version != VERSION:
                raise AuthenticationError(_other_version(message.version))
            if not hmac.compare_digest(message.proof, _proof(self._secret, b"listener", message.nonce, self._nonce)):
                raise AuthenticationError(WRONG_SECRET.format(who="node", me="process"))
            return _encode(Response(_proof(self._secret, b"dialler", self._nonce, message.nonce), self._hello))
        if isinstance(message, Accepted):
            self.welcome = message.welcome
            return None
        raise AuthenticationError(f"the peer said {type(message).__name__} out of turn")


class Listener:
    """The side that is connected to. Send what each ``received`` answers until ``hello`` is there, then ``accept``."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret
        self._nonce = secrets.token_bytes(NONCE_BYTES)
        self._theirs = b""
        self.hello: Hello | None = None

    def received(self, body: Any) -> bytes | None:
        """The dialler's next message; answers with ours. Raises AuthenticationError, after which ``last_word`` goes."""
        message = _decode(body)
        if isinstance(message, Refusal):
            raise AuthenticationError(f"the peer broke off: {message.reason}")
        if isinstance(message, Greeting) and not self._theirs:
            if message.version != VERSION:
                raise AuthenticationError(_other_version(message.version))
            self._theirs = message.nonce
            return _encode(
                Challenge(VERSION, self._nonce, _proof(self._secret, b"listener", self._nonce, message.nonce))
            )
        if isinstance(message, Response) and self._theirs and self.hello is None:
            if not hmac.compare_digest(message.proof, _proof(self._secret, b"dialler", self._theirs, self._nonce)):
                raise AuthenticationError(WRONG_SECRET.format(who="peer", me="node"))
            self.hello = message.hello
            return None
        raise AuthenticationError(f"the peer said {type(message).__name__} out of turn")

    def accept(self, welcome: Welcome) -> bytes:
        """The message that lets the dialler in."""
        return _encode(Accepted(welcome))


def last_word(error: Exception) -> bytes:
    """What to tell the peer before closing the link because of ``error``."""
    return _encode(Refusal(str(error)[:1000]))
