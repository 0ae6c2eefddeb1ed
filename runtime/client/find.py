"""Which cluster an address means, and the secret to enter it."""

import os
from pathlib import Path
from typing import NamedTuple

from trio_ray.runtime.launch import local
from trio_ray.runtime.transport import addresses

ADDRESS_VARIABLE = "TRIO_RAY_ADDRESS"
SECRET_VARIABLE = "TRIO_RAY_SECRET_FILE"
"""The file with a cluster's secret, in hexadecimal, for clusters that run elsewhere."""


class Place(NamedTuple):
    """Where to connect."""

    address: str
    """Of the transport: ``unix:``, ``tcp://`` or ``ws://``."""
    secret: bytes
    shown: str
    """For people."""


def find(address: str) -> Place:
    """The cluster of this address: ``auto``, a name of a local cluster, ``host:port``, ``tcp://…``, ``ws://…``.

    A cluster of this machine is entered through its Unix socket, unless a WebSocket is asked for. Raises
    ConnectionError, or ValueError for what is no address, with a sentence.
    """
    file = local.find(address)
    if file is not None:
        head = file.head
        inner = head.ws if address == head.ws else head.unix
        return Place(inner, bytes.fromhex(file.secret), head.tcp)
    if address == "auto":
        raise ConnectionError(
            "no cluster of yours runs on this machine; `trio-ray up` starts one, and trio_ray.init() without an "
            "address starts one of its own"
        )
    where = addresses.parse(address)
    path = os.environ.get(SECRET_VARIABLE)
    if path is None:
        raise ConnectionError(
            f"no cluster of yours on this machine answers at {where}; if it runs elsewhere, copy its secret file here "
            f"and name it in the environment variable {SECRET_VARIABLE}; if it runs here, `trio-ray status` shows its "
            "address"
        )
    try:
        secret = bytes.fromhex(Path(path).read_text().strip())
    except (OSError, ValueError) as error:
        raise ConnectionError(f"the secret file {path} ({SECRET_VARIABLE}) cannot be read: {error}") from None
    return Place(str(where), secret, str(where))
