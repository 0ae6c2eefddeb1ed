"""The simulated link between a process and its node: what the API and the cores stand on, with time charged for it.

The process computes in no simulated time of its own accord; what it spends on submitting, reading and sending is added
to ``busy_until``, and frames leave when the CPU has come that far.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

from trio_ray.runtime.api.errors import ObjectStoreFullError, RaySystemError
from trio_ray.runtime.api.link import Payload
from trio_ray.runtime.api.serialize import Packed
from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.messages import (
    Address,
    Answer,
    AnyMessage,
    CreateFailed,
    ObjectCreated,
    PutObjects,
    SubmitTasks,
    TasksDone,
    Value,
    Where,
)
from trio_ray.runtime.core.split import frames
from trio_ray.runtime.core.waiter import Waiter
from trio_ray.simulate.engine import Host
from trio_ray.simulate.network import after
from trio_ray.simulate.references import Register

INLINE_LIMIT = 100 * 1024
"""Bytes; as in a real cluster."""
FLUSH_S = 0.001
"""How long what was added may wait for more before it is sent."""


class Pin:
    """Owns the read pin of a shared value, as its buffer's exporter does in a real process."""

    __slots__ = ("_link", "_object_id")

    def __init__(self, link: "SimulatedLink", object_id: bytes) -> None:
        self._link = link
        self._object_id = object_id

    def __del__(self) -> None:
        self._link.core.unpinned.append(self._object_id)
        self._link.tidy_soon()


