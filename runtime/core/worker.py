"""What a worker process knows of the tasks it was given: which come next, which are running, which results to send.

A worker holds a few tasks ahead (the node's pipelined dispatch), so that the hop to the node is paid once a batch.
Two rules keep that safe. Results wait at most ``FLUSH_S`` while tasks follow each other, and not at all when none is
left. And a task that is about to wait for objects first gives back everything behind it: what it waits for may be
among those.
"""

from collections import deque
from collections.abc import Callable

from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.messages import (
    AnyMessage,
    Blocked,
    Function,
    Interrupt,
    ReturnTasks,
    RunTasks,
    Status,
    TakeBack,
    TaskResult,
    TasksDone,
    Value,
    Where,
)
from trio_ray.runtime.core.spec import Kind, TaskSpec, TaskTemplate

FLUSH_S = 0.001
"""How long finished results may wait for more. A frame costs the worker and the node about 50 µs, so waiting longer
saves little, and dependants of a result wait with it."""


class Input:
    """The value of an input, and the owner of its read pin."""

    __slots__ = ("owner", "value")

    def __init__(self, value: Value, owner: object) -> None:
        self.value = value
        self.owner = owner


Inputs = dict[bytes, Input]
"""What came with one ``RunTasks``, shared by its tasks: the pins end when the last of them is done."""


class WorkerCore:
    """The worker's side of the link, on top of the client's. Only one thread at a time may be in it."""

    def __init__(self, client: ClientCore, adopt: Callable[[Value], object]) -> None:
        self.client = client
        self._adopt = adopt
        self.queue: deque[tuple[TaskSpec, Inputs]] = deque()
        """Not begun, in order."""
        self.running: dict[bytes, TaskSpec] = {}
        self.templates: dict[bytes, TaskTemplate] = {}
        self.functions: dict[bytes, Function] = {}
        self.interrupted: list[bytes] = []
        """Running tasks that the node wants ended; the shell takes them from here after ``receive``."""
        self.actor = b""
        """The actor that this process has become, if any."""
        self._results: list[TaskResult] = []
        self._oldest_at = 0.0
        self._waiting = 0
        """Running tasks that wait for objects."""
        self._blocked = False

    # -- running -------------------------------------------------------------------------------------------------

    def next(self) -> tuple[TaskSpec, Inputs] | None:
        """Begin the next task; None if there is none."""
        if not self.queue:
            return None
        entry = self.queue.popleft()
        self.running[entry[0].task_id] = entry[0]
        return entry

    def done(self, result: TaskResult, now: float) -> bool:
        """A task ended at ``now``. True when results are to be sent now."""
        self.running.pop(result.task_id, None)
        if not self._results:
            self._oldest_at = now
        self._results.append(result)
        return not self.queue or now - self._oldest_at >= FLUSH_S

    @property
    def pending(self) -> bool:
        """Whether ``take`` has anything to do."""
        return bool(self._results) or self.client.pending

    def take(self) -> list[AnyMessage]:
        """What is to be sent now, as one frame."""
        results = self._results
        if not results:
            return self.client.take()
        self._results = []
        return self.client.take(TasksDone(results))

    # -- waiting -------------------------------------------------------------------------------------------------

    def wait_begins(self) -> None:
        """A running task is about to wait for objects."""
        self._waiting += 1
        if self._waiting < len(self.running):
            return
        self._give_back()
        if not self._blocked:
            self._blocked = True
            self.client.send(Blocked(True))

    def wait_ends(self) -> None:
        """It goes on."""
        self._waiting -= 1
        if self._blocked:
            self._blocked = False
            self.client.send(Blocked(False))

    def _give_back(self) -> None:
        """Return what has not begun; an actor's calls stay, they can run nowhere else."""
        if self.queue and not self.actor:
            returned = [spec.task_id for spec, _ in self.queue]
            self.queue.clear()
            self.client.send(ReturnTasks(returned))

    # -- what the node says --------------------------------------------------------------------------------------

    def receive(self, messages: list[AnyMessage]) -> None:
        """Take in what the node says."""
        for message in self.client.receive(messages):
            kind = type(message)
            if kind is RunTasks:
                self._run(message)  # type: ignore[arg-type]
            elif kind is TakeBack:
                self._take_back(message)  # type: ignore[arg-type]
            elif kind is Interrupt:
                self._interrupt(message)  # type: ignore[arg-type]

    def _run(self, message: RunTasks) -> None:
        for template in message.templates:
            self.templates[template.template_id] = template
        for function in message.functions:
            self.functions[function.function_id] = function
        last = message.specs[-1]
        if self.templates[last.template].kind == Kind.ACTOR_CREATION:  # it never shares a batch
            self.actor = last.task_id
        inputs: Inputs = {}
        for value in message.inputs:
            owner = self._adopt(value) if value.where == Where.SHARED else None
            inputs[value.object_id] = Input(value, owner)
        queue = self.queue
        for spec in message.specs:
            queue.append((spec, inputs))
        if self._blocked:
            self._give_back()

    def _take_back(self, message: TakeBack) -> None:
        wanted = set(message.task_ids)
        returned = [spec.task_id for spec, _ in self.queue if spec.task_id in wanted]
        if returned:
            kept = [entry for entry in self.queue if entry[0].task_id not in wanted]
            self.queue.clear()
            self.queue.extend(kept)
        self.client.send(ReturnTasks(returned))

    def _interrupt(self, message: Interrupt) -> None:
        cancelled = set(message.task_ids)
        self.interrupted += [task_id for task_id in message.task_ids if task_id in self.running]
        waiting = [entry for entry in self.queue if entry[0].task_id in cancelled]
        for entry in waiting:
            self.queue.remove(entry)
            self._results.append(TaskResult(entry[0].task_id, Status.CANCELLED, ()))
