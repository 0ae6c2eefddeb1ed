"""The simulated link between a process and its node: what the API and the cores stand on, with time charged for it.

The process computes in no simulated time of its own accord; what it spends on submitting, reading and sending is added
to ``busy_until``, and frames leave when the CPU has come that far.
"""

from collections.abc import Callable, Sequence

from trio_ray.runtime.api.link import Payload, Write
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
from trio_ray.simulate.engine import Host
from trio_ray.simulate.network import after

INLINE_LIMIT = 100 * 1024
"""Bytes; as in a real cluster."""
FLUSH_S = 0.001
"""How long what was added may wait for more before it is sent."""


class Pin:
    """Owns the read pin of a shared value, as its buffer's exporter does in a real process."""

    __slots__ = ("_core", "_object_id")

    def __init__(self, core: ClientCore, object_id: bytes) -> None:
        self._core = core
        self._object_id = object_id

    def __del__(self) -> None:
        self._core.unpinned.append(self._object_id)


class SimulatedLink:
    """The part that drivers and workers share. ``block`` and ``wait_begins``/``wait_ends`` are theirs."""

    inline_limit = INLINE_LIMIT
    threaded = False

    def __init__(self, host: Host, process: Address) -> None:
        self.host = host
        self.engine = host.engine
        self.process = process
        self.address = process
        self.node = host.node
        self.core = ClientCore(process, self.adopt)
        self.cost = host.engine.profile.client
        self.busy_until = 0.0
        """When this process's CPU is free again."""
        self.closed = ""
        self._flush_due = False

    def adopt(self, value: Value) -> Pin:
        """The owner of a shared value's read pin."""
        return Pin(self.core, value.object_id)

    def now(self) -> float:
        """Simulated time in seconds."""
        return self.engine.now

    def charge(self, seconds: float) -> None:
        """Keep this process's CPU busy."""
        now = self.engine.env.now
        self.busy_until = (self.busy_until if self.busy_until > now else now) + seconds

    # -- sending -----------------------------------------------------------------------------------------------

    def flush_soon(self) -> None:
        """Send what was added when it is a batch, or a millisecond from now."""
        if len(self.core.out) >= self.cost.submit_batch:
            self.flush()
        elif not self._flush_due:
            self._flush_due = True
            after(self.engine.env, FLUSH_S, self._flush_now)

    def _flush_now(self) -> None:
        self._flush_due = False
        if not self.closed:
            self.flush()

    def flush(self) -> None:
        """Send what was added, now."""
        if self.core.pending:
            self.send(self.core.take())

    def send(self, messages: list[AnyMessage]) -> None:
        """One frame to the node."""
        if not messages or self.closed:
            return
        cost = self.cost
        seconds = cost.frame_s
        for message in messages:
            kind = type(message)
            if kind is SubmitTasks:
                seconds += cost.submit_s * len(message.specs)  # type: ignore[union-attr]
            elif kind is PutObjects:
                seconds += cost.put_s * len(message.objects)  # type: ignore[union-attr]
            elif kind is TasksDone:
                seconds = self.engine.profile.worker.frame_s
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
        assert isinstance(content, bytes | bytearray)
        return memoryview(content).toreadonly()

    def store(self, object_id: bytes, size: int, write: Write) -> int:
        """Make a large object in the node's store; its offset there."""
        answers: list[ObjectCreated | CreateFailed] = []
        self.core.create(object_id, size, answers.append)
        self.flush()
        self.block(lambda: bool(answers))
        return self.written(answers[0], size, write)

    async def store_async(self, object_id: bytes, size: int, write: Write) -> int:
        """``store`` for a Trio task."""
        import trio

        answers: list[ObjectCreated | CreateFailed] = []
        answered = trio.Event()

        def answer(message: ObjectCreated | CreateFailed) -> None:
            answers.append(message)
            answered.set()

        self.core.create(object_id, size, answer)
        self.flush()
        await answered.wait()
        return self.written(answers[0], size, write)

    def written(self, answer: ObjectCreated | CreateFailed, size: int, write: Write) -> int:
        """Fill the room that the node gave. Raises ``MemoryError`` if it gave none."""
        if isinstance(answer, CreateFailed):
            raise MemoryError(answer.reason)
        content = bytearray(size)
        write(memoryview(content))
        self.host.arena[answer.offset] = content
        self.charge(size * self.cost.byte_s)
        return answer.offset

    # -- waiting -----------------------------------------------------------------------------------------------

    def wait(self, object_ids: Sequence[bytes], count: int, timeout: float | None, *, fetch: bool) -> bool:
        """Let simulated time pass until ``count`` of these exist (``fetch``: can be read here)."""
        core = self.core
        core.want(object_ids, fetch=fetch)
        self.flush()

        def ready(object_id: bytes) -> bool:
            if fetch:
                return core.readable(object_id)
            return core.values.get(object_id) is not None

        def enough() -> bool:
            if self.closed:
                raise ConnectionError(self.closed)
            return sum(1 for object_id in object_ids if ready(object_id)) >= count

        def changed() -> None:
            missing = [object_id for object_id in object_ids if not ready(object_id)]
            if fetch:
                core.want(missing, fetch=True)
                self.flush()

        if enough():
            return True
        if timeout is not None and timeout <= 0:
            return False
        return self.block(enough, timeout, changed)

    def block(self, enough: Callable[[], bool], timeout: float | None = None, changed: Callable[[], None] | None = None) -> bool:
        """Let simulated time pass until ``enough()``; False if ``timeout`` seconds passed first."""
        raise NotImplementedError

    def ask(self, subject: str, argument: str) -> bytes:
        """The answer to a ``Query``."""
        answers: list[Answer] = []
        self.core.ask(subject, argument, answers.append)
        self.flush()
        self.block(lambda: bool(answers))
        if answers[0].error:
            raise LookupError(answers[0].error)
        return answers[0].body

    def wait_begins(self) -> None:
        """Nothing to do for a driver."""

    def wait_ends(self) -> None:
        """Nothing to do for a driver."""

    # -- ending ------------------------------------------------------------------------------------------------

    def end(self, reason: str) -> None:
        """The process is gone."""
        self.closed = reason or "the process has ended"


class DriverLink(SimulatedLink):
    """The driver's: the program runs under Trio, and time passes while all its tasks wait."""

    def __init__(self, host: Host, process: Address) -> None:
        super().__init__(host, process)

    def receive(self, messages: list[AnyMessage]) -> None:
        """A frame has arrived; the program sees it when the CPU has read it."""
        items = sum(len(getattr(message, "values", ())) for message in messages)
        self.charge(self.cost.frame_s + items * self.cost.get_s)
        after(self.engine.env, self.busy_until - self.engine.env.now, lambda: self._take_in(messages))

    def _take_in(self, messages: list[AnyMessage]) -> None:
        self.core.receive(messages)
        self.engine.woken = True

    def block(self, enough: Callable[[], bool], timeout: float | None = None, changed: Callable[[], None] | None = None) -> bool:
        """A synchronous wait in the program stops all its Trio tasks, here as on a real cluster."""
        engine = self.engine
        deadline = None if timeout is None else engine.now + timeout
        while not enough():
            if changed is not None:
                changed()
            engine.woken = False
            while not engine.woken:
                if deadline is not None and engine.env.peek() > deadline:
                    return False
                engine.check_progress()
                engine.env.step()
        return True


