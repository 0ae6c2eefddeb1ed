"""The history of a simulation as a hash: one seed, one history, on every machine and under every hash seed.

What goes in: the time, both addresses, the kind, the number of items, their ids and the size of every message; timers
and processes that come and go. What stays out: the contents of payloads, and the order of any set.
"""

from hashlib import blake2b
from struct import Struct

from trio_ray.runtime.core.messages import Address

_RECORD = Struct("<dIIIQQ")


class History:
    """The running hash."""

    def __init__(self) -> None:
        self._hash = blake2b(digest_size=16)
        self._update = self._hash.update
        self._codes: dict[str, int] = {}
        self.messages = 0
        """How many were recorded."""

    def code(self, name: str) -> int:
        """A small number for an address or kind; the first use records the name."""
        code = self._codes.get(name)
        if code is None:
            code = self._codes[name] = len(self._codes)
            self._update(f"{code}={name};".encode())
        return code

    def message(self, now: float, source: Address, to: Address, kind: str, items: int, size: int, ids: bytes) -> None:
        """A message was sent."""
        self.messages += 1
        code = self.code
        self._update(_RECORD.pack(now, code(source), code(to), code(kind), items, size) + ids)

    def event(self, now: float, where: Address, what: str) -> None:
        """Anything else: a timer fired, a worker started or left, a transfer ended."""
        self._update(_RECORD.pack(now, self.code(where), 0xFFFF_FFFF, self.code(what), 0, 0))

    def hexdigest(self) -> str:
        """Of everything recorded so far."""
        return self._hash.hexdigest()
