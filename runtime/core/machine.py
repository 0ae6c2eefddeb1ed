"""The contract between machines and shells.

A machine is a plain object with all its state inside. A shell (Trio with real sockets, or SimPy with modelled ones)
hands it what happened and carries out what it answers. The rules:

- ``now`` is passed in, in seconds on a clock that never goes back; randomness is a ``random.Random`` given to the
  constructor; iteration never depends on hashing. Same events, same times, same seed: the same effects.
- All that arrived together is handled by one ``step``; events from one source stay in their order.
- Effects are carried out in the order given.
- ``validate`` raises AssertionError when an invariant is broken; tests call it after every step.
"""

from collections.abc import Sequence
from typing import Protocol

import msgspec

from trio_ray.runtime.core.effects import AnyEffect
from trio_ray.runtime.core.messages import Address, AnyMessage


class Event(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """Base of all events."""


class Received(Event, frozen=True):
    """A message arrived."""

    source: Address
    message: AnyMessage


class TimerFired(Event, frozen=True):
    """The time asked for by ``SetTimer`` has come."""

    key: str


class ProcessConnected(Event, frozen=True):
    """A driver or worker of this node authenticated and may be spoken to."""

    process: Address
    role: str
    """``driver`` or ``worker``."""
    pid: int = 0
    number: int = 0
    """For workers: the number of the ``StartWorker`` it answers."""
    shares_memory: bool = True
    """Whether it maps the node's arena."""


class ProcessLost(Event, frozen=True):
    """A driver or worker is gone: its link closed or its process ended."""

    process: Address
    reason: str = ""
    """How it ended, as a person would say it: ``exit code 1``, ``killed by SIGKILL``; empty for a clean leave."""


class WorkerFailed(Event, frozen=True):
    """A worker asked for by ``StartWorker`` ended before it connected."""

    number: int
    reason: str


class PeerLost(Event, frozen=True):
    """The link to another node closed or could not be made; messages under way to it may be lost."""

    peer: Address
    reason: str = ""


class WindowFilled(Event, frozen=True):
    """All bytes of a transfer have arrived in the arena."""

    transfer: int


class BytesSent(Event, frozen=True):
    """A ``SendBytes`` left this node; the arena range may be reused."""

    transfer: int
    to: Address


AnyEvent = Received | TimerFired | ProcessConnected | ProcessLost | WorkerFailed | PeerLost | WindowFilled | BytesSent


class Machine(Protocol):
    """What every component of the system is."""

    def start(self, now: float) -> list[AnyEffect]:
        """What to do first, before anything has happened."""

    def step(self, events: Sequence[AnyEvent], now: float) -> list[AnyEffect]:
        """Take in what happened, answer with what to do."""

    def validate(self) -> None:
        """Assert every invariant."""
