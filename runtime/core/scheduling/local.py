"""The per-node scheduler: which ready task runs on which worker, and when a worker more is needed.

Tasks that ask for the same resources share one first-come first-served queue. A worker *leases* a resource shape and
keeps it while tasks of that shape follow each other, so that acquiring and releasing is per lease, not per task.

Dispatch is pipelined: a worker may hold as many tasks ahead as fit ``PIPELINE_S`` given the function's measured mean
duration, and one when it is unknown or long; a batch then pays for the hop to the worker once. What makes that safe is
taking back: unstarted tasks return when another worker idles, or when theirs blocks (the worker returns those by
itself).
"""

from collections import deque
from enum import IntEnum
from itertools import islice

import msgspec

from trio_ray.runtime.core.effects import AnyEffect, Send, StartWorker, StopWorker
from trio_ray.runtime.core.messages import Address, Function, Load, RunTasks, TakeBack, Value
from trio_ray.runtime.core.objects.table import ObjectEntry, ObjectTable
from trio_ray.runtime.core.spec import Kind, Resources, TaskSpec, TaskTemplate

PIPELINE_S = 0.010
"""How much work a worker may hold ahead. A few times the hop to a worker and back (0.2 ms) keeps it busy; more only
makes what follows a slow task wait."""
MAX_AHEAD = 256
MIN_TASK_S = 2e-5
"""What even an empty task costs a worker; means below it are its clock's noise."""
STALL_S = 0.005
"""A worker that finishes nothing for so long, with tasks behind, gives them up when another idles."""
STUCK_S = 0.25
"""A queue that did not move for so long gives up some of its tasks, for placement to find them another node."""
MEAN_WEIGHT = 0.2
"""Of the newest duration in the exponential average (the paper does not state its coefficient)."""


class Phase(IntEnum):
    """Where a task of this node is."""

    WAITING = 0
    """For inputs, or for its function."""
    READY = 1
    DISPATCHED = 2
    FORWARDED = 3
    """Another node, or placement, has it."""
    DONE = 4


WAITING, READY, DISPATCHED, FORWARDED, DONE = Phase
# Looking one up in the class takes 70 ns in Python 3.11, which counts where it is done for every task.


class TemplateEntry:
    """A template and what was measured of its tasks here."""

    __slots__ = ("ahead", "key", "logged", "mean_s", "simple", "template")

    def __init__(self, template: TaskTemplate) -> None:
        self.template = template
        self.mean_s = 0.0
        self.ahead = 1
        """How many of its tasks a worker may hold."""
        self.key: QueueKey = (template.placement, template.resources)
        self.logged = False
        self.simple = template.kind != Kind.ACTOR_CREATION and template.num_returns == 1
        """Its tasks need none of the care that creations, and several return values, need."""

    def measured(self, count: int, duration_s: float) -> None:
        """So many of its tasks took so long, all together."""
        self.mean_s = mean = average(self.mean_s, count, max(duration_s / count, MIN_TASK_S))
        ahead = int(PIPELINE_S / mean)
        self.ahead = 1 if ahead < 1 else min(ahead, MAX_AHEAD)


def average(mean: float, count: int, newest: float) -> float:
    """The exponential average after ``count`` more figures, whose own mean is ``newest``; ``mean`` is 0 at first."""
    if not mean:
        return newest
    weight = MEAN_WEIGHT if count == 1 else 1.0 - (1.0 - MEAN_WEIGHT) ** count
    return mean + weight * (newest - mean)


QueueKey = tuple[Resources, Resources]
"""What a task needs to be placed, and what it holds while it runs."""


class TaskEntry(msgspec.Struct, gc=False, eq=False):
    """A task that is not done. The hot path reads and writes its fields directly (see ``ObjectEntry``)."""

    spec: TaskSpec
    template: TemplateEntry
    origin: Address
    """The node that waits for its results; empty when it was submitted here."""
    submitted_at: float
    retries: int
    phase: Phase = Phase.WAITING
    using: bool = False
    """Its inputs are kept in place for it."""
    waiting: bool = False
    """It is counted among those that wait for inputs here."""
    missing: int = 0
    """Inputs (and its function) that are not here yet."""
    node: Address = ""
    """Where it was forwarded to, once known."""
    worker: "WorkerEntry | None" = None
    dispatched_at: float = 0.0
    reason: str = ""
    logged: bool = False
    """Its lineage is in the task table."""
    result: ObjectEntry | None = None
    """Its return value, if it is a plain task submitted here: of one return value, with no creation's care."""


