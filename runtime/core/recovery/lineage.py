"""Writing behind: what the control store learns of this node's tasks and objects, in batches, a little later.

Most tasks of a fine-grained program are done, and their results dropped, before the next batch leaves; their lineage
can never be needed again, and they cost the control store nothing but a line in the event log. What lives longer is
written: its lineage to the task table, its location and this node's hold to the object table.
"""

from zlib import crc32

from trio_ray.runtime.core import ids
from trio_ray.runtime.core.effects import AnyEffect, Send
from trio_ray.runtime.core.messages import (
    Address,
    ForgetTasks,
    LogEvents,
    LogTasks,
    PackedEvents,
    TaskRecord,
    control_address,
)
from trio_ray.runtime.core.objects.table import GONE, ObjectTable
from trio_ray.runtime.core.scheduling.local import DONE, TaskEntry
from trio_ray.runtime.core.spec import TaskTemplate
from trio_ray.runtime.core.tasks import Tasks

SWEEP = 1_000
"""Tasks among which to look for those that are over. Few enough that they are in the processor's caches: whatever is
allocated next takes the places of what is let go here."""


class WriteBehind:
    """The node's batches for the control store."""

    def __init__(self, node: Address, shards: int, tasks: Tasks, table: ObjectTable) -> None:
        self._node = node
        self._shards = shards
        self._tasks = tasks
        self._table = table
        self._event_shard = crc32(node.encode()) % shards
        self._enough = SWEEP
        """So many tasks to be logged are worth another look."""
        self._events: list[PackedEvents] = []

    @property
    def pending(self) -> bool:
        """Whether there is something to write."""
        return bool(self._events or self._tasks.events or self._tasks.unlogged or self._table.unreported)

    def sweep(self) -> None:
        """Let go of tasks that are done, with their results dropped, and pack events, if there may be many."""
        if len(self._tasks.unlogged) >= self._enough:
            self._sweep()
            self._enough = max(SWEEP, 2 * len(self._tasks.unlogged))

    def _sweep(self) -> None:
        tasks, table = self._tasks, self._table
        if tasks.events:
            self._events.append(PackedEvents.pack(tasks.events))
            tasks.events = []
        tasks.unlogged = [
            task for task in tasks.unlogged
            if task.phase is not DONE or task.result is None or task.result.state is not GONE
            or task.result.object_id in table.entries  # forgotten, and known again
        ]  # fmt: skip
        table.unreported = [entry for entry in table.unreported if entry.state is not GONE]

    def write(self, effects: list[AnyEffect]) -> None:
        """Send the batches."""
        tasks, table = self._tasks, self._table
        self._sweep()
        self._enough = SWEEP
        if self._events:
            effects.append(Send(control_address(self._event_shard), LogEvents(self._events)))
            self._events = []
        for entry in table.unreported:
            if entry.local and (entry.holders or entry.pins):
                table.export(entry)
        table.unreported = []
        records: dict[int, tuple[list[TaskRecord], dict[bytes, TaskTemplate]]] = {}
        for task in tasks.unlogged:
            spec, result = task.spec, task.result
            if result is not None and result.state is not GONE:
                result.logged = 1
            elif not self._mark_outputs(task) and task.phase is DONE:
                continue
            task.logged = True
            shard = ids.shard_of(spec.task_id, self._shards)
            if shard not in records:
                records[shard] = ([], {})
            batch, templates = records[shard]
            batch.append(TaskRecord(spec, task.node or self._node, 0 if task.phase is DONE else -1))
            if not task.template.logged:
                task.template.logged = True
                templates[spec.template] = task.template.template
        tasks.unlogged = []
        for shard, (batch, templates) in records.items():
            effects.append(Send(control_address(shard), LogTasks(batch, list(templates.values()))))

    def _mark_outputs(self, task: TaskEntry) -> bool:
        """Mark what the task made, or is to make, as having its lineage logged; whether there is any."""
        count = task.template.template.num_returns
        outputs = [self._table.entries.get(ids.return_id(task.spec.task_id, index)) for index in range(count)]
        for output in outputs:
            if output is not None:
                output.logged = count
        return any(outputs)

    def forget(self, effects: list[AnyEffect]) -> None:
        """Drop the lineage of tasks none of whose results exists any more."""
        table = self._table
        if not table.dropped and not self._tasks.ended:
            return
        entries, unfinished = table.entries, self._tasks.entries
        over: list[bytes] = []
        for task in self._tasks.ended:  # its results may have been dropped, and referred to again, before it was done
            if not self._mark_outputs(task):
                over.append(task.spec.task_id)
        self._tasks.ended = []
        for entry in table.dropped:
            task_id = ids.task_of(entry.object_id)
            if task_id not in unfinished and not (
                entry.object_id in entries if entry.logged == 1
                else any(ids.return_id(task_id, index) in entries for index in range(entry.logged))
            ):
                over.append(task_id)
        table.dropped = []
        forgotten: dict[int, dict[bytes, None]] = {}
        for task_id in over:
            shard = ids.shard_of(task_id, self._shards)
            if shard not in forgotten:
                forgotten[shard] = {}
            forgotten[shard][task_id] = None
        for shard, task_ids in forgotten.items():
            effects.append(Send(control_address(shard), ForgetTasks(list(task_ids))))
