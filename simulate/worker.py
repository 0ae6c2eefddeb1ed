"""The simulated worker process: the real ``WorkerCore``, with functions called in the simulator and time charged.

A task first takes its time (its cost, plus the worker's overhead from the profile), then its function is called, at
one simulated moment. Tasks that follow each other within ``FLUSH_S``, which is how long results may wait for each
other anyway, share one SimPy event. What a function submits or puts leaves at the moment of the call; when it waits
for objects, its strand waits while simulated time passes, as a real worker would.
"""

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from trio_ray.runtime.api import context
from trio_ray.runtime.api.actors import READY
from trio_ray.runtime.api.errors import ObjectStoreFullError
from trio_ray.runtime.api.execute import arguments, failure, outputs
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.messages import (
    Address,
    AnyMessage,
    CreateFailed,
    ObjectCreated,
    ObjectsReady,
    Output,
    RunTasks,
    Status,
    TaskResult,
    Value,
)
from trio_ray.runtime.core.spec import Kind, Resources, TaskSpec, TaskTemplate
from trio_ray.runtime.core.worker import FLUSH_S, Inputs, WorkerCore
from trio_ray.simulate.engine import Host, SimulationError
from trio_ray.simulate.functions import (
    Body,
    WorkerSession,
    model_payloads,
)
from trio_ray.simulate.link import Pin, SimulatedLink
from trio_ray.simulate.network import after
from trio_ray.simulate.strand import MustWait, Strand, current

if TYPE_CHECKING:
    from trio_ray.simulate.world import World


class Modelled:
    """What stands for an actor whose class is replaced by a model."""


class Job:
    """A task that the worker has begun."""

    __slots__ = ("begun_at", "body", "called_at", "cancelled", "duration_s", "inputs", "scope", "spec", "stored",
                 "strand", "template", "timed")  # fmt: skip

    def __init__(self, spec: TaskSpec, inputs: Inputs, template: TaskTemplate, body: Body) -> None:
        self.spec = spec
        self.inputs = inputs
        self.template = template
        self.body = body
        self.begun_at = 0.0
        self.duration_s = 0.0
        self.called_at = 0.0
        """When its time was over."""
        self.timed = False
        """Its time is passing: it counts as running."""
        self.cancelled = False
        self.strand: Strand | None = None
        """Where its function waits, if it does."""
        self.scope: trio.CancelScope | None = None
        """Of its coroutine."""
        self.stored: trio.Event | None = None
        """Set when what its coroutine returned is in the object store."""