class WorkerEntry:
    """A worker process."""

    __slots__ = ("actor", "batch", "blocked", "functions", "inputs", "key", "lasting", "number", "pid", "process",
                 "progress_at", "running", "stopping", "taking_back", "templates")  # fmt: skip

    def __init__(self, process: Address, number: int, pid: int) -> None:
        self.process = process
        self.number = number
        self.pid = pid
        self.key: QueueKey | None = None
        """Its lease; None while idle."""
        self.actor: bytes | None = None
        self.lasting = False
        """Its lease is an actor's."""
        self.running: dict[bytes, TaskEntry] = {}
        """What it was given, in order; the first is (or is about to be) running."""
        self.batch: list[TaskSpec] = []
        """Chosen in this step."""
        self.inputs: dict[bytes, Value] = {}
        self.blocked = False
        self.taking_back = False
        self.stopping = False
        self.progress_at = 0.0
        self.templates: set[bytes] = set()
        self.functions: set[bytes] = set()
        """What it knows already; never iterated."""


class LocalScheduler:
    """Queues, workers and resources of one node."""

    def __init__(self, total: Resources, prestart: int, table: ObjectTable, functions: dict[bytes, Function]) -> None:
        self.total = dict(total)
        self.available = dict(total)
        self.held: dict[str, int] = {}
        """What actors hold, for as long as they live."""
        self.cpus = self.total.get("CPU", 0)
        self.queued = 0
        """Ready tasks that no worker has."""
        self.mean_s = 0.0
        """Exponential average over the durations of all tasks; 0 until one has ended."""
        self.workers: dict[Address, WorkerEntry] = {}
        self.running = 0
        """Tasks that workers have, actor calls left out."""
        self._prestart = prestart
        self._table = table
        self._functions = functions
        self._queues: dict[QueueKey, deque[TaskEntry]] = {}
        self._leased: dict[QueueKey, dict[Address, WorkerEntry]] = {}
        self._idle: dict[Address, WorkerEntry] = {}
        self._starting: dict[int, None] = {}
        self._numbers = 0
        self._touched: dict[Address, WorkerEntry] = {}
        """Workers with something in their batch."""
        self.stalled = False
        """Some worker idles while another holds tasks it has not begun."""
        self._first: dict[QueueKey, bytes] = {}
        """The task at the front of each queue when ``stuck`` was last asked."""

    # -- workers -----------------------------------------------------------------------------------------------

    def start_workers(self, count: int, effects: list[AnyEffect]) -> None:
        """Ask for worker processes."""
        for _ in range(count):
            self._numbers += 1
            self._starting[self._numbers] = None
            effects.append(StartWorker(self._numbers))

    def worker_connected(self, process: Address, number: int, pid: int) -> WorkerEntry:
        """A worker is there, idle."""
        self._starting.pop(number, None)
        worker = WorkerEntry(process, number, pid)
        self.workers[process] = worker
        self._idle[process] = worker
        return worker

    def worker_failed(self, number: int) -> None:
        """A worker that was asked for will not come."""
        self._starting.pop(number, None)

    def worker_lost(self, process: Address) -> list[TaskEntry]:
        """A worker is gone; answers with the tasks it had, the one it was running first."""
        worker = self.workers.pop(process, None)
        if worker is None:
            return []
        self._idle.pop(process, None)
        self._touched.pop(process, None)
        tasks = list(worker.running.values())
        self.running -= sum(1 for task in tasks if task.template.template.kind != Kind.ACTOR_CALL)
        worker.running = {}
        self._end_lease(worker)
        return tasks

    def blocked(self, worker: WorkerEntry, blocked: bool) -> None:
        """The worker's task waits for objects (or goes on): its CPU is lent out meanwhile."""
        if worker.blocked == blocked or worker.key is None:
            return
        worker.blocked = blocked
        for name, units in worker.key[1]:
            if name == "CPU":
                self.available[name] += units if blocked else -units

    def _fits(self, shape: Resources) -> bool:
        available = self.available
        return all(available.get(name, 0) >= units for name, units in shape)

    def feasible(self, shape: Resources) -> bool:
        """Whether the node could ever hold it."""
        total = self.total
        return all(total.get(name, 0) >= units for name, units in shape)

    def _begin_lease(self, worker: WorkerEntry, key: QueueKey) -> None:
        worker.key = key
        self._leased.setdefault(key, {})[worker.process] = worker
        for name, units in key[1]:
            self.available[name] -= units

    def _end_lease(self, worker: WorkerEntry) -> None:
        key = worker.key
        if key is None:
            return
        if worker.blocked:
            self.blocked(worker, False)
        worker.key = None
        self._leased.get(key, {}).pop(worker.process, None)
        for name, units in key[1]:
            self.available[name] += units
        if worker.lasting:
            worker.lasting = False
            for name, units in key[1]:
                self.held[name] -= units
                if not self.held[name]:
                    del self.held[name]

    # -- tasks -------------------------------------------------------------------------------------------------

    def enqueue(self, task: TaskEntry, *, first: bool = False) -> None:
        """The task has all it needs."""
        task.phase = READY
        queue = self._queue(task.template.key)
        if first:
            queue.appendleft(task)
        else:
            queue.append(task)
        self.queued += 1

    def accept(self, tasks: list[TaskEntry], worker: WorkerEntry | None, now: float) -> None:
        """Tasks of one template, ``READY``, need no inputs: they are for an actor's worker, or for whichever."""
        if worker is None:
            self._queue(tasks[0].template.key).extend(tasks)
            self.queued += len(tasks)
            return
        running, batch = worker.running, worker.batch
        for task in tasks:
            task.phase = DISPATCHED  # ``give`` in one go
            task.worker = worker
            task.dispatched_at = now
            spec = task.spec
            running[spec.task_id] = task
            batch.append(spec)
        self._touched[worker.process] = worker

    def _queue(self, key: QueueKey) -> deque[TaskEntry]:
        queue = self._queues.get(key)
        if queue is None:
            queue = self._queues[key] = deque()
        return queue

    def withdraw(self, tasks: list[TaskEntry]) -> None:
        """Take ready tasks out of their queues."""
        gone: dict[QueueKey, set[bytes]] = {}
        for task in tasks:
            gone.setdefault(task.template.key, set()).add(task.spec.task_id)
        for key, ids in gone.items():
            kept = deque(task for task in self._queues[key] if task.spec.task_id not in ids)
            self.queued -= len(self._queues[key]) - len(kept)
            self._queues[key] = kept

    def stuck(self) -> list[TaskEntry]:
        """Tasks of queues that have not moved since this was last asked: another node may have room for them.

        The last to have come, and a few at a time (twice what the node could ever run at once): it may be that no
        other node has room either.
        """
        found: list[TaskEntry] = []
        before, self._first = self._first, {}
        for key, queue in self._queues.items():
            if not queue:
                continue
            first = self._first[key] = queue[0].spec.task_id
            if before.get(key) == first:
                slots = min((self.total.get(name, 0) // units for name, units in key[0]), default=1)
                found += reversed(list(islice(reversed(queue), 2 * max(1, slots))))
        return found

    def give(self, worker: WorkerEntry, task: TaskEntry, now: float) -> None:
        """The worker is to run the task, after those it has."""
        task.phase = DISPATCHED
        task.worker = worker
        task.dispatched_at = now
        spec = task.spec
        worker.running[spec.task_id] = task
        worker.batch.append(spec)
        if spec.inputs:
            self._give_inputs(worker, spec)
        self._touched[worker.process] = worker

    def _give_inputs(self, worker: WorkerEntry, spec: TaskSpec) -> None:
        entries, inputs, process = self._table.entries, worker.inputs, worker.process
        for object_id in spec.inputs:
            if object_id not in inputs:
                inputs[object_id] = self._table.value(entries[object_id], process)

    def measured(self, template: TemplateEntry, count: int, duration_s: float) -> None:
        """So many tasks of a template ran, for so long all together."""
        template.measured(count, duration_s)
        self.mean_s = average(self.mean_s, count, duration_s / count)

    def returned(self, worker: WorkerEntry, task_ids: list[bytes]) -> None:
        """The worker gives back tasks it has not begun."""
        worker.taking_back = False
        for task_id in reversed(task_ids):
            task = worker.running.pop(task_id, None)
            if task is not None:
                self.running -= 1
                task.worker = None
                self.enqueue(task, first=True)

    def dispatch(self, now: float, effects: list[AnyEffect]) -> None:
        """Hand out what can run, ask for workers where they are what is missing, and send the batches."""
        if self.queued:
            waiting = [(key, queue) for key, queue in self._queues.items() if queue]
            for key, queue in waiting:
                self._dispatch_queue(key, queue, alone=len(waiting) == 1, now=now)
            if len(waiting) > 1:  # round robin among shapes
                key = waiting[0][0]
                self._queues[key] = self._queues.pop(key)
        self._settle(now, effects)
        for worker in self._touched.values():
            self._send_batch(worker, effects)
        self._touched.clear()

    def _dispatch_queue(self, key: QueueKey, queue: deque[TaskEntry], *, alone: bool, now: float) -> None:
        takers: list[WorkerEntry] = []
        idle = self._idle
        while idle and len(takers) < len(queue) and self._fits(key[0]):
            worker = idle.popitem()[1]
            self._begin_lease(worker, key)
            takers.append(worker)
        # A worker that was blocked takes its CPU back even if it is lent out: until somebody is done, leases only end.
        overcommitted = bool(key[1]) and self.available.get("CPU", 0) < 0
        for worker in () if overcommitted else self._leased.get(key, {}).values():
            held = len(worker.running)
            if worker.blocked or worker.actor is not None or worker.taking_back or worker.stopping:
                continue
            if (not held or (alone and held * 2 <= queue[0].template.ahead)) and worker not in takers:
                takers.append(worker)
        if not takers:
            return
        share = -(-len(queue) // len(takers))
        for worker in takers:
            if not queue:
                return
            if not worker.running:
                worker.progress_at = now
            given = self._give_some(worker, queue, share, now)
            if given:
                self._touched[worker.process] = worker
                self.queued -= given
                self.running += given

    def _give_some(self, worker: WorkerEntry, queue: deque[TaskEntry], share: int, now: float) -> int:
        """Give the worker up to ``share`` tasks, as many as it may hold; how many these were."""
        running, batch = worker.running, worker.batch
        held = before = len(running)
        template = None
        while queue and held - before < share:
            task = queue[0]
            if task.template is not template:
                template = task.template
                creation = template.template.kind == Kind.ACTOR_CREATION
                ahead = template.ahead
            if held and (creation or held >= ahead or worker.actor is not None):
                break
            queue.popleft()
            held += 1
            task.phase = DISPATCHED  # ``give`` in one go
            task.worker = worker
            task.dispatched_at = now
            spec = task.spec
            running[spec.task_id] = task
            batch.append(spec)
            if spec.inputs:
                self._give_inputs(worker, spec)
            if creation:
                self._take_for_good(worker, task)
                break
        return held - before

    def _take_for_good(self, worker: WorkerEntry, creation: TaskEntry) -> None:
        """The worker becomes an actor."""
        worker.actor = creation.spec.task_id
        worker.lasting = True
        for name, units in creation.template.key[1]:
            self.held[name] = self.held.get(name, 0) + units

    def _settle(self, now: float, effects: list[AnyEffect]) -> None:
        """After handing out: end leases nobody needs, start or stop workers, even out what is queued at workers."""
        free = [
            worker for leased in self._leased.values() for worker in leased.values()
            if not worker.running and worker.actor is None and not worker.stopping
        ]  # fmt: skip
        for worker in free:
            self._end_lease(worker)
            self._idle[worker.process] = worker
        if free and self.queued:
            for key, queue in self._queues.items():
                if queue:
                    self._dispatch_queue(key, queue, alone=False, now=now)
        wanted = 0
        if self.queued:
            for key, queue in self._queues.items():
                if queue:
                    wanted += min(len(queue), self._room(key[0]))
        wanted = max(wanted, 1 if not self._idle else 0)  # one ahead, for actors and blocked workers
        if wanted > len(self._starting) + len(self._idle):
            self.start_workers(wanted - len(self._starting) - len(self._idle), effects)
        surplus = len(self._idle) - 2 * self._prestart - 2
        if surplus > 0:
            for process in list(self._idle)[:surplus]:
                worker = self._idle.pop(process)
                worker.stopping = True
                effects.append(StopWorker(process))
        self.stalled = False
        if self._idle and not self.queued and self.running:
            self.even_out(now, effects)

    def _room(self, shape: Resources) -> int:
        """How many of a shape would fit into what is available."""
        if not shape:
            unblocked = sum(1 for w in self.workers.values() if w.key is not None and not w.blocked and w.actor is None)
            return max(0, max(16, self.cpus // 5_000) - unblocked)
        return max(0, min(self.available.get(name, 0) // units for name, units in shape))

    def even_out(self, now: float, effects: list[AnyEffect]) -> None:
        """Workers idle: take back half of what the fullest worker has not begun, if that is worth the trip."""
        fullest: WorkerEntry | None = None
        for key, leased in self._leased.items():
            if not self._fits(key[0]):
                continue
            for worker in leased.values():
                if len(worker.running) < 2 or worker.taking_back or worker.actor is not None:
                    continue
                self.stalled = True
                last = next(reversed(worker.running.values()))
                ahead_s = (len(worker.running) - 1) * last.template.mean_s
                slow = now - worker.progress_at >= STALL_S
                if (slow or ahead_s >= STALL_S) and (fullest is None or len(worker.running) > len(fullest.running)):
                    fullest = worker
        if fullest is not None:
            task_ids = list(fullest.running)
            begun = 1 if now - fullest.progress_at >= STALL_S else -(-len(task_ids) // 2)
            fullest.taking_back = True
            effects.append(Send(fullest.process, TakeBack(task_ids[begun:])))

    def _send_batch(self, worker: WorkerEntry, effects: list[AnyEffect]) -> None:
        templates: list[TaskTemplate] = []
        functions: list[Function] = []
        last = b""
        for spec in worker.batch:
            if spec.template == last:
                continue
            last = spec.template
            if last not in worker.templates:
                worker.templates.add(last)
                template = worker.running[spec.task_id].template.template
                templates.append(template)
                if template.function_id and template.function_id not in worker.functions:
                    worker.functions.add(template.function_id)
                    functions.append(self._functions[template.function_id])
        effects.append(
            Send(worker.process, RunTasks(worker.batch, list(worker.inputs.values()), templates, functions))
        )
        worker.batch = []
        worker.inputs = {}

    def load(self, waiting: int, store_used: int, bandwidth: float, actors: int, assigned: int) -> Load:
        """What to tell placement; ``waiting`` tasks are here and lack inputs."""
        return Load(
            self.queued + waiting, self.running, tuple(sorted(self.available.items())), self.mean_s, bandwidth,
            store_used, actors, assigned, tuple(sorted(self.held.items())) if self.held else (),
        )  # fmt: skip

    def validate(self) -> None:
        """Assert the scheduler's invariants."""
        assert self.queued == sum(len(queue) for queue in self._queues.values())
        assert self.running == sum(
            task.template.template.kind != Kind.ACTOR_CALL for w in self.workers.values() for task in w.running.values()
        )
        lent = dict(self.total)
        held: dict[str, int] = {}
        for key, leased in self._leased.items():
            for process, worker in leased.items():
                assert worker.key == key and self.workers.get(process) is worker
                for name, units in key[1]:
                    if not (worker.blocked and name == "CPU"):
                        lent[name] -= units
                    if worker.lasting:
                        held[name] = held.get(name, 0) + units
        assert held == self.held, f"actors hold {held}, not {self.held}"
        assert lent == self.available, f"{lent} should be available, {self.available} are"
        for process, worker in self._idle.items():
            assert worker.key is None and not worker.running and self.workers.get(process) is worker
        for worker in self.workers.values():
            assert not worker.batch, "a batch was not sent"
            for task in worker.running.values():
                assert task.phase == Phase.DISPATCHED and task.worker is worker
