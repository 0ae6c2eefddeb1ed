"""Structured concurrency over the cluster: no task outlives the block in which it was started.

A nursery opens a scope of its own: every task started in it, and everything these start, carries that scope's id. The
block ends when all tasks have. The first failure, an exception in the block or a cancelled Trio scope around it
cancels the scope, wherever its tasks run; the block still waits until they have ended, then raises what went wrong as
one ``ExceptionGroup``. Leaving cleanly ends what the tasks left running.
"""

from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

from trio_ray.runtime.api.actors import ActorClass, ActorMethod
from trio_ray.runtime.api.context import TaskContext, current
from trio_ray.runtime.api.errors import RaySystemError, TaskCancelledError
from trio_ray.runtime.api.refs import ObjectRef
from trio_ray.runtime.api.remote import RemoteFunction, as_remote
from trio_ray.runtime.api.session import Session
from trio_ray.runtime.api.waiting import hear_deadline, wait_in_trio
from trio_ray.runtime.core import ids

if TYPE_CHECKING:
    import trio

STUBBORN_S = 30.0
"""How long a cancelled block waits for its tasks to end. The nodes kill workers whose tasks do not yield after their
own, shorter grace, so only calls of plain actors, which nobody kills for that, can take longer."""


def start(
    context: TaskContext, function: Any, args: tuple[Any, ...], options: dict[str, Any], scope: bytes = b""
) -> Any:
    """Run a remote function, an actor's method or a plain function as a task, or make an actor."""
    session = context.session
    named: dict[str, Any] = {}
    while isinstance(function, partial):
        args = (*function.args, *args)
        named = {**function.keywords, **named}
        function = function.func
    if isinstance(function, ActorClass):
        return (function.options(**options) if options else function).create(session, args, named, scope)
    actor = b""
    if isinstance(function, ActorMethod):
        method = function.options(**options) if options else function
        actor = method.actor_id
        template = method.prepare(session) if not scope else method.with_returns().prepare(session)
    else:
        remote = function if isinstance(function, RemoteFunction) else as_remote(function)
        if options:
            remote = remote.options(**options)
        template = remote.prepare(session) if not scope else remote.with_returns().prepare(session)
    found = session.submit(context, template, args, named, actor, scope=scope)
    return found[0] if len(found) == 1 else found or None


class _Scope:
    """What nurseries and plain scopes share."""

    def __init__(self) -> None:
        self._context: TaskContext
        self._session: Session
        self._scope = b""
        self._open = False
        self._refs: list[ObjectRef] = []
        self._ids: set[bytes] = set()
        self._unheard = False
        """Something was started in it that no reference tells about: an actor, or a task without results."""

    def _enter(self) -> None:
        self._context = context = current()
        self._session = context.session
        self._scope = ids.child_scope(context.scope, context.task_id, next(context.scopes))
        with self._session.link.lock:
            context.nurseries += 1
        self._open = True

    def start_soon(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """Start a task in this scope; a reference to its result (a list of them for several).

        ``function`` is a remote function, an actor's method, a plain function, or an actor class (which gives a
        handle). Keyword arguments are options; bind the function's own with ``functools.partial``.
        """
        if not self._open:
            raise RuntimeError("this nursery is closed: its block has ended, so nothing can be started in it any more")
        started = start(self._context, function, args, options, self._scope)
        if isinstance(started, ObjectRef):
            self._refs.append(started)
            self._ids.add(started)
        elif isinstance(started, list):
            self._refs += started
            self._ids.update(started)
        else:
            self._unheard = True
        return started

    def _end(self, *, cancelled: bool) -> None:
        self._open = False
        try:
            self._session.end_scope(self._scope, done=not (cancelled or self._unheard))
        except RaySystemError:
            pass  # the node is gone, and ends the tasks of a driver it lost
        with self._session.link.lock:
            self._context.nurseries -= 1

    def _errors(self, *, cancelled: bool) -> list[Exception]:
        """What the tasks raised; once cancelled, being cancelled is no error."""
        errors: list[Exception] = []
        seen: set[bytes] = set()
        for ref in self._refs:
            task_id = ids.task_of(ref)
            if task_id in seen or not self._session.is_error(ref):
                continue
            seen.add(task_id)
            error = self._session.read(ref)
            if not (cancelled and isinstance(error, TaskCancelledError)):
                errors.append(error)
        return errors

    def _raise(self, errors: list[Exception], error: BaseException | None) -> None:
        every: list[BaseException] = [*errors]
        if error is not None:
            every.insert(0, error)
        if every:
            raise BaseExceptionGroup("errors of tasks, or in the block, of a trio_ray nursery", every) from None


class Nursery(_Scope):
    """A block that its tasks do not outlive: ``async with cluster.open_nursery() as nursery``."""

    def __init__(self) -> None:
        super().__init__()
        self._failed = False
        self.cancel_scope: trio.CancelScope
        """Around the block and the wait at its end."""

    async def __aenter__(self) -> "Nursery":
        import trio

        self._enter()
        self._deadline = trio.current_effective_deadline()
        self.cancel_scope = trio.CancelScope()
        self.cancel_scope.__enter__()
        self._told = self._session.link.call_soon(self._first_failure)
        with self._session.link.lock:
            self._session.core.error_watchers[self._on_error] = None
        return self

    def _on_error(self, object_id: bytes) -> None:
        if object_id in self._ids and not self._failed:
            self._failed = True
            self._told()

    def _first_failure(self) -> None:
        self.cancel_scope.cancel()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        import trio

        if error is None:
            try:
                failed = await wait_in_trio(
                    self._session, self._refs, len(self._refs), fetch=False, stop_at_error=True
                )  # fmt: skip
                self._failed = self._failed or failed
                if self._failed and any(isinstance(e, TaskCancelledError) for e in self._errors(cancelled=False)):
                    await hear_deadline(self._deadline)
            except BaseException as interrupted:
                error = interrupted
        cancelled = error is not None or self._failed
        with self._session.link.lock:
            self._session.core.error_watchers.pop(self._on_error, None)
        self._end(cancelled=cancelled)
        if cancelled and not self._session.core.failure:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + STUBBORN_S):
                await wait_in_trio(self._session, self._refs, len(self._refs), fetch=False)
        swallowed = self.cancel_scope.__exit__(type(error) if error else None, error, traceback)
        errors = self._errors(cancelled=cancelled)
        if swallowed:
            error = None
        if isinstance(error, trio.Cancelled):
            if errors:
                self._raise(errors, error)
            raise error
        self._raise(errors, error)
        return True


class TaskScope(_Scope):
    """``Nursery`` for plain functions: ``with trio_ray.task_scope() as scope``."""

    def __enter__(self) -> "TaskScope":
        self._enter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        link = self._session.link
        failed = False
        if error is None:
            try:
                link.wait(self._refs, len(self._refs), None, fetch=False, stop_at_error=True)
                failed = any(map(self._session.is_error, self._refs))
            except BaseException as interrupted:
                error = interrupted
        cancelled = failed or error is not None
        self._end(cancelled=cancelled)
        if cancelled and not self._session.core.failure:
            link.wait(self._refs, len(self._refs), STUBBORN_S, fetch=False)
        errors = self._errors(cancelled=cancelled)
        if isinstance(error, KeyboardInterrupt) and not errors:
            raise error
        self._raise(errors, error)


def open_nursery() -> Nursery:
    """A nursery of the running task: ``async with trio_ray.open_nursery() as nursery``."""
    return Nursery()


def task_scope() -> TaskScope:
    """A scope for plain functions: ``with trio_ray.task_scope() as scope: scope.start_soon(f, 1)``."""
    return TaskScope()
