"""Running one task: its arguments in, its outputs out."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trio_ray.runtime.api import code, context
from trio_ray.runtime.api.actors import READY
from trio_ray.runtime.api.errors import describe_failure
from trio_ray.runtime.api.remote import is_retryable
from trio_ray.runtime.api.serialize import NONE, Packed, deserialize, serialize, serialize_error
from trio_ray.runtime.api.session import unpack_arguments
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.messages import Output, Status, TaskResult, Where
from trio_ray.runtime.core.spec import Kind, TaskSpec, TaskTemplate
from trio_ray.runtime.core.worker import Inputs
from trio_ray.runtime.worker.connection import WorkerConnection, WorkerSession

_NO_ARGUMENTS = serialize((), 1 << 20)[0]
_NONE_OUTPUTS = (Output(NONE, -1, len(NONE)),)


class Executor:
    """A worker's functions, and the actor that it has become, if any."""

    def __init__(self, connection: WorkerConnection, session: WorkerSession) -> None:
        self.connection = connection
        self.session = session
        self.instance: Any = None
        """The actor."""
        self.place = f"process {os.getpid()} of node {connection.node.removeprefix('n:')}"
        self._targets: dict[bytes, Any] = {}
        """Functions and classes by their ids."""
        self._methods: dict[str, Callable[..., Any]] = {}

    def template(self, spec: TaskSpec) -> TaskTemplate:
        """The task's template."""
        return self.connection.worker.templates[spec.template]

    def target(self, template: TaskTemplate) -> Callable[..., Any]:
        """What the task calls: a function, a class, or a method of the actor."""
        if template.kind == Kind.ACTOR_CALL:
            method = self._methods.get(template.method)
            if method is None:
                method = _ready if template.method == READY else getattr(self.instance, template.method)
                self._methods[template.method] = method
            return method
        found: Any = self._targets.get(template.function_id)
        if found is None:
            found = self._targets[template.function_id] = code.load(
                self.connection.worker.functions[template.function_id]
            )
        return found  # type: ignore[no-any-return]

    def enter(self, spec: TaskSpec, template: TaskTemplate) -> context.TaskContext:
        """The context in which the task runs."""
        actor = spec.actor or (spec.task_id if template.kind == Kind.ACTOR_CREATION else b"")
        return context.TaskContext(
            self.session, spec.task_id, spec.scope, name=template.name, deadline=spec.deadline, actor_id=actor
        )

    def arguments(self, spec: TaskSpec, inputs: Inputs) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """The arguments: references at the top level have become values."""
        if spec.args == _NO_ARGUMENTS:
            return (), {}
        if not spec.inputs:
            return unpack_arguments(deserialize(spec.args), ())
        values = [self._read(inputs, object_id) for object_id in spec.inputs]
        packed = values.pop(0) if spec.packed_args else deserialize(spec.args)
        return unpack_arguments(packed, values)

    def _read(self, inputs: Inputs, object_id: bytes) -> Any:
        there = inputs[object_id]
        if there.value.where == Where.SHARED:
            return deserialize(self.connection.payload(there.value, there.owner))
        return deserialize(there.value.payload)

    def outputs(self, spec: TaskSpec, template: TaskTemplate, value: Any) -> tuple[Output, ...]:
        """The task's return values, written where they belong."""
        count = template.num_returns
        if count == 1:
            if value is None:
                return _NONE_OUTPUTS
            return (self._output(spec, 0, value),)
        if count == 0:
            return ()
        try:
            values = tuple(value)
        except TypeError:
            raise ValueError(
                f"{template.name} is to return {count} values (num_returns), but returned a {type(value).__name__}"
            ) from None
        if len(values) != count:
            raise ValueError(f"{template.name} is to return {count} values (num_returns), but returned {len(values)}")
        return tuple(self._output(spec, index, item) for index, item in enumerate(values))

    def _output(self, spec: TaskSpec, index: int, value: Any) -> Output:
        try:
            payload, contained = serialize(value, self.connection.inline_limit)
        except TypeError as error:
            raise TypeError(f"the return value: {error}") from error
        if type(payload) is bytes:
            return Output(payload, -1, len(payload), contained)
        assert isinstance(payload, Packed)
        offset = self.connection.store(ids.return_id(spec.task_id, index), payload)
        return Output(b"", offset, payload.size, contained)

    def failure(
        self, template: TaskTemplate, error: BaseException, *, created: bool = True
    ) -> tuple[Status, tuple[Output, ...]]:
        """What is left of a task that raised."""
        payload = serialize_error(describe_failure(template.name, error, self.place))
        status = Status.RETRYABLE if created and is_retryable(template, error) else Status.ERROR
        return status, (Output(payload, -1, len(payload)),) * template.num_returns

    def run(self, spec: TaskSpec, inputs: Inputs, *, interruptible: bool) -> TaskResult:
        """Run a plain function or method, from beginning to end. ``interruptible``: in the main thread."""
        template = self.template(spec)
        task = self.enter(spec, template)
        connection = self.connection
        status = Status.OK
        made: tuple[Output, ...] = ()
        token = context.running.set(task)
        started = time.monotonic()
        try:
            try:
                if interruptible:
                    connection.running_id = spec.task_id
                function = self.target(template)
                args, kwargs = self.arguments(spec, inputs)
                value = function(*args, **kwargs)
                if template.kind == Kind.ACTOR_CREATION:
                    self.instance, value = value, None
                del args, kwargs
                made = self.outputs(spec, template, value)
                del value
            finally:
                connection.running_id = b""
        except KeyboardInterrupt:
            status = Status.CANCELLED
        except BaseException as error:
            status, made = self.failure(template, error)
        ended = time.monotonic()
        context.running.reset(token)
        if connection.worker.interrupted:
            self.forget_interrupt(spec.task_id)
        return TaskResult(spec.task_id, status, made, started, ended - started, task.spawned)

    def forget_interrupt(self, task_id: bytes) -> None:
        """The task has ended, whether or not the node wanted it to."""
        with self.connection.lock:
            interrupted = self.connection.worker.interrupted
            if task_id in interrupted:
                interrupted.remove(task_id)


def _ready() -> bool:
    return True
