"""What a machine asks its shell to do.

Effects are carried out in the order given; whatever must be durable before a message goes out stands before that
message. A shell decides nothing: it has no reason to read a message or an id.
"""

import msgspec

from trio_ray.runtime.core.messages import Address, AnyMessage


class Effect(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """Base of all effects."""


class Send(Effect, frozen=True):
    """Deliver ``message`` to ``to``, in order with what was sent to ``to`` before; lost only with the link.

    ``to`` may be a process of this node, another node's machine, or a machine hosted by this very process.
    """

    to: Address
    message: AnyMessage


class SendBytes(Effect, frozen=True):
    """Send ``size`` bytes of the arena from ``offset`` as data frames of ``transfer`` to a node or process.

    The shell cuts them into chunks and reports ``BytesSent`` when the last has left.
    """

    to: Address
    transfer: int
    offset: int
    size: int


class OpenWindow(Effect, frozen=True):
    """Data frames of ``transfer`` from ``source`` go to the arena at ``offset``; ``size`` bytes are expected.

    The shell reports ``WindowFilled`` when all have arrived. Frames of a transfer without a window are dropped.
    """

    source: Address
    transfer: int
    offset: int
    size: int


class CloseWindow(Effect, frozen=True):
    """No longer expect data of this transfer."""

    transfer: int


class SetTimer(Effect, frozen=True):
    """Report ``TimerFired(key)`` at time ``at``; replaces an earlier timer of this key."""

    key: str
    at: float


class CancelTimer(Effect, frozen=True):
    """Forget the timer of this key, if there is one."""

    key: str


class StartWorker(Effect, frozen=True):
    """Start one worker process; it appears as ``ProcessConnected`` with role ``worker`` and this number."""

    number: int


class StopWorker(Effect, frozen=True):
    """End a worker: ask it to leave, or with ``kill`` end it at once. ``ProcessLost`` follows."""

    process: Address
    kill: bool = False


AnyEffect = Send | SendBytes | OpenWindow | CloseWindow | SetTimer | CancelTimer | StartWorker | StopWorker
