"""What a process does through its link: submit, put, read. The same for drivers and workers, real and simulated."""

import pickle
from collections.abc import Mapping, Sequence
from math import inf
from typing import Any
from weakref import WeakValueDictionary

import msgspec

from trio_ray.runtime.api.code import Code
from trio_ray.runtime.api.context import TaskContext
from trio_ray.runtime.api.errors import ObjectLostError, RayError, RaySystemError
from trio_ray.runtime.api.link import Link
from trio_ray.runtime.api.refs import ObjectRef, owned
from trio_ray.runtime.api.serialize import NONE, Packed, deserialize, serialize
from trio_ray.runtime.api.waiting import Left
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.client import INLINE
from trio_ray.runtime.core.messages import CancelScope, CancelTasks, KillActor, SealObjects, Value, Where
from trio_ray.runtime.core.spec import TaskSpec, TaskTemplate

_ZERO = bytes(4)
NO_ARGUMENTS = pickle.dumps((), 5)
"""The payload of a call without any."""
_NO_IDS: tuple[bytes, ...] = ()
new_bytes = bytes.__new__


def make_template(template: TaskTemplate) -> TaskTemplate:
    """The template with its id: the digest of all the rest."""
    digest = ids.content_id(msgspec.msgpack.encode(template))
    return msgspec.structs.replace(template, template_id=digest)


