"""Addresses people write: ``unix:/path``, ``tcp://host:port``, ``ws://host:port``, or ``host:port``."""

from typing import NamedTuple

DEFAULT_PORT = 6380


class Endpoint(NamedTuple):
    """Where a transport listens."""

    scheme: str
    """``unix``, ``tcp``, ``ws`` or ``wss``."""
    host: str
    """A host, or the path of a Unix socket."""
    port: int = 0

    def __str__(self) -> str:
        if self.scheme == "unix":
            return f"unix:{self.host}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse(address: str) -> Endpoint:
    """Raises ValueError, with a sentence, for what is no address."""
    if address.startswith("unix:"):
        return Endpoint("unix", address.removeprefix("unix:").removeprefix("//"))
    scheme, found, rest = address.partition("://")
    if not found:
        scheme, rest = "tcp", address
    if scheme not in ("tcp", "ws", "wss"):
        raise ValueError(f"{address!r} has the unknown scheme {scheme!r}; write tcp://host:port or ws://host:port")
    host, colon, port = rest.rstrip("/").rpartition(":")
    if not colon:
        host, port = rest.rstrip("/"), str(DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    odd = not host or not host.isprintable() or bool(set(host) & set(" /@?#"))
    if odd or not port.isdecimal() or not 0 <= int(port) < 65536:
        raise ValueError(f"{address!r} is no address; write host:port, tcp://host:port or ws://host:port")
    return Endpoint(scheme, host, int(port))


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens there."""
    return host in ("localhost", "::1") or host.startswith("127.")
