"""A recording of what a real node's machines saw and did, to be replayed into fresh ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from trio_ray.runtime.core.effects import AnyEffect
from trio_ray.runtime.core.machine import AnyEvent
from trio_ray.runtime.core.messages import Address


class Step(msgspec.Struct, array_like=True):
    """One step of one machine."""

    machine: Address
    now: float
    events: list[AnyEvent]
    effects: list[AnyEffect]


class Recording:
    """Appends steps to a file, each behind its length."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._encode = msgspec.msgpack.Encoder().encode

    def write(self, machine: Address, now: float, events: Sequence[AnyEvent], effects: list[AnyEffect]) -> None:
        """Add a step."""
        body = self._encode(Step(machine, now, list(events), effects))
        self._file.write(len(body).to_bytes(4, "little") + body)

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()


def read(path: Path) -> Iterator[Step]:
    """The steps of a recording, in order; one that was cut off in the middle ends there."""
    decode = msgspec.msgpack.Decoder(Step).decode
    with path.open("rb") as file:
        while len(header := file.read(4)) == 4:
            body = file.read(int.from_bytes(header, "little"))
            if len(body) < int.from_bytes(header, "little"):
                return
            yield decode(body)