class Session:
    """A process's part in the cluster."""

    def __init__(self, link: Link, *, namespace: str = "default") -> None:
        self.link = link
        self.core = link.core
        self.namespace = namespace
        self.prepared: set[bytes] = set()
        """Templates that this link has been given."""
        self.named_actors: WeakValueDictionary[str, Any] = WeakValueDictionary()
        """Handles of named actors that this process created, by ``namespace/name``."""
        self.left = Left()
        self.turns, self.turn_ends = 0, 0.0
        """Waits for what was there since Trio's other tasks had a turn, and when they are to have one at the latest."""
        self.root = TaskContext(self, ids.root_task_id(link.process), ids.job_scope(link.process))
        """The process's own, implicit task."""

    # -- submitting --------------------------------------------------------------------------------------------

    def prepare(self, template: TaskTemplate, code: Code | None) -> None:
        """Make the link know a template, and the function it names, before its first task."""
        if template.template_id in self.prepared:
            return
        if code is not None:
            self.core.send(code.export())
        self.core.send(template)
        self.prepared.add(template.template_id)

    def submit(
        self, context: TaskContext, template: TaskTemplate, args: tuple[Any, ...], kwargs: Mapping[str, Any],
        actor: bytes = b"", actor_name: str = "", scope: bytes = b"",
    ) -> list[ObjectRef]:  # fmt: skip
        """Run a task; references to its return values."""
        if args or kwargs:
            payload, inputs, borrowed, packed = self._arguments(context, template, args, kwargs)
        else:
            payload, inputs, borrowed, packed = NO_ARGUMENTS, _NO_IDS, _NO_IDS, None
        task_id = (context.known_prefix or context.prefix) + next(context.children).to_bytes(5, "big")
        if not scope:
            scope = context.scope
            context.spawned = True
        deadline = context.deadline
        if context.in_trio:
            deadline = _trio_deadline(self.link, deadline)
        core = self.core
        spec = TaskSpec(
            task_id, template.template_id, payload, inputs, borrowed, scope, core.process, actor,
            deadline, packed is not None, actor_name,
        )  # fmt: skip
        if template.num_returns == 1:
            object_id = task_id + _ZERO
            counts, values = core.counts, core.values
            counts[object_id] = counts.get(object_id, 0) + 1
            if object_id not in values:
                values[object_id] = None
                core.expected += 1
            core.out.append(spec)
            self.link.flush_soon()
            return [new_bytes(ObjectRef, object_id)]  # ``owned``
        returns = [ids.return_id(task_id, index) for index in range(template.num_returns)]
        core.submit(spec, returns)
        self.link.flush_soon()
        return [owned(object_id) for object_id in returns]

    def _arguments(
        self, context: TaskContext, template: TaskTemplate, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> tuple[bytes, tuple[bytes, ...], tuple[bytes, ...], ObjectRef | None]:
        """The arguments' payload, the objects they are, the objects nested in them, and the object that holds them."""
        inputs: tuple[bytes, ...] = _NO_IDS
        slots: list[tuple[int | str, int]] = []
        found: dict[bytes, int] = {}
        plain: Any = args
        for position, argument in enumerate(args):
            if type(argument) is ObjectRef:
                slots.append((position, found.setdefault(bytes(argument), len(found))))
        if kwargs:
            for name, argument in kwargs.items():
                if type(argument) is ObjectRef:
                    slots.append((name, found.setdefault(bytes(argument), len(found))))
        if slots:
            inputs = tuple(found)
            cleared = [None if type(argument) is ObjectRef else argument for argument in args]
            named = {name: None if type(value) is ObjectRef else value for name, value in kwargs.items()}
            plain = [cleared, named, slots]
        elif kwargs:
            plain = [args, kwargs, ()]
        try:
            payload, borrowed = serialize(plain, self.link.inline_limit)
        except TypeError as error:
            raise TypeError(f"an argument of {template.name}: {_blame(args, kwargs, error)}") from error
        if type(payload) is bytes:
            return payload, inputs, borrowed, None
        holder = self._store(context, payload, borrowed)
        holder_id = bytes(holder)
        return b"", (holder_id, *(object_id for object_id in inputs if object_id != holder_id)), borrowed, holder

    # -- objects -----------------------------------------------------------------------------------------------

    def put(self, context: TaskContext, value: object) -> ObjectRef:
        """Store a value."""
        if isinstance(value, ObjectRef):
            raise TypeError(
                "put() was given an ObjectRef, which refers to an object that is stored already; pass the reference "
                "on as it is, or put a list that holds it"
            )
        payload, contained = serialize(value, self.link.inline_limit)
        if type(payload) is bytes:
            object_id = ids.put_id(context.task_id, next(context.puts))
            self.core.put(object_id, payload, contained)
            self.link.flush_soon()
            return owned(object_id)
        return self._store(context, payload, contained)

    def _store(self, context: TaskContext, payload: bytes | Packed, contained: tuple[bytes, ...]) -> ObjectRef:
        object_id = ids.put_id(context.task_id, next(context.puts))
        packed = payload if isinstance(payload, Packed) else Packed([(0, payload)], len(payload))
        self.link.store(object_id, packed)
        self.core.own(object_id, Value(object_id, Where.ELSEWHERE, b"", 0, packed.size))
        self.core.send(SealObjects([(object_id, contained)]))
        self.link.flush_soon()
        return owned(object_id)

    def read(self, ref: bytes) -> Any:
        """The value of an object that is readable here; an error's exception, not raised."""
        core = self.core
        value = core.values.get(ref)
        if value is None:
            if core.failure:
                raise RaySystemError(core.failure)
            raise ObjectLostError(f"the object {ref.hex()} is not here")
        if value.where is INLINE:
            return None if value.payload == NONE else deserialize(value.payload)
        if core.crowded and not core.failure:  # it is large, and may hold thousands more
            self.link.flush()
        return deserialize(self.link.payload(value, core.owners.get(ref)))

    def read_if_ready(self, ref: bytes) -> Any:
        """``read``, or None for an object that is not here (yet)."""
        return self.read(ref) if self.core.readable(ref) else None

    def is_error(self, ref: bytes) -> bool:
        """Whether an object that exists is an error."""
        value = self.core.values.get(ref)
        return value is not None and value.error

    def read_all(self, wanted: Sequence[ObjectRef], *, return_exceptions: bool) -> list[Any]:
        """The values of readable objects; raises the first that is an error, unless ``return_exceptions``."""
        values, here = [], self.core.values
        for ref in wanted:
            told = here.get(ref)
            if told is not None and told.where is INLINE and not told.error:  # most are small and fine
                values.append(None if told.payload == NONE else deserialize(told.payload))
                continue
            value = self.read(ref)
            if not return_exceptions and isinstance(value, RayError) and self.is_error(ref):
                try:
                    raise value
                finally:  # or it and this frame, with the references in it, would keep each other alive
                    del value
            values.append(value)
        return values

    # -- waiting -----------------------------------------------------------------------------------------------

    def wait_begins(self) -> None:
        """An async task is about to wait for objects; a worker then lends its CPU out. Called under the link's lock."""

    def wait_ends(self) -> None:
        """It goes on. Called under the link's lock."""

    # -- ending ------------------------------------------------------------------------------------------------

    def cancel(self, ref: ObjectRef, *, force: bool, recursive: bool) -> None:
        """Cancel the task that makes an object."""
        self.core.send(CancelTasks([ids.task_of(bytes(ref))], force, recursive))
        self.link.flush()

    def end_scope(self, scope: bytes, *, done: bool) -> None:
        """Cancel all that belongs to a scope; ``done``: what was started in it has ended, and raised nothing."""
        self.core.send(CancelScope(scope, done))
        if done:
            self.link.flush_soon()
        else:
            self.link.flush()

    def kill_actor(self, actor_id: bytes, *, no_restart: bool) -> None:
        """End an actor now."""
        self.core.send(KillActor(actor_id, no_restart))
        self.link.flush()


def _trio_deadline(link: Link, inherited: float | None) -> float | None:
    """The earlier of the task's own deadline and that of the Trio cancel scopes around; on the node's clock."""
    import trio

    if not trio.lowlevel.in_trio_run():  # a plain thread that a Trio task started
        return inherited
    deadline = trio.current_effective_deadline()
    if deadline == inf:
        return inherited
    own = link.now() + deadline - trio.current_time()
    return own if inherited is None else min(inherited, own)


def _blame(args: tuple[Any, ...], kwargs: Mapping[str, Any], error: TypeError) -> str:
    """Which argument could not be serialized."""
    for name, value in (*((f"number {index}", value) for index, value in enumerate(args)), *kwargs.items()):
        if type(value) is ObjectRef:
            continue
        try:
            serialize(value, 1 << 62)
        except TypeError as own:
            return f"{name}: {own}"
    return str(error)


def unpack_arguments(payload: Any, inputs: Sequence[Any]) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The positional and named arguments from what ``Session`` packed, with the input objects' values put in."""
    if type(payload) is tuple:
        return payload, {}
    args, kwargs, slots = payload
    for place, index in slots:
        if type(place) is int:
            args[place] = inputs[index]
        else:
            kwargs[place] = inputs[index]
    return args, kwargs
