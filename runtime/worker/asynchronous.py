"""``async def`` tasks and actors with ``async def`` methods: they run under Trio.

An actor lives under one ``trio.run`` until its process ends. Its calls begin in order, up to ``max_concurrency`` at a
time; plain methods among them run in Trio's thread, between two steps of the others.
"""

import inspect
import threading
import time
import types
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any

import trio

from trio_ray.runtime.api import context
from trio_ray.runtime.api.execute import arguments, failure, outputs
from trio_ray.runtime.client.trio_reader import read_in_trio
from trio_ray.runtime.core.messages import Output, Status, TaskResult
from trio_ray.runtime.core.spec import TaskSpec
from trio_ray.runtime.core.worker import Inputs
from trio_ray.runtime.worker.execute import CREATION, OK, Executor

ENDED = object()
TURN_S = 0.001
"""How long calls may follow each other in one Trio task before others get their turn."""


class AsyncCalls:
    """The async calls that run in this process."""

    def __init__(self, executor: Executor, concurrency: int) -> None:
        self._executor = executor
        self._connection = executor.connection
        self._free = concurrency
        self._runners: list[trio.lowlevel.Task] = []
        """Idle tasks that run calls; making one for each call would cost as much as the rest of the call."""
        self._woken = False
        """A runner was told that there is something to begin, and has not looked yet."""
        self._scopes: dict[bytes, trio.CancelScope] = {}
        self._slow: dict[bytes, bool] = {}
        """By template: whether results are sent before it is called, for it may hold up Trio before it first waits: it
        did so the last time, or was never called."""
        self._nursery: trio.Nursery
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()

    async def live(self, creation: TaskSpec, inputs: Inputs) -> None:
        """Construct the actor, then serve its calls until the process ends."""
        async with read_in_trio(self._connection), trio.open_nursery() as nursery:
            self._nursery = nursery
            await self._run_alone(creation, inputs)
            self._connection.on_tasks = partial(self._news, self._begin)
            self._begin()
            await trio.sleep_forever()

    async def run_one(self, spec: TaskSpec, inputs: Inputs) -> None:
        """Run one task."""
        async with read_in_trio(self._connection):
            self._connection.on_tasks = partial(self._news, self._interrupt)
            try:
                await self._run_alone(spec, inputs)
            finally:
                self._connection.on_tasks = _nothing

    def _news(self, look: Callable[[], None]) -> None:
        """Something arrived. A thread that a call started may have read it; looking is for Trio's own."""
        if threading.get_ident() == self._thread:
            look()
        else:
            self._token.run_sync_soon(look)

    def _begin(self) -> None:
        """Begin what may begin, and end what is to end."""
        self._begin_next()
        self._interrupt()

    def _begin_next(self) -> None:
        if self._free and self._connection.worker.queue and not self._woken:
            self._woken = True
            if self._runners:
                trio.lowlevel.reschedule(self._runners.pop())
            else:
                self._nursery.start_soon(self._serve)

    def _interrupt(self) -> None:
        for task_id in self._connection.worker.interrupted:
            scope = self._scopes.get(task_id)
            if scope is not None:
                scope.cancel()

    async def _run_alone(self, spec: TaskSpec, inputs: Inputs) -> None:
        async def body(scope: trio.CancelScope) -> None:
            self._connection.done(await self._run(scope, spec, inputs, _nothing))

        await _until_cancelled(body)

    async def _serve(self) -> None:
        """Run calls. They share a cancel scope, which costs as much as a short call, until one of them is cancelled."""
        while True:
            await _until_cancelled(self._serve_within)

    async def _serve_within(self, scope: trio.CancelScope) -> None:
        """Run calls, one after the other. Another runner goes on with the next ones while this one's call waits."""
        connection = self._connection
        result: TaskResult | None = None
        turn_ends = time.monotonic() + TURN_S
        while not scope.cancel_called:
            self._woken = False
            entry = connection.next(result) if self._free else None
            result = None
            if entry is None:
                self._runners.append(trio.lowlevel.current_task())
                await trio.lowlevel.wait_task_rescheduled(self._leave)
                continue
            self._free -= 1
            try:
                result = await self._run(scope, *entry, self._begin_next)
            finally:
                self._free += 1
            del entry
            if result.started_at + result.duration_s > turn_ends:  # calls that never wait are not to stop the others
                connection.done(result)
                result = None
                connection.flush()  # one of them may hold up Trio
                await trio.lowlevel.checkpoint()
                turn_ends = time.monotonic() + TURN_S
        if result is not None:
            connection.done(result)

    def _leave(self, _: object) -> trio.lowlevel.Abort:
        return trio.lowlevel.Abort.SUCCEEDED

    async def _run(
        self, scope: trio.CancelScope, spec: TaskSpec, inputs: Inputs, waits: Callable[[], None]
    ) -> TaskResult:
        """Run a task from beginning to end, within ``scope``; ``waits`` is called the first time that it waits.

        One that is cancelled is reported as such before the exception goes on to the scope.
        """
        executor, connection = self._executor, self._connection
        template = executor.template(spec)
        task = executor.enter(spec, template)
        task.in_trio = True
        context.running.set(task)
        status = OK
        made: tuple[Output, ...] = ()
        self._scopes[spec.task_id] = scope
        started = time.monotonic()
        try:
            if connection.worker.interrupted:  # perhaps before it began
                self._interrupt()
            value: Any = executor.target(template)
            args, kwargs = arguments(connection, spec, inputs)
            if self._slow.get(spec.template, True) and connection.pending:
                connection.flush()
            value, trap = _begin(value(*args, **kwargs))
            self._slow[spec.template] = time.monotonic() - started > TURN_S
            if trap is not ENDED:
                waits()
                value = await _go_on(value, trap)
            if template.kind is CREATION:
                executor.instance, value = value, None
            del args, kwargs
            made = outputs(connection, spec, template, value)
            del value
        except (Exception, SystemExit) as error:
            status, made = failure(template, error, executor.place)
        except BaseException:
            if scope.cancel_called:
                self._ended(spec, task)
                ended = time.monotonic()
                connection.done(TaskResult(spec.task_id, Status.CANCELLED, (), started, ended - started))
            raise
        self._ended(spec, task)
        spawned = task.spawned or task.nurseries > 0
        return TaskResult(spec.task_id, status, made, started, time.monotonic() - started, spawned)

    def _ended(self, spec: TaskSpec, task: context.TaskContext) -> None:
        task.ended = True
        del self._scopes[spec.task_id]
        if self._connection.worker.interrupted:
            self._executor.forget_interrupt(spec.task_id)


