"""The functions of a simulated program, and the sessions that know them.

Functions come from the simulation's own table rather than out of a pickle; arguments and results are serialized as
ever. What happens around a call is ``runtime.api.execute``, as in a real worker.
"""

import inspect
from collections.abc import Sequence
from types import BuiltinFunctionType
from typing import TYPE_CHECKING, Any

import msgspec

from trio_ray.runtime.api.code import Code
from trio_ray.runtime.api.execute import returned
from trio_ray.runtime.api.serialize import serialize
from trio_ray.runtime.api.session import Session
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.messages import Function
from trio_ray.runtime.core.spec import Kind, TaskTemplate
from trio_ray.runtime.core.worker import WorkerCore
from trio_ray.simulate.costs import CostError, Model, TaskCost, TaskCosts
from trio_ray.simulate.strand import is_leaf

if TYPE_CHECKING:
    from trio_ray.simulate.link import SimulatedLink

class Functions:
    """The functions and classes of a simulated program, by ids made of their names.

    A real function's id is a digest of its pickled code, which holds paths and the order of sets. Here it is a digest
    of module and qualified name (and a number, for one of several made at the same place), so that a history is the
    same everywhere.
    """

    def __init__(self, costs: TaskCosts) -> None:
        self.costs = costs
        self._targets: dict[bytes, Any] = {}
        self._ids: dict[int, bytes] = {}
        self._same_name: dict[str, int] = {}
        self._bodies: dict[tuple[bytes, str], Body] = {}

    def register(self, code: Code) -> bytes:
        """The id of a function or class."""
        target = code.target
        known = self._ids.get(id(target))
        if known is not None:
            return known
        name = f"{getattr(target, '__module__', '')}:{getattr(target, '__qualname__', code.name)}"
        number = self._same_name[name] = self._same_name.get(name, 0) + 1
        function_id = self._ids[id(target)] = ids.content_id(f"{name}#{number}".encode())
        self._targets[function_id] = target
        return function_id

    def body(self, function_id: bytes, template: TaskTemplate) -> "Body":
        """What a task of this template runs; for an actor call, ``function_id`` is its class's."""
        key = function_id, template.method
        body = self._bodies.get(key)
        if body is None:
            target = self._targets[function_id]
            cls = None
            if template.kind == Kind.ACTOR_CALL:
                cls, target = target, getattr(target, template.method, None)
            body = self._bodies[key] = Body(target, cls, template, self.costs)
        return body


class Body:
    """A function (class, method) as workers run it."""

    __slots__ = ("cost", "is_async", "leaf", "model", "payloads", "target", "waits")

    def __init__(self, target: Any, cls: Any, template: TaskTemplate, costs: TaskCosts) -> None:
        self.target = target
        self.cost: TaskCost = costs.of(target, template.name)
        self.model: Model | None = self.cost.model
        if cls is not None and self.model is None and costs.of(cls, cls.__name__).model is not None:
            self.model = _missing_model(template.name)
        self.leaf = is_leaf(target) or isinstance(target, BuiltinFunctionType)
        """Plainly cannot wait, so it needs no strand."""
        self.is_async = self.model is None and inspect.iscoroutinefunction(target)
        self.waits = False
        """It has waited before; tasks that follow it would only have to be given back."""
        self.payloads: list[tuple[bytes, tuple[bytes, ...]]] | None = None
        """Of a model with a fixed result: each return value's payload and the references inside."""


def _missing_model(name: str) -> Model:
    def refuse(*args: object, **kwargs: object) -> None:
        raise CostError(
            f"{name} was called, but the simulation's costs replace its class by a model, so there is no object to "
            f"call it on; give costs an entry for {name!r} that is a model too"
        )

    return Model(0.0, None, refuse, None)


class SimulatedSession(Session):
    """A session whose functions go by the simulation's table instead of as pickles."""

    def __init__(self, link: "SimulatedLink", functions: Functions) -> None:
        super().__init__(link)
        self._functions = functions

    def prepare(self, template: TaskTemplate, code: Code | None) -> None:
        """Make the link know a template, and the function it names, before its first task."""
        if template.template_id in self.prepared:
            return
        if code is not None:
            function_id = self._functions.register(code)
            self.core.send(Function(function_id, code.name, b""))
            template = msgspec.structs.replace(template, function_id=function_id)
        self.core.send(template)
        self.prepared.add(template.template_id)


class WorkerSession(SimulatedSession):
    """A worker's: its tasks lend their CPU out while they wait."""

    def __init__(self, link: "SimulatedLink", functions: Functions, worker: WorkerCore) -> None:
        super().__init__(link, functions)
        self._worker = worker

    def wait_begins(self) -> None:
        """A coroutine of this worker is about to wait."""
        self._worker.wait_begins()

    def wait_ends(self) -> None:
        """It goes on."""
        self._worker.wait_ends()


def model_payloads(body: Body, template: TaskTemplate, value: object) -> list[tuple[bytes, tuple[bytes, ...]]]:
    """A model's return values as payloads, with the references inside. Small whatever their declared size: only that
    size is accounted for."""
    found = []
    size = body.model.size_bytes if body.model is not None else None
    values: Sequence[object] = (None,) if template.kind == Kind.ACTOR_CREATION else ()
    if not values:
        values = (value,) * template.num_returns if value is None else returned(template, value)
    for item in values:
        payload, contained = serialize(item, 1 << 62)
        assert isinstance(payload, bytes)
        if size is not None and len(payload) < size <= INLINE_PADDING:
            payload += bytes(size - len(payload))  # what follows a pickle's end is not read
        found.append((payload, contained))
    return found


INLINE_PADDING = 100 * 1024
"""Modelled values up to this many bytes travel in messages, at their size."""
