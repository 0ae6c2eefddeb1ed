"""A recording of what a real node's machines saw and did, to be replayed into fresh ones."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from trio_ray.runtime.core.effects import AnyEffect
from trio_ray.runtime.core.machine import AnyEvent
from trio_ray.runtime.core.messages import Address, NodeInfo
from trio_ray.runtime.node.machines import build
from trio_ray.runtime.node.settings import NodeSettings


class Beginning(msgspec.Struct, array_like=True):
    """What the machines were made of."""

    settings: NodeSettings
    info: NodeInfo


class Step(msgspec.Struct, array_like=True):
    """One step of one machine; without events its ``start``."""

    machine: Address
    now: float
    events: list[AnyEvent] | None
    effects: list[AnyEffect]


class Recording:
    """Appends steps to a file, each behind its length."""

    def __init__(self, path: Path, settings: NodeSettings, info: NodeInfo) -> None:
        self._file = path.open("wb")
        path.chmod(0o600)  # it holds user data
        self._encode = msgspec.msgpack.Encoder().encode
        self._append(self._encode(Beginning(msgspec.structs.replace(settings, secret=""), info)))

    def write(self, machine: Address, now: float, events: Sequence[AnyEvent] | None, effects: list[AnyEffect]) -> None:
        """Add a step."""
        self._append(self._encode(Step(machine, now, None if events is None else list(events), effects)))

    def _append(self, body: bytes) -> None:
        self._file.write(len(body).to_bytes(4, "little") + body)

    def close(self) -> None:
        """Write out what is buffered."""
        self._file.close()


def _bodies(file: BinaryIO) -> Iterator[bytes]:
    """What was appended, in order; a recording that was cut off in the middle ends there."""
    while len(header := file.read(4)) == 4:
        body = file.read(int.from_bytes(header, "little"))
        if len(body) < int.from_bytes(header, "little"):
            return
        yield body


def replay(path: Path) -> Iterator[tuple[Step, list[AnyEffect]]]:
    """Take the recorded steps with fresh machines: each step as it was, and the effects that it has now.

    The effects are the same, byte for byte, as long as the machines keep their contract. Raises ValueError for a file
    that is no recording.
    """
    decode = msgspec.msgpack.Decoder(Step).decode
    with path.open("rb") as file:
        bodies = _bodies(file)
        try:
            beginning = msgspec.msgpack.decode(next(bodies, b""), type=Beginning)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{path} is no recording of a trio-ray node: {error}") from None
        machines = build(beginning.settings, beginning.info)
        for body in bodies:
            step = decode(body)
            machine = machines[step.machine]
            yield step, machine.start(step.now) if step.events is None else machine.step(step.events, step.now)