async def _until_cancelled(body: Callable[[trio.CancelScope], Awaitable[None]]) -> None:
    """Run ``body`` within a cancel scope, which it is given."""
    with trio.CancelScope() as scope:
        try:
            await body(scope)
        except BaseExceptionGroup as errors:
            # What a cancelled call's own tasks raised on their way out: the call counts as cancelled all the same.
            cancelled = errors.subgroup(trio.Cancelled)
            if not scope.cancel_called or cancelled is None or errors.split((trio.Cancelled, Exception))[1]:
                raise
            raise cancelled from None


def _begin(value: Any) -> tuple[Any, Any]:
    """Step a coroutine up to its first wait: itself, and what it waits for. If it never does, its value and ENDED."""
    if not inspect.iscoroutine(value):
        return value, ENDED
    try:
        return value, value.send(None)
    except StopIteration as ended:
        return ended.value, ENDED


@types.coroutine
def _go_on(coroutine: Coroutine[Any, Any, Any], trap: Any) -> Generator[Any, Any, Any]:
    """``await coroutine``, which has begun and waits."""
    try:
        while True:
            try:
                sent = yield trap
            except BaseException as error:
                trap = coroutine.throw(error)
            else:
                trap = coroutine.send(sent)
    except StopIteration as ended:
        return ended.value


def _nothing() -> None:
    pass


def live_as_actor(executor: Executor, creation: TaskSpec, inputs: Inputs) -> None:
    """Go on as an actor with ``async def`` methods, until the node is gone (which ends the process)."""

    async def live() -> None:
        await AsyncCalls(executor, executor.template(creation).max_concurrency).live(creation, inputs)

    trio.run(live)


def run_task(executor: Executor, spec: TaskSpec, inputs: Inputs) -> None:
    """Run one ``async def`` task."""

    async def run() -> None:
        await AsyncCalls(executor, 1).run_one(spec, inputs)

    trio.run(run)
