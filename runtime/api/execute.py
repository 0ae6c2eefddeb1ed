"""What happens around a call wherever it runs: its arguments in, its outputs out, its exception described.

Real workers and simulated ones both stand on this; how a function is interrupted, threaded or awaited is theirs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from trio_ray.runtime.api.errors import describe_failure
from trio_ray.runtime.api.link import Link
from trio_ray.runtime.api.remote import is_retryable
from trio_ray.runtime.api.serialize import NONE, Packed, deserialize, serialize, serialize_error
from trio_ray.runtime.api.session import NO_ARGUMENTS, unpack_arguments
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.messages import Output, Status
from trio_ray.runtime.core.spec import TaskSpec, TaskTemplate
from trio_ray.runtime.core.worker import Inputs

_NOTHING: tuple[Sequence[Any], Mapping[str, Any]] = ((), {})
NONE_OUTPUTS = (Output(NONE, -1, len(NONE)),)
"""Of a task that returned None."""


def arguments(link: Link, spec: TaskSpec, inputs: Inputs) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """The arguments of a call: references at their top level have become values."""
    if not spec.inputs:
        return _NOTHING if spec.args == NO_ARGUMENTS else unpack_arguments(deserialize(spec.args), ())
    values = []
    for object_id in spec.inputs:
        there = inputs[object_id]
        values.append(deserialize(link.payload(there.value, there.owner)))
    packed = values.pop(0) if spec.packed_args else deserialize(spec.args)
    return unpack_arguments(packed, values)


def returned(template: TaskTemplate, value: Any) -> Sequence[Any]:
    """The return values one by one. Raises ValueError if there are not as many as were declared."""
    count = template.num_returns
    if count == 1:
        return (value,)
    if count == 0:
        return ()
    try:
        values = tuple(value)
    except TypeError:
        raise ValueError(
            f"{template.name} is to return {count} values (num_returns), but returned one {type(value).__name__}"
        ) from None
    if len(values) != count:
        raise ValueError(f"{template.name} is to return {count} values (num_returns), but returned {len(values)}")
    return values


def outputs(link: Link, spec: TaskSpec, template: TaskTemplate, value: Any) -> tuple[Output, ...]:
    """A function's return value as the task's outputs; large ones are in the object store then."""
    if template.num_returns == 1:
        return NONE_OUTPUTS if value is None else (_output(link, spec, template, 0, value),)
    return tuple(_output(link, spec, template, index, item) for index, item in enumerate(returned(template, value)))


def _output(link: Link, spec: TaskSpec, template: TaskTemplate, index: int, value: Any) -> Output:
    try:
        payload, contained = serialize(value, link.inline_limit)
    except TypeError as error:
        raise TypeError(f"the return value of {template.name}: {error}") from error
    if type(payload) is bytes:
        return Output(payload, -1, len(payload), contained)
    assert isinstance(payload, Packed)
    return Output(b"", link.store(ids.return_id(spec.task_id, index), payload), payload.size, contained)


def failure(template: TaskTemplate, error: BaseException, place: str) -> tuple[Status, tuple[Output, ...]]:
    """The status and outputs of a task whose function raised; ``place`` says where it ran."""
    payload = serialize_error(describe_failure(template.name, error, place))
    status = Status.RETRYABLE if is_retryable(template, error) else Status.ERROR
    return status, (Output(payload, -1, len(payload)),) * template.num_returns