class SimulatedLink:
    """The part that drivers and workers share."""

    inline_limit = INLINE_LIMIT
    patience_s = FLUSH_S
    lock: AbstractContextManager[bool | None] = nullcontext()

    def __init__(self, host: Host, process: Address, register: Register) -> None:
        self.host = host
        self.engine = host.engine
        self.process = process
        self.address = process
        self.node = host.node
        self.core = ClientCore(process, lambda value: Pin(self, value.object_id))
        self.cost = host.engine.profile.client
        self.busy_until = 0.0
        """When this process's CPU is free again."""
        self.closed = ""
        self._flush_due = False
        register.joined(self)

    def now(self) -> float:
        """Simulated time in seconds."""
        return self.engine.now

    def charge(self, seconds: float) -> None:
        """Keep this process's CPU busy."""
        now = self.engine.env.now
        self.busy_until = (max(now, self.busy_until)) + seconds

    # -- sending -----------------------------------------------------------------------------------------------

    def flush_soon(self) -> None:
        """Send what was added when it is a batch, or else soon."""
        if len(self.core.out) >= self.cost.submit_batch:
            self.flush()
        elif not self._flush_due:
            self.tidy_soon()

    def tidy_soon(self) -> None:
        """Something waits to be sent, but not for ever."""
        if not self._flush_due and not self.closed:
            self._flush_due = True
            after(self.engine.env, self.patience_s, self._flush_now)

    def _flush_now(self) -> None:
        self._flush_due = False
        if not self.closed:
            self.flush()

    def flush(self) -> None:
        """Send what was added, now."""
        if self.closed:
            raise RaySystemError(self.closed)
        if self.core.pending:
            self.send(self.core.take())

    def send(self, messages: list[AnyMessage]) -> None:
        """A batch to the node."""
        if messages and not self.closed:
            for frame in frames(messages):
                self._send(frame)

    def _send(self, messages: list[AnyMessage]) -> None:
        cost = self.cost
        seconds = cost.frame_s
        for message in messages:
            kind = type(message)
            if kind is SubmitTasks:
                seconds += cost.submit_s * len(message.specs)  # type: ignore[union-attr]
            elif kind is PutObjects:
                seconds += cost.put_s * len(message.objects)  # type: ignore[union-attr]
            elif kind is TasksDone:
                seconds += self.engine.profile.worker.frame_s - cost.frame_s
        self.charge(seconds)
        engine = self.engine
        delay = self.busy_until - engine.env.now + engine.profile.link.unix_latency_s
        self.host.from_process(self.process, messages, delay)

    # -- the object store --------------------------------------------------------------------------------------

    def payload(self, value: Value, owner: object) -> Payload:
        """The bytes of a value that is here."""
        if value.where == Where.INLINE:
            return value.payload
        content = self.host.arena[value.offset]
        self.charge(value.size * self.cost.byte_s)
        assert isinstance(content, bytes)
        return content

    def store(self, object_id: bytes, packed: Packed) -> int:
        """Write a large object into the node's store; its offset there. Raises ``ObjectStoreFullError``."""
        self.may_block()
        answers: list[ObjectCreated | CreateFailed] = []
        self.core.create(object_id, packed.size, answers.append)
        self.flush()
        self.block(lambda: bool(answers))
        answer = answers[0]
        if isinstance(answer, CreateFailed):
            raise ObjectStoreFullError(answer.reason)
        self.host.arena[answer.offset] = packed.to_bytes()
        self.charge(packed.size * self.cost.byte_s)
        return answer.offset

    # -- waiting -----------------------------------------------------------------------------------------------

    def wait(
        self, object_ids: Sequence[bytes], count: int, timeout: float | None, *, fetch: bool,
        stop_at_error: bool = False,
    ) -> bool:  # fmt: skip
        """Let simulated time pass until ``count`` of these exist (``fetch``: can be read here), or one is an error."""
        core = self.core
        there = 0
        for object_id in object_ids:
            value = core.values.get(object_id)
            there += value is not None and not (fetch and value.where == Where.ELSEWHERE)
        if there < count:
            self.may_block()
        waiter = Waiter(core, object_ids, count, _nothing, fetch=fetch, stop_at_error=stop_at_error)
        if not waiter.start():
            self.flush()
            if (timeout is not None and timeout <= 0) or not self.block(lambda: waiter.done, timeout):
                waiter.cancel()
                return False
        if core.failure:
            raise RaySystemError(core.failure)
        return True

    def may_block(self) -> None:
        """Raise if this process's code cannot wait where it is."""

    def block(self, enough: Callable[[], bool], timeout: float | None = None) -> bool:
        """Let simulated time pass until ``enough()``; False if ``timeout`` seconds passed first.

        Called by code that runs under Trio, it stops all Trio tasks meanwhile: those of this process, as on a real
        cluster, and here those of the other processes as well.
        """
        engine = self.engine
        deadline = float("inf") if timeout is None else engine.now + timeout
        while not enough():
            if engine.env.peek() > deadline:
                return False
            engine.check_progress()
            engine.env.step()
        return True

    def ask(self, subject: str, argument: str = "") -> bytes:
        """The answer to a ``Query``; ``LookupError`` if it is an error."""
        self.may_block()
        answers: list[Answer] = []
        self.core.ask(subject, argument, answers.append)
        self.flush()
        self.block(lambda: bool(answers))
        if answers[0].error:
            raise LookupError(answers[0].error)
        return answers[0].body

    def call_soon(self, callback: Callable[[], None]) -> Callable[[], None]:
        """The callback itself: news come on the thread that Trio runs on. It wakes a Trio task, so time must stop."""

        def call() -> None:
            self.engine.woken = True
            callback()

        return call

    # -- ending ------------------------------------------------------------------------------------------------

    def end(self, reason: str) -> None:
        """The process is gone."""
        self.closed = self.core.failure = reason or "the process has ended"


def _nothing() -> None:
    pass


class DriverLink(SimulatedLink):
    """The driver's: the program runs under Trio, and time passes while all its tasks wait."""

    patience_s = 0.0
    """What its tasks added is sent in Trio's next round, that is, before time passes."""

    def receive(self, messages: list[AnyMessage]) -> None:
        """A frame has arrived; the program sees it when the CPU has read it."""
        items = sum(len(getattr(message, "values", ())) for message in messages)
        self.charge(self.cost.frame_s + items * self.cost.get_s)
        after(self.engine.env, self.busy_until - self.engine.env.now, lambda: self._take_in(messages))

    def _take_in(self, messages: list[AnyMessage]) -> None:
        self.core.receive(messages)
        if self.core.out:
            self.flush()