class SimulatedWorker(SimulatedLink):
    """One worker process."""

    def __init__(self, host: Host, process: Address, world: "World") -> None:
        super().__init__(host, process, world.register)
        self.world = world
        self.worker = WorkerCore(self.core, self._adopt)
        self.session = WorkerSession(self, world.functions, self.worker)
        self._class_id = b""
        self._held: Resources = ()
        """By an actor's calls: what the actor was placed with."""
        self._slots = 1
        """Tasks that may run at once."""
        self._jobs: dict[bytes, Job] = {}
        """Begun and not done."""
        self._due = False
        """Results are to be sent when the functions whose time is over have all been called."""
        self._job: Job | None = None
        """Whose function is being called now, on a strand."""
        self._rest: deque[Job] = deque()
        """What that strand is to call after it."""
        self._waiting: dict[Strand, tuple[Job, deque[Job], Callable[[], bool]]] = {}
        """Strands that wait: for which job, what they are to call after it, and for what."""
        self._instance: Any = None

    # -- the link ----------------------------------------------------------------------------------------------

    def receive(self, messages: list[AnyMessage]) -> None:
        """A frame from the node has arrived."""
        for message in messages:
            if type(message) is RunTasks:
                self.charge(self.engine.profile.worker.frame_s)
            elif type(message) is ObjectsReady:
                self.charge(self.cost.frame_s + len(message.values) * self.cost.get_s)
        self.worker.receive(messages)
        if self.worker.interrupted:
            interrupted, self.worker.interrupted = self.worker.interrupted, []
            for task_id in interrupted:
                self._interrupt(task_id)
        if self.core.pending:
            self.send(self.worker.take())
        for strand, (job, rest, enough) in list(self._waiting.items()):
            if strand in self._waiting and enough():
                self._resume(strand, job, rest, strand.resume)
        self._go_on()

    def flush(self) -> None:
        """Send what was added and what is done."""
        self._due = False
        if not self.closed and self.worker.pending:
            self.send(self.worker.take())

    def end(self, reason: str) -> None:
        """The process is gone: strands and coroutines unwind, nothing is sent any more."""
        super().end(reason)
        for job in list(self._jobs.values()):
            self._stop_timing(job)
            job.cancelled = True
            if job.scope is not None:
                job.scope.cancel()
                self.engine.woken = True
        for strand in list(self._waiting):
            strand.abandon()
            self.world.strands.give_back(strand)
        self._waiting.clear()
        self._jobs.clear()
        self.worker.queue.clear()
        self._instance = None

    # -- beginning tasks ---------------------------------------------------------------------------------------

    def _go_on(self) -> None:
        """Send results that are due, and begin what can be begun."""
        if self.closed:
            return
        if self._due:
            self.flush()
        if self._slots > 1:
            while self.worker.queue and len(self._jobs) < self._slots:
                self._begin([self._next()])
        elif not self._jobs and self.worker.queue:
            first = self._next()
            chunk = [first]
            total = first.duration_s
            if not first.body.is_async and first.template.kind != Kind.ACTOR_CREATION:
                while self.worker.queue and total < FLUSH_S and not first.body.waits:
                    job = self._next()
                    if total + job.duration_s > FLUSH_S or job.body.is_async or job.body.waits:
                        self._unbegin([job])
                        break
                    chunk.append(job)
                    total += job.duration_s
            self._begin(chunk)

    def _next(self) -> Job:
        entry = self.worker.next()
        assert entry is not None
        spec, inputs = entry
        template = self.worker.templates[spec.template]
        if template.kind == Kind.ACTOR_CREATION:
            self._class_id, self._held = template.function_id, template.placement
        body = self.world.functions.body(template.function_id or self._class_id, template)
        job = self._jobs[spec.task_id] = Job(spec, inputs, template, body)
        job.duration_s = body.cost.draw(self.world.costs.rngs, spec.task_id) + self.engine.profile.worker.task_s
        return job

    def _unbegin(self, jobs: list[Job]) -> None:
        """Back into the queue, as if they had not been begun."""
        for job in reversed(jobs):
            task_id = job.spec.task_id
            del self._jobs[task_id], self.worker.running[task_id]
            self.worker.queue.appendleft((job.spec, job.inputs))

    def _begin(self, chunk: list[Job]) -> None:
        """Take these jobs' time one after the other, then call their functions."""
        env = self.engine.env
        begun = max(env.now, self.busy_until)
        for job in chunk:
            job.begun_at = begun
            begun += job.duration_s
            job.timed = True
        self.engine.running += len(chunk)
        if self.worker.pending and begun - env.now > FLUSH_S:
            self.flush()  # results do not wait for a long task
        timeout = env.timeout(begun - env.now, chunk)
        timeout.callbacks.append(self._time_over)

    def _time_over(self, event: Any) -> None:
        jobs: deque[Job] = deque()
        for job in event.value:
            self._stop_timing(job)
            if not job.cancelled:
                job.called_at = self.engine.env.now
                jobs.append(job)
        if not self.closed:
            self._call_all(jobs)

    def _stop_timing(self, job: Job) -> None:
        if job.timed:
            job.timed = False
            self.engine.running -= 1

    # -- calling functions -------------------------------------------------------------------------------------

    def _call_all(self, jobs: deque[Job]) -> None:
        """Call the functions of jobs whose time is over, in order."""
        while jobs:
            job = jobs[0]
            body = job.body
            if body.model is not None:
                jobs.popleft()
                if not self._model(job, body, partial(self._call_all, jobs)):
                    return
            elif body.is_async:
                jobs.popleft()
                if self._due:
                    self.flush()
                self.world.spawn(partial(self._run_async, job, jobs))
                return
            elif body.leaf:
                try:
                    self._call(job)
                    jobs.popleft()
                except MustWait:
                    body.leaf = False
            else:
                strand = self.world.strands.take()
                self._resume(strand, job, jobs, partial(strand.begin, partial(self._on_strand, jobs)))
                return
        self._go_on()

    def _on_strand(self, jobs: deque[Job]) -> None:
        """On a strand: call one function after the other, up to one that is not for a strand."""
        while jobs and jobs[0].body.model is None and not jobs[0].body.is_async:
            self._job = jobs.popleft()
            self._call(self._job)

    def _resume(self, strand: Strand, job: Job, rest: deque[Job], go: Callable[[], bool]) -> None:
        """Let a strand run; when it has finished, what it left is called."""
        self._waiting.pop(strand, None)
        self._job, self._rest = job, rest
        if go():
            self.world.strands.give_back(strand)
            if job.stored is not None:
                job.stored.set()
                self.engine.woken = True
            else:
                self._call_all(rest)

    def _call(self, job: Job) -> None:
        """Call a plain function, at this moment."""
        spec, template = job.spec, job.template
        if job.body.leaf and not spec.borrowed:
            self._call_leaf(job)
            return
        task = self._enter(job)
        token = context.running.set(task)
        status = Status.OK
        try:
            try:
                args, kwargs = arguments(self, spec, job.inputs)
                value = self._target(job)(*args, **kwargs)
                if template.kind == Kind.ACTOR_CREATION:
                    self._instance, value = value, None
                del args, kwargs
                made = outputs(self, spec, template, value)
            except MustWait:
                raise
            except KeyboardInterrupt:
                status, made = Status.CANCELLED, ()
            except (Exception, SystemExit) as error:
                status, made = failure(template, _users(error), self._place)
            self._done(job, task, status, made)
        finally:
            context.running.reset(token)

    def _call_leaf(self, job: Job) -> None:
        """Call a function that can neither wait nor submit nor see a reference, and so needs no context."""
        status = Status.OK
        try:
            args, kwargs = arguments(self, job.spec, job.inputs)
            made = outputs(self, job.spec, job.template, self._target(job)(*args, **kwargs))
        except Exception as error:
            status, made = failure(job.template, _users(error), self._place)
        self._done(job, None, status, made)

    async def _run_async(self, job: Job, jobs: deque[Job]) -> None:
        """Run a coroutine under Trio, on simulated time."""
        task = self._enter(job)
        task.in_trio = True
        context.running.set(task)
        status = Status.OK
        made: tuple[Output, ...] = ()
        with trio.CancelScope() as scope:
            job.scope = scope
            if job.cancelled:
                scope.cancel()
            try:
                args, kwargs = arguments(self, job.spec, job.inputs)
                value = await self._target(job)(*args, **kwargs)
                made = await self._outputs_async(job, value)
            except Exception as error:
                status, made = failure(job.template, _users(error), self._place)
        if scope.cancelled_caught:
            status, made = Status.CANCELLED, ()
        if not self.closed:
            self._done(job, task, status, made)
            self._call_all(jobs)

    async def _outputs_async(self, job: Job, value: object) -> tuple[Output, ...]:
        """``outputs``, on a strand if it has to wait for room in the object store."""
        made: list[tuple[Output, ...]] = []
        errors: list[Exception] = []

        def work() -> None:
            try:
                made.append(outputs(self, job.spec, job.template, value))
            except Exception as error:
                errors.append(error)

        token = context.running.set(None)  # it is this module that waits now, and it may
        try:
            work()
        except MustWait:
            job.stored = trio.Event()
            strand = self.world.strands.take()
            self._resume(strand, job, deque(), partial(strand.begin, work))
            await job.stored.wait()
        finally:
            context.running.reset(token)
        if errors:
            raise errors[0]
        return made[0]

    def _target(self, job: Job) -> Callable[..., Any]:
        template = job.template
        if template.kind != Kind.ACTOR_CALL:
            target: Callable[..., Any] = job.body.target
            return target
        if template.method == READY:
            return lambda: True
        method: Callable[..., Any] = getattr(self._instance, template.method)
        return method

    def _enter(self, job: Job) -> context.TaskContext:
        spec = job.spec
        actor = spec.actor or (spec.task_id if job.template.kind == Kind.ACTOR_CREATION else b"")
        task = context.TaskContext(
            self.session, spec.task_id, spec.scope, name=job.template.name, deadline=spec.deadline, actor_id=actor
        )
        self.world.register.task(task, self)
        return task

    @property
    def _place(self) -> str:
        return f"simulated worker {self.process}"

    # -- modelled functions ------------------------------------------------------------------------------------

    def _model(self, job: Job, body: Body, then: Callable[[], None]) -> bool:
        """Make a modelled task's outputs. False if the object store has to be asked first; ``then`` follows."""
        spec, template, model = job.spec, job.template, body.model
        assert model is not None
        try:
            payloads = body.payloads
            if payloads is None:
                value = model.result
                if model.function is not None:
                    args, kwargs = arguments(self, spec, job.inputs)
                    value = model.function(*args, **kwargs)
                payloads = model_payloads(body, template, value)
                if model.function is None:
                    body.payloads = payloads
        except SimulationError:
            raise
        except Exception as error:
            status, made = failure(template, error, self._place)
            self._done(job, None, status, made)
            return True
        if template.kind == Kind.ACTOR_CREATION:
            self._instance = Modelled()
        size = model.size_bytes
        small = size is None or size <= self.inline_limit or template.kind == Kind.ACTOR_CREATION
        if small and all(len(payload) <= self.inline_limit for payload, _ in payloads):
            made = tuple(Output(payload, -1, len(payload), contained) for payload, contained in payloads)
            self._done(job, None, Status.OK, made)
            return True
        self._store_all(job, payloads, size, then)
        return False

    def _store_all(
        self, job: Job, payloads: list[tuple[bytes, tuple[bytes, ...]]], size: int | None, then: Callable[[], None]
    ) -> None:  # fmt: skip
        """Put modelled values into the object store, without a strand."""
        made: dict[int, Output] = {}
        missing = len(payloads)

        def answered(index: int, answer: ObjectCreated | CreateFailed) -> None:
            nonlocal missing
            missing -= 1
            if isinstance(answer, ObjectCreated) and not job.cancelled:
                payload, contained = payloads[index]
                self.host.arena[answer.offset] = payload
                counted = len(payload) if size is None else size
                self.charge(counted * self.cost.byte_s)
                made[index] = Output(b"", answer.offset, counted, contained)
            elif isinstance(answer, CreateFailed):
                failures.append(answer.reason)
            if not missing and not job.cancelled and not self.closed:
                status, results = Status.OK, tuple(made[index] for index in sorted(made))
                if failures:
                    status, results = failure(job.template, ObjectStoreFullError(failures[0]), self._place)
                self._done(job, None, status, results)
                then()

        failures: list[str] = []
        for index, (payload, _) in enumerate(payloads):
            object_id = ids.return_id(job.spec.task_id, index)
            self.core.create(object_id, len(payload) if size is None else size, partial(answered, index))
        self.flush()

    # -- ending tasks ------------------------------------------------------------------------------------------

    def _done(self, job: Job, task: context.TaskContext | None, status: Status, made: tuple[Output, ...]) -> None:
        spec = job.spec
        del self._jobs[spec.task_id]
        job.inputs = {}
        if status != Status.CANCELLED:
            held = self._held if job.template.kind == Kind.ACTOR_CALL else job.template.resources
            self.engine.meter.ran(job.template.name, self.process, job.begun_at, job.begun_at + job.duration_s, held)
        spawned = False
        if task is not None:
            task.ended = True
            spawned = task.spawned or task.nurseries > 0
            if not next(task.children) and not next(task.puts):
                self.world.register.childless(task)
        now = self.engine.env.now
        duration = job.duration_s + now - job.called_at if job.called_at else now - job.begun_at
        result = TaskResult(spec.task_id, status, made, job.begun_at, duration, spawned)
        if job.template.kind == Kind.ACTOR_CREATION and status == Status.OK:
            self._slots = job.template.max_concurrency
        self._due = self.worker.done(result, now) or self._due

    def _interrupt(self, task_id: bytes) -> None:
        """The node wants a task ended that has been begun."""
        job = self._jobs.get(task_id)
        if job is None or job.cancelled:
            return
        if job.scope is not None:
            job.scope.cancel()
            self.engine.woken = True
        elif job.strand is not None:
            _, rest, _ = self._waiting[job.strand]
            job.strand.interrupt()
            self._resume(job.strand, job, rest, job.strand.resume)
        elif job.timed:
            # Its time is not over: it ends here.
            job.cancelled = True
            self._stop_timing(job)
            self._done(job, None, Status.CANCELLED, ())
        elif job.body.is_async:
            job.cancelled = True  # its coroutine has not begun

    # -- waiting -----------------------------------------------------------------------------------------------

    def _adopt(self, value: Value) -> object:
        return Pin(self, value.object_id)

    def may_block(self) -> None:
        """Functions on strands can wait, and so can what runs under Trio."""
        if current.strand is None:
            task = context.running.get()
            if task is None or not task.in_trio:
                raise MustWait

    def block(self, enough: Callable[[], bool], timeout: float | None = None) -> bool:
        """On a strand: hand over to the simulation until ``enough()``."""
        strand, job = current.strand, self._job
        if strand is None:
            self.worker.wait_begins()
            self.flush()
            try:
                return super().block(enough, timeout)
            finally:
                self.worker.wait_ends()
                self.flush_soon()
        assert job is not None
        return self._block_strand(strand, job, self._rest, enough, timeout)

    def _block_strand(
        self, strand: Strand, job: Job, rest: deque[Job], enough: Callable[[], bool], timeout: float | None
    ) -> bool:  # fmt: skip
        job.body.waits = True
        if rest:  # what was to be called after it goes back to the node
            self._unbegin(list(rest))
            rest.clear()
        expired: list[bool] = []
        if timeout is not None:
            after(self.engine.env, timeout, partial(self._expire, strand, expired))
        self.worker.wait_begins()
        self.flush()
        job.strand = strand
        try:
            while not enough():
                if expired:
                    return False
                self._waiting[strand] = job, rest, enough
                strand.wait()
            return True
        finally:
            job.strand = None
            if not self.closed:
                self.worker.wait_ends()
                self.flush()

    def _expire(self, strand: Strand, expired: list[bool]) -> None:
        expired.append(True)
        waits = self._waiting.get(strand)
        if waits is not None:
            self._resume(strand, waits[0], waits[1], strand.resume)
            self._go_on()


def _users(error: BaseException) -> BaseException:
    """The error without this module's frame, which is no part of the user's program."""
    return error.with_traceback(error.__traceback__.tb_next if error.__traceback__ is not None else None)
