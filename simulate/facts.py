"""What the simulation reads off a message: how many items, which ids, how many bytes of payload. Never the payload.

Items are what a message's cost grows with: tasks, results, objects. Ids go into the event log's hash. The payload of
an error counts as ``ERROR_BYTES`` whatever it is, because a pickled traceback holds paths of the machine that
simulates, and a history must not depend on those.
"""

from collections.abc import Callable, Sequence
from typing import Any

from trio_ray.runtime.core import messages as m
from trio_ray.runtime.core.spec import TaskSpec

ERROR_BYTES = 512
"""What an error value counts for: a sentence and a short traceback."""

Facts = tuple[int, bytes, int]
"""Items, ids one after the other, payload bytes."""


def _specs(specs: Sequence[TaskSpec]) -> tuple[bytes, int]:
    return b"".join([spec.task_id for spec in specs]), sum([len(spec.args) for spec in specs])


def _values(values: Sequence[m.Value]) -> tuple[bytes, int]:
    size = 0
    for value in values:
        size += ERROR_BYTES if value.error else len(value.payload)
    return b"".join([value.object_id for value in values]), size


def _submit(message: m.SubmitTasks) -> Facts:
    task_ids, size = _specs(message.specs)
    return len(message.specs), task_ids, size + sum([len(function.pickled) for function in message.functions])


def _pass_on(message: m.PlaceTasks | m.AssignTasks | m.CallActors) -> Facts:
    return (len(message.specs), *_specs(message.specs))


def _run(message: m.RunTasks) -> Facts:
    task_ids, size = _specs(message.specs)
    if message.inputs:
        input_ids, input_size = _values(message.inputs)
        task_ids += input_ids
        size += input_size
    return (
        len(message.specs) + len(message.inputs), task_ids, size + sum([len(f.pickled) for f in message.functions])
    )  # fmt: skip


def _results(message: m.TasksDone | m.TasksFinished) -> Facts:
    size = 0
    for result in message.results:
        if result.status == m.Status.OK:
            for output in result.outputs:
                size += len(output.payload)
        else:
            size += ERROR_BYTES * len(result.outputs)
    return len(message.results), b"".join([result.task_id for result in message.results]), size


def _ready(message: m.ObjectsReady) -> Facts:
    return (len(message.values), *_values(message.values))


def _put(message: m.PutObjects) -> Facts:
    objects = message.objects
    return len(objects), b"".join([item[0] for item in objects]), sum([len(item[1]) for item in objects])


def _pulled(message: m.PulledInline) -> Facts:
    return (1, *_values([message.value]))


def _tasks(message: m.CancelTasks | m.TakeBack | m.ReturnTasks | m.TasksPlaced | m.ForgetTasks) -> Facts:
    return len(message.task_ids), b"".join(message.task_ids), 0


def _objects(message: m.WaitObjects | m.LocateObjects | m.FreeObjects | m.Unpin | m.AbortObjects) -> Facts:
    return len(message.object_ids), b"".join(message.object_ids), 0


def _references(message: m.References | m.HoldObjects | m.ActorHandles) -> Facts:
    return len(message.added) + len(message.removed), b"".join(message.added) + b"".join(message.removed), 0


def _records(message: m.LogTasks) -> Facts:
    return (len(message.records), *_specs([record.spec for record in message.records]))


def _events(message: m.LogEvents) -> Facts:
    return sum([batch.count for batch in message.batches]), b"", 0


def _functions(message: m.PutFunctions | m.Functions) -> Facts:
    functions = message.functions
    return len(functions), b"".join([f.function_id for f in functions]), sum([len(f.pickled) for f in functions])


def _answer(message: m.Answer | m.ControlAnswer) -> Facts:
    return 1, b"", len(message.body)


def _one(message: m.Message) -> Facts:
    """A message about one thing."""
    return 1, b"", 0


def _length_of(field: str) -> Callable[[Any], Facts]:
    return lambda message: (len(getattr(message, field)), b"", 0)


FACTS: dict[type, Callable[[Any], Facts]] = {
    m.SubmitTasks: _submit,
    m.PlaceTasks: _pass_on,
    m.AssignTasks: _pass_on,
    m.CallActors: _pass_on,
    m.RunTasks: _run,
    m.TasksDone: _results,
    m.TasksFinished: _results,
    m.ObjectsReady: _ready,
    m.PutObjects: _put,
    m.PulledInline: _pulled,
    m.CancelTasks: _tasks,
    m.TakeBack: _tasks,
    m.ReturnTasks: _tasks,
    m.TasksPlaced: _tasks,
    m.ForgetTasks: _tasks,
    m.TasksUnplaceable: _tasks,
    m.Interrupt: _tasks,
    m.WaitObjects: _objects,
    m.LocateObjects: _objects,
    m.FreeObjects: _objects,
    m.Unpin: _objects,
    m.AbortObjects: _objects,
    m.References: _references,
    m.HoldObjects: _references,
    m.ActorHandles: _references,
    m.LogTasks: _records,
    m.LogEvents: _events,
    m.PutFunctions: _functions,
    m.Functions: _functions,
    m.Answer: _answer,
    m.ControlAnswer: _answer,
    m.SealObjects: _length_of("objects"),
    m.ObjectsChanged: _length_of("updates"),
    m.ObjectsLocated: _length_of("locations"),
    m.NodesChanged: _length_of("nodes"),
    m.GetFunctions: _length_of("function_ids"),
    m.UpdateActors: _length_of("actors"),
    m.ActorsChanged: _length_of("actors"),
    m.WatchActors: _length_of("actor_ids"),
}


def facts_of(message: m.Message) -> Facts:
    """Items, ids and payload bytes of a message."""
    return FACTS.get(type(message), _one)(message)
