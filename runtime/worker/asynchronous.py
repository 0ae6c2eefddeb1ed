"""``async def`` tasks and actors with ``async def`` methods: they run under Trio.

An actor lives under one ``trio.run`` until its process ends. Its calls begin in order, up to ``max_concurrency`` at a
time; plain methods among them run in Trio's thread, between two steps of the others.
"""

import inspect
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import trio

from trio_ray.runtime.api import context
from trio_ray.runtime.api.execute import arguments, failure, outputs
from trio_ray.runtime.client.trio_reader import read_in_trio
from trio_ray.runtime.core.messages import Output, Status, TaskResult
from trio_ray.runtime.core.spec import Kind, TaskSpec
from trio_ray.runtime.core.worker import Inputs
from trio_ray.runtime.worker.execute import Executor

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
        self._nursery: trio.Nursery
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()

    async def live(self, creation: TaskSpec, inputs: Inputs) -> None:
        """Construct the actor, then serve its calls until the process ends."""
        async with read_in_trio(self._connection), trio.open_nursery() as nursery:
            self._nursery = nursery
            await self.run(creation, inputs)
            self._connection.on_tasks = partial(self._news, self._begin)
            self._begin()
            await trio.sleep_forever()

    async def run_one(self, spec: TaskSpec, inputs: Inputs) -> None:
        """Run one task."""
        async with read_in_trio(self._connection):
            self._connection.on_tasks = partial(self._news, self._interrupt)
            try:
                await self.run(spec, inputs)
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
        if self._free and self._connection.worker.queue and not self._woken:
            self._woken = True
            if self._runners:
                trio.lowlevel.reschedule(self._runners.pop())
            else:
                self._nursery.start_soon(self._run_calls)
        self._interrupt()

    def _interrupt(self) -> None:
        for task_id in self._connection.worker.interrupted:
            scope = self._scopes.get(task_id)
            if scope is not None:
                scope.cancel()

    async def _run_calls(self) -> None:
        """Run calls, one after the other. Another runner goes on with the next ones while this one's call waits."""
        checked_at = time.monotonic()
        while True:
            self._woken = False
            entry = self._connection.next() if self._free else None
            if entry is None:
                self._runners.append(trio.lowlevel.current_task())
                await trio.lowlevel.wait_task_rescheduled(self._leave)
                continue
            self._free -= 1
            self._begin()
            await self.run(*entry)
            del entry
            self._free += 1
            if time.monotonic() - checked_at > TURN_S:  # calls that never wait must not keep the others from running
                await trio.lowlevel.checkpoint()
                checked_at = time.monotonic()

    def _leave(self, _: object) -> trio.lowlevel.Abort:
        return trio.lowlevel.Abort.SUCCEEDED

    async def run(self, spec: TaskSpec, inputs: Inputs) -> None:
        """Run a task from beginning to end, and report its result."""
        executor = self._executor
        template = executor.template(spec)
        task = executor.enter(spec, template)
        task.in_trio = True
        context.running.set(task)
        status = Status.OK
        made: tuple[Output, ...] = ()
        started = time.monotonic()
        with trio.CancelScope() as scope:
            self._scopes[spec.task_id] = scope
            if self._connection.worker.interrupted:  # perhaps before it began
                self._interrupt()
            try:
                value: Any = executor.target(template)
                args, kwargs = arguments(self._connection, spec, inputs)
                value = value(*args, **kwargs)
                if inspect.iscoroutine(value):
                    value = await value
                if template.kind == Kind.ACTOR_CREATION:
                    executor.instance, value = value, None
                del args, kwargs
                made = outputs(self._connection, spec, template, value)
                del value
            except (Exception, SystemExit) as error:
                status, made = failure(template, error, executor.place)
        del self._scopes[spec.task_id]
        if scope.cancelled_caught:
            status, made = Status.CANCELLED, ()
        if self._connection.worker.interrupted:
            executor.forget_interrupt(spec.task_id)
        ended = time.monotonic()
        self._connection.done(TaskResult(spec.task_id, status, made, started, ended - started, task.spawned))


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
