"""Running one task: its arguments in, its outputs out."""

import os
import time
from collections.abc import Callable
from typing import Any

from trio_ray.runtime.api import code, context
from trio_ray.runtime.api.actors import READY
from trio_ray.runtime.api.execute import arguments, failure, outputs
from trio_ray.runtime.api.session import NO_ARGUMENTS
from trio_ray.runtime.core.messages import Output, Status, TaskResult
from trio_ray.runtime.core.spec import Kind, TaskSpec, TaskTemplate
from trio_ray.runtime.core.worker import Inputs
from trio_ray.runtime.worker.connection import WorkerConnection, WorkerSession

CALL, CREATION, OK = Kind.ACTOR_CALL, Kind.ACTOR_CREATION, Status.OK
# Looking one up in its class takes 70 ns in Python 3.11, which counts where it is done for every task.


class Executor:
    """A worker's functions, and the actor that it has become, if any."""

    def __init__(self, connection: WorkerConnection, session: WorkerSession) -> None:
        self.connection = connection
        self.session = session
        self.instance: Any = None
        """The actor."""
        self.place = f"process {os.getpid()} of node {connection.node.removeprefix('n:')}"
        self._targets: dict[bytes, Any] = {}
        """What each template calls, by its id."""

    def template(self, spec: TaskSpec) -> TaskTemplate:
        """The task's template."""
        return self.connection.worker.templates[spec.template]

    def target(self, template: TaskTemplate) -> Callable[..., Any]:
        """What the task calls: a function, a class, or a method of the actor."""
        found = self._targets.get(template.template_id)
        if found is None:
            if template.kind != CALL:
                found = code.load(self.connection.worker.functions[template.function_id])
            elif template.method == READY:
                found = _ready
            else:
                found = getattr(self.instance, template.method)
            self._targets[template.template_id] = found
        return found

    def enter(self, spec: TaskSpec, template: TaskTemplate) -> context.TaskContext:
        """The context in which the task runs."""
        actor = spec.actor or (spec.task_id if template.kind is CREATION else b"")
        return context.TaskContext(self.session, spec.task_id, spec.scope, template.name, spec.deadline, actor)

    def run(self, spec: TaskSpec, template: TaskTemplate, inputs: Inputs, *, interruptible: bool) -> TaskResult:
        """Run a plain function or method, from beginning to end. ``interruptible``: in the main thread."""
        task = self.enter(spec, template)
        connection = self.connection
        status = OK
        made: tuple[Output, ...] = ()
        token = context.running.set(task)
        started = time.monotonic()
        try:
            try:
                if interruptible:
                    connection.begins(spec.task_id)
                function = self._targets.get(spec.template) or self.target(template)
                if spec.args == NO_ARGUMENTS and not spec.inputs:
                    value = function()
                else:
                    args, kwargs = arguments(connection, spec, inputs)
                    value = function(*args, **kwargs)
                    del args, kwargs
                if template.kind is CREATION:
                    self.instance, value = value, None
                made = outputs(connection, spec, template, value)
                del value
            finally:
                connection.running_id = b""
        except KeyboardInterrupt:
            status = Status.CANCELLED
        except BaseException as error:
            status, made = failure(template, error, self.place)
        ended = time.monotonic()
        context.running.reset(token)
        task.ended = True
        if connection.worker.interrupted:
            self.forget_interrupt(spec.task_id)
        return TaskResult(spec.task_id, status, made, started, ended - started, task.spawned or task.nurseries > 0)

    def forget_interrupt(self, task_id: bytes) -> None:
        """The task has ended, whether or not the node wanted it to."""
        with self.connection.lock:
            interrupted = self.connection.worker.interrupted
            if task_id in interrupted:
                interrupted.remove(task_id)


def _ready() -> bool:
    return True
