"""Views of the tables for people and tools: plain values that any language reads.

A node asks one shard. Most tables are spread over all shards, so the shard asked gathers the others' rows and
answers when it has them all.
"""

from collections.abc import Callable

import msgspec

from trio_ray.runtime.core.control.tables import ActorTable, EventLog, NameTable, NodeTable, ObjectTable, TaskTable
from trio_ray.runtime.core.effects import AnyEffect, Send
from trio_ray.runtime.core.messages import ActorInfo, Address, ControlAnswer, ControlQuery, Status
from trio_ray.runtime.core.spec import RESOURCE_UNIT, amounts

Plain = None | bool | int | float | str | list["Plain"] | dict[str, "Plain"]

ROWS = 10_000
"""How many rows of a table an answer holds unless the argument says otherwise: the newest."""


class _Gathering:
    """A query that other shards have been asked about."""

    __slots__ = ("asker", "missing", "process", "query", "rows")

    def __init__(self, asker: Address, query: ControlQuery, rows: list[Plain], missing: int) -> None:
        self.asker = asker
        self.query = query
        self.rows = rows
        self.missing = missing


class Queries:
    """Answers ``ControlQuery``."""

    def __init__(
        self, address: Address, others: list[Address], nodes: NodeTable, objects: ObjectTable, tasks: TaskTable,
        events: EventLog, actors: ActorTable, names: NameTable,
    ) -> None:  # fmt: skip
        self._address = address
        self._others = others
        self._nodes = nodes
        self._objects = objects
        self._tasks = tasks
        self._events = events
        self._actors = actors
        self._names = names
        self._gathering: dict[int, _Gathering] = {}
        self._asked = 0
        self._whole: dict[str, Callable[[str], Plain]] = {
            "nodes": lambda argument: self._node_rows(),
            "resources": lambda argument: self._resources(),
            "actor": self._named_actor,
        }
        """Subjects that shard 0 (or any with a copy of the node table) answers alone."""
        self._spread: dict[str, Callable[[int], list[Plain]]] = {
            "actors": self._actor_rows,
            "tasks": self._task_rows,
            "objects": self._object_rows,
            "timeline": self._event_rows,
        }

    def asked(self, source: Address, query: ControlQuery) -> list[AnyEffect]:
        """A node, or another shard that gathers, asks."""
        subject = query.subject
        try:
            if subject in self._whole:
                return [_answer(source, query, self._whole[subject](query.argument))]
            if subject not in self._spread:
                known = ", ".join(sorted((*self._whole, *self._spread)))
                raise LookupError(f"there is no view called {subject!r} of the cluster; choose one of {known}")
            rows = self._spread[subject](_limit(query.argument))
        except LookupError as error:
            return [Send(source, ControlAnswer(query.process, query.number, b"", str(error.args[0])))]
        if not self._others or source in self._others:
            return [_answer(source, query, rows)]
        self._asked += 1
        self._gathering[self._asked] = _Gathering(source, query, rows, len(self._others))
        ask = ControlQuery(self._address, self._asked, subject, query.argument)
        return [Send(other, ask) for other in self._others]

    def answered(self, source: Address, answer: ControlAnswer) -> list[AnyEffect]:
        """Another shard's rows."""
        gathering = self._gathering[answer.number]
        gathering.rows += msgspec.msgpack.decode(answer.body, type=list[object])
        gathering.missing -= 1
        if gathering.missing:
            return []
        del self._gathering[answer.number]
        return [_answer(gathering.asker, gathering.query, gathering.rows)]

    # -- views -------------------------------------------------------------------------------------------------

    def _node_rows(self) -> Plain:
        return [
            {
                "node": info.node,
                "host": info.host,
                "alive": info.alive,
                "resources": {**amounts(info.resources)},
                "labels": {**dict(info.labels)},
                "store_bytes": info.store_bytes,
            }
            for info in self._nodes.rows.values()
        ]

    def _resources(self) -> Plain:
        total: dict[str, int] = {}
        for info in self._nodes.rows.values():
            if info.alive:
                for name, units in info.resources:
                    total[name] = total.get(name, 0) + units
        return {name: units / RESOURCE_UNIT for name, units in sorted(total.items())}

    def _named_actor(self, full_name: str) -> Plain:
        info = self._names.rows.get(full_name)
        if info is None:
            namespace, _, name = full_name.partition("/")
            raise LookupError(
                f"there is no actor named {name!r} in the namespace {namespace!r}; it was not created yet, its name is "
                "spelt or placed otherwise, or it has died"
            )
        return _actor_row(info)

    def _actor_rows(self, limit: int) -> list[Plain]:
        return [_actor_row(info) for info in list(self._actors.rows.values())[-limit:]]

    def _task_rows(self, limit: int) -> list[Plain]:
        rows: list[Plain] = []
        for record in list(self._tasks.records.values())[-limit:]:
            template = self._tasks.templates.get(record.spec.template)
            rows.append(
                {
                    "task_id": record.spec.task_id.hex(),
                    "name": template.name if template else "",
                    "state": Status(record.status).name if record.status >= 0 else "PENDING",
                    "node": record.node,
                    "submitter": record.spec.submitter,
                    "actor_id": record.spec.actor.hex(),
                }
            )
        return rows

    def _object_rows(self, limit: int) -> list[Plain]:
        return [
            {"object_id": object_id.hex(), "size": row.size, "nodes": [*row.nodes], "held_by": [*(row.holds or ())]}
            for object_id, row in list(self._objects.rows.items())[-limit:]
        ]

    def _event_rows(self, limit: int) -> list[Plain]:
        return [
            {
                "task_id": event.task_id.hex(),
                "name": event.name,
                "process": event.process,
                "submitted_at": event.submitted_at,
                "dispatched_at": event.dispatched_at,
                "started_at": event.started_at,
                "ended_at": event.ended_at,
                "status": Status(event.status).name,
                "reason": event.reason,
            }
            for event in self._events.newest(limit)
        ]


def _actor_row(info: ActorInfo) -> dict[str, Plain]:
    namespace, _, name = info.name.partition("/")
    template = info.template
    return {
        "actor_id": info.actor_id.hex(),
        "name": name,
        "namespace": namespace,
        "class_name": info.class_name,
        "state": info.state.name,
        "node": info.node,
        "reason": info.reason,
        "function_id": template.function_id.hex() if template else "",
        "template_id": template.template_id.hex() if template else "",
        "max_concurrency": template.max_concurrency if template else 1,
        "is_async": template.is_async if template else False,
    }


def _limit(argument: str) -> int:
    if not argument:
        return ROWS
    if not argument.isdecimal() or not int(argument):
        raise LookupError(f"the number of rows to show is {argument!r}; it must be a whole number above zero")
    return int(argument)


def _answer(to: Address, query: ControlQuery, value: Plain) -> Send:
    return Send(to, ControlAnswer(query.process, query.number, msgspec.msgpack.encode(value)))
