"""The machine of one node: composes scheduler, objects, actors, transfers and recovery.

A step takes in everything that arrived together, lets the parts act on it, and closes with one round of dispatch and
one batch of messages per destination. The order of a step's effects carries meaning: what processes and nodes are told
comes after what makes it true, and results for other nodes come after the references those results carry are
announced (``HoldLedger``).
"""

from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

from trio_ray.runtime.core import ids
from trio_ray.runtime.core.effects import AnyEffect, CloseWindow, OpenWindow, Send, SetTimer, StopWorker
from trio_ray.runtime.core.machine import (
    AnyEvent,
    BytesSent,
    PeerLost,
    ProcessConnected,
    ProcessLost,
    Received,
    TimerFired,
    WindowFilled,
    WorkerFailed,
)
from trio_ray.runtime.core.messages import (
    PLACEMENT,
    AbortObjects,
    ActorHandles,
    ActorsChanged,
    ActorState,
    Address,
    Answer,
    AssignTasks,
    Blocked,
    CallActors,
    CancelScope,
    CancelTasks,
    ControlAnswer,
    ControlQuery,
    CreateFailed,
    CreateObject,
    FreeObjects,
    Function,
    Functions,
    Heartbeat,
    HoldsCounted,
    KillActor,
    Load,
    NodeInfo,
    NodesChanged,
    ObjectCreated,
    ObjectsChanged,
    ObjectsLocated,
    ObjectUpdate,
    PublishCancel,
    PulledInline,
    PullFailed,
    PullObject,
    PutObjects,
    Query,
    References,
    RegisterNode,
    ReturnTasks,
    SealObjects,
    SubmitTasks,
    TasksDone,
    TasksFinished,
    TasksPlaced,
    TasksUnplaceable,
    Unpin,
    WaitObjects,
    control_address,
)
from trio_ray.runtime.core.objects.references import HoldLedger
from trio_ray.runtime.core.objects.table import ObjectTable, State
from trio_ray.runtime.core.objects.transfer import Transfers
from trio_ray.runtime.core.recovery.cancellation import GRACE, Cancellation
from trio_ray.runtime.core.recovery.lineage import WriteBehind
from trio_ray.runtime.core.recovery.loss import Losses
from trio_ray.runtime.core.scheduling.local import STALL_S, STUCK_S, LocalScheduler, Phase, TemplateEntry
from trio_ray.runtime.core.scheduling.policies.base import NodeView, Policy, PolicyError, TaskView
from trio_ray.runtime.core.spec import Kind, TaskSpec, amounts
from trio_ray.runtime.core.tasks import Tasks


class NodeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What a node is told when it starts. Times in seconds."""

    prestart: int = -1
    """Worker processes to start at once; -1: one a CPU."""
    write_behind_s: float = 0.5
    """How long lineage and events may wait before they go to the control store in a batch."""
    heartbeat_s: float = 0.1
    """How often load is told at most; a fifth as often when nothing changes."""
    cancel_grace_s: float = 2.0
    """How long a worker has to end a cancelled task before it is killed."""


class NodeMachine:
    """Every decision of one node."""

    def __init__(
        self, info: NodeInfo, *, head_shards: int, config: NodeConfig, policy: str, rng: Random,
        load_policy: Callable[[str], Policy],
    ) -> None:  # fmt: skip
        self.info = info
        self._config = config
        self._policy = load_policy(policy)
        self._policies: dict[str, Policy] = {}
        """Of tasks that name their own."""
        self._load_policy = load_policy
        self._labels = dict(info.labels)
        self._functions: dict[bytes, Function] = {}
        cpus = int(amounts(info.resources).get("CPU", 0))
        self._prestart = config.prestart if config.prestart >= 0 else cpus
        self.nodes: dict[Address, NodeInfo] = {info.node: info}
        self._others = 0
        """Other nodes that are alive."""
        self._shards = head_shards
        self.ledger = HoldLedger(head_shards)
        self.table = ObjectTable(info.store_bytes, self.ledger)
        self.transfers = Transfers(info.node, self.table, head_shards, rng)
        self.scheduler = LocalScheduler(info.resources, self._prestart, self.table, self._functions)
        self.tasks = Tasks(
            info.node, head_shards, self.table, self.transfers, self.scheduler, self._functions, self._keep
        )
        self.cancellation = Cancellation(self.tasks, self.scheduler, config.cancel_grace_s)
        self.write_behind = WriteBehind(info.node, head_shards, self.tasks, self.table)
        self.losses = Losses(info.node, self.tasks, self.scheduler, self.table, self.transfers, self.cancellation)
        self._timers: dict[str, float] = {}
        """When our own timers fire; an entry goes when its timer has fired."""
        self._load: Load | None = None
        self._load_at = 0.0
        self._puts: dict[int, tuple[Address, bytes]] = {}
        """Transfers by which processes without shared memory write objects."""
        self._effects: list[AnyEffect] = []
        self._now = 0.0
        self._on_message: dict[type, Callable[[Address, Any], None]] = {
            SubmitTasks: self.tasks.submit,
            TasksDone: self._tasks_done,
            References: self._references,
            WaitObjects: lambda source, m: self.tasks.wait(source, m.object_ids, m.fetch),
            PutObjects: self._put_objects,
            CreateObject: self._create_object,
            SealObjects: self._seal_objects,
            AbortObjects: self._abort_objects,
            Unpin: self._unpin,
            ReturnTasks: self._return_tasks,
            Blocked: self._blocked,
            CancelTasks: self._cancel_tasks,
            CancelScope: self._cancel_scope,
            KillActor: self._kill_actor,
            ActorHandles: self._actor_handles,
            Query: self._query,
            TasksPlaced: self._placed,
            TasksUnplaceable: self._unplaceable,
            AssignTasks: lambda source, m: self.tasks.assigned(m),
            CallActors: lambda source, m: self.tasks.assigned(m),
            TasksFinished: self._finished_elsewhere,
            PullObject: lambda source, m: self.transfers.serve(source, m, self._effects),
            PulledInline: lambda source, m: self.transfers.pulled_inline(m, self._effects),
            PullFailed: lambda source, m: self.transfers.failed(m.transfer, self._now, self._effects),
            NodesChanged: self._nodes_changed,
            Functions: lambda source, m: self.tasks.functions_arrived(m.functions),
            ObjectsLocated: self._located,
            HoldsCounted: lambda source, m: self.ledger.acknowledge(m.number),
            FreeObjects: self._free,
            ActorsChanged: self._actors_changed,
            PublishCancel: self._cancelled,
            ControlAnswer: self._control_answer,
        }
        self._on_event: dict[type, Callable[[Any], None]] = {
            TimerFired: self._timer,
            ProcessConnected: self._process_connected,
            ProcessLost: self._process_lost,
            WorkerFailed: lambda event: self.scheduler.worker_failed(event.number),
            PeerLost: lambda event: self.losses.peer_lost(event.peer),
            WindowFilled: self._window_filled,
            BytesSent: lambda event: self.transfers.sent(event.transfer, event.to),
        }

    # -- the contract ------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[AnyEffect]:
        """Join the cluster and start the first workers."""
        self._begin(now)
        self._effects.append(Send(control_address(0), RegisterNode(self.info)))
        self.scheduler.start_workers(self._prestart, self._effects)
        return self._close()

    def step(self, events: Sequence[AnyEvent], now: float) -> list[AnyEffect]:
        """Take in what happened, answer with what to do."""
        self._begin(now)
        on_message = self._on_message
        for event in events:
            if type(event) is Received:
                message = event.message
                on_message[type(message)](event.source, message)
            else:
                self._on_event[type(event)](event)
        return self._close()

    def _begin(self, now: float) -> None:
        self._now = self.tasks.now = now
        self._effects = self.tasks.effects = []

    def _close(self) -> list[AnyEffect]:
        effects, now = self._effects, self._now
        self.scheduler.dispatch(now, effects)
        if self.scheduler.queued and self._others:
            self._set_timer("stuck", now + STUCK_S)
        if self.scheduler.stalled:
            self._set_timer("balance", now + STALL_S)
        self.losses.unreachable_objects()
        if self.tasks.forwarding:  # placement is to know that this node is busy before it sends the tasks right back
            self._heartbeat(at_once=True)
        self.tasks.flush()
        self.write_behind.forget(effects)
        if self.table.updates:
            self._report_objects()
        adding = self.ledger.adding
        finished = self.tasks.take_finished() if self.tasks.finished else []
        if adding:
            effects += self.ledger.flush(finished)
        else:
            effects += self.ledger.flush([])
            effects += finished
        self.transfers.flush(effects)
        self.write_behind.sweep()
        if self.write_behind.pending:
            self._set_timer("write-behind", now + self._config.write_behind_s)
        deadline = self.tasks.next_deadline()
        if deadline is not None and self._timers.get("deadline", deadline + 1) > deadline:
            self._timers.pop("deadline", None)
            self._set_timer("deadline", deadline)
        if self._others:
            self._heartbeat()
        self.tasks.effects = self._effects = []
        return effects

    def _set_timer(self, key: str, at: float) -> None:
        if key not in self._timers:
            self._timers[key] = at
            self._effects.append(SetTimer(key, at))

    def _timer(self, event: TimerFired) -> None:
        key = event.key
        self._timers.pop(key, None)
        if key == "write-behind":
            self.write_behind.write(self._effects)
        elif key == "deadline":
            self.cancellation.deadlines(self._effects)
        elif key == "stuck":
            if self._others:
                self._place_stuck()
        elif key.startswith(GRACE):
            self.cancellation.grace_over(key.removeprefix(GRACE), self._effects)
        # "balance" and "heartbeat" only wake the machine: closing the step does the rest.

    def _place_stuck(self) -> None:
        stuck = self.scheduler.stuck()
        if stuck:
            self.scheduler.withdraw(stuck)
            self._heartbeat(at_once=True)  # placement is to know before they reach it again
            self.tasks.place_anew(stuck)

    # -- processes ---------------------------------------------------------------------------------------------

    def _process_connected(self, event: ProcessConnected) -> None:
        self.tasks.delivery.processes[event.process] = event.shares_memory
        if event.role == "worker":
            self.scheduler.worker_connected(event.process, event.number, event.pid)

    def _process_lost(self, event: ProcessLost) -> None:
        process = event.process
        if self.tasks.delivery.processes.pop(process, None) is None:
            return
        self.tasks.delivery.ready.pop(process, None)
        for transfer, (owner, _) in list(self._puts.items()):
            if owner == process:
                del self._puts[transfer]
                self._effects.append(CloseWindow(transfer))
        if process in self.scheduler.workers:
            self.losses.worker_lost(process, event.reason)
        else:
            self.tasks.submitters.discard(process)
            self.cancellation.scopes([ids.job_scope(process)], self._effects, publish=self._others > 0)
        self.transfers.peer_lost(process, self._now, self._effects)
        self.table.process_lost(process)

    def _tasks_done(self, source: Address, message: TasksDone) -> None:
        worker = self.scheduler.workers.get(source)
        if worker is not None:
            self.tasks.done(worker, message.results)

    def _return_tasks(self, source: Address, message: ReturnTasks) -> None:
        worker = self.scheduler.workers.get(source)
        if worker is not None:
            self.scheduler.returned(worker, message.task_ids)
        elif source in self.nodes:
            self.tasks.returned(source, message.task_ids)

    def _blocked(self, source: Address, message: Blocked) -> None:
        worker = self.scheduler.workers.get(source)
        if worker is not None:
            self.scheduler.blocked(worker, message.blocked)

    # -- objects -----------------------------------------------------------------------------------------------

    def _references(self, source: Address, message: References) -> None:
        table = self.table
        for object_id in message.added:
            table.hold(table.know(object_id), source)
        table.unhold_all(message.removed, source)

    def _actor_handles(self, source: Address, message: ActorHandles) -> None:
        """A handle is a reference to the result of the actor's creation."""
        self._references(
            source,
            References([ids.return_id(a, 0) for a in message.added], [ids.return_id(a, 0) for a in message.removed]),
        )

    def _put_objects(self, source: Address, message: PutObjects) -> None:
        for object_id, payload, contained in message.objects:
            entry = self.table.expect(object_id, source)
            self.table.seal(entry, State.INLINE, payload=payload, size=len(payload), contained=contained)

    def _create_object(self, source: Address, message: CreateObject) -> None:
        object_id = message.object_id
        worker = self.scheduler.workers.get(source)
        result = worker is not None and ids.task_of(object_id) in worker.running and not ids.is_put(object_id)
        entry = self.table.create(object_id, message.size, source, held=not result)
        if entry is None:
            answer = CreateFailed(object_id, self.table.describe_full(message.size))
            self._effects.append(Send(source, answer))
            return
        if entry.state != State.UNSEALED:
            # A re-executed task makes it again: it may scribble into a scratch range that is dropped when sealed.
            self._effects.append(Send(source, CreateFailed(object_id, "")))
            return
        transfer = 0
        if not self.tasks.delivery.processes.get(source, True):
            transfer = self.transfers.new_transfer()
            self._puts[transfer] = (source, object_id)
            self._effects.append(OpenWindow(source, transfer, entry.offset, message.size))
        self._effects.append(Send(source, ObjectCreated(object_id, entry.offset, transfer)))

    def _seal_objects(self, source: Address, message: SealObjects) -> None:
        for object_id, contained in message.objects:
            entry = self.table.unsealed_by(source, object_id)
            if entry is not None:
                self.table.seal(entry, State.SHARED, size=entry.size, contained=contained)

    def _abort_objects(self, source: Address, message: AbortObjects) -> None:
        for object_id in message.object_ids:
            entry = self.table.unsealed_by(source, object_id)
            if entry is not None:
                self.table.abort(entry)

    def _unpin(self, source: Address, message: Unpin) -> None:
        for object_id in message.object_ids:
            self.table.unread(object_id, source)

    def _window_filled(self, event: WindowFilled) -> None:
        if self._puts.pop(event.transfer, None) is None:
            self.transfers.filled(event.transfer, self._now)

    def _located(self, source: Address, message: ObjectsLocated) -> None:
        for location in message.locations:
            self.transfers.located(location, self._now, self._effects)

    def _free(self, source: Address, message: FreeObjects) -> None:
        for object_id in message.object_ids:
            if source.startswith("n:"):  # the owner never wanted it; the control store has heard of our copy
                self.table.updates.append(ObjectUpdate(object_id, -1))
            self.table.freed(object_id)

    def _report_objects(self) -> None:
        updates, self.table.updates = self.table.updates, []
        split: dict[int, list[ObjectUpdate]] = {}
        for update in updates:
            split.setdefault(ids.shard_of(update.object_id, self._shards), []).append(update)
        for shard, batch in split.items():
            self._effects.append(Send(control_address(shard), ObjectsChanged(batch)))

    # -- tasks and actors --------------------------------------------------------------------------------------

    def _keep(self, spec: TaskSpec, template: TemplateEntry, count: int) -> int:
        """How many of ``count`` tasks like this one, born here, this node runs itself."""
        scheduler = self.scheduler
        shape = template.template.placement
        if not scheduler.feasible(shape):
            return 0
        if not self._others:
            return count
        entries, unfinished = self.table.entries, self.tasks.entries
        here = 0
        for object_id in spec.inputs:
            entry = entries.get(object_id)
            making = unfinished.get(ids.task_of(object_id))
            here += (entry is not None and entry.local) or (making is not None and making.phase != Phase.FORWARDED)
        of = TaskView(
            template.template.name, shape, template.mean_s, len(spec.inputs), here, self.info.node,
            template.template.kind == Kind.ACTOR_CREATION,
        )  # fmt: skip
        view = NodeView(
            self.info.node, scheduler.total, scheduler.available, scheduler.queued, scheduler.running,
            scheduler.mean_s, self.transfers.bandwidth, self._others, self._labels, 0, len(self.tasks.actors.local),
            scheduler.held,
        )  # fmt: skip
        policy = self._policy
        try:
            if template.template.policy:
                policy = self._named_policy(template.template.policy)
            return policy.keep_many(of, count, view)
        except PolicyError:
            raise
        except Exception as error:
            # A user's policy: its faults are the task's, not the node's.
            raise PolicyError(
                f"{of.name} cannot be placed: the scheduling policy {type(policy).__qualname__} failed with "
                f"{type(error).__name__}: {error}"
            ) from error

    def _named_policy(self, name: str) -> Policy:
        policy = self._policies.get(name)
        if policy is None:
            try:
                policy = self._policies[name] = self._load_policy(name)
            except ValueError as error:
                raise PolicyError(str(error)) from error
        return policy

    def _placed(self, source: Address, message: TasksPlaced) -> None:
        for task_id in message.task_ids:
            task = self.tasks.entries.get(task_id)
            if task is not None and message.node != self.info.node:
                task.node = message.node
                info = self.nodes.get(message.node)
                if info is not None and not info.alive and task.phase == Phase.FORWARDED:
                    self.losses.forwarded_task_lost(task)  # it died before placement heard of it

    def _unplaceable(self, source: Address, message: TasksUnplaceable) -> None:
        for task_id in message.task_ids:
            task = self.tasks.entries.get(task_id)
            if task is not None:
                actor = task.template.template.kind == Kind.ACTOR_CREATION
                self.tasks.fail(task, "ActorUnschedulableError" if actor else "TaskUnschedulableError", message.reason)

    def _finished_elsewhere(self, source: Address, message: TasksFinished) -> None:
        unwanted = self.tasks.finished_elsewhere(source, message.results)
        if unwanted:
            self._effects.append(Send(source, FreeObjects(unwanted)))

    def _actors_changed(self, source: Address, message: ActorsChanged) -> None:
        for info in message.actors:
            here = self.tasks.actors.local.get(info.actor_id)
            if here is not None and info.state == ActorState.DEAD:
                here.verdict, here.creation.retries = info.reason, 0
                self._effects.append(StopWorker(here.worker.process, kill=True))
                continue
            for task in self.tasks.actors.located(info.actor_id, info.state, info.node, info.reason):
                self.tasks.admit(task)
            if info.state == ActorState.RESTARTING and here is None and not info.node:
                self.losses.restart_elsewhere(info)

    def _kill_actor(self, source: Address, message: KillActor) -> None:
        actor = self.tasks.actors.local.get(message.actor_id)
        if actor is not None:
            if message.no_restart:
                actor.creation.retries = 0
            self._effects.append(StopWorker(actor.worker.process, kill=True))
            return
        view = self.tasks.actors.views.get(message.actor_id)
        if view is not None and view.node and view.node != self.info.node:
            self._effects.append(Send(view.node, message))
        elif message.actor_id in self.tasks.entries:
            self.cancellation.tasks([message.actor_id], self._effects, force=True, recursive=False, publish=True)

    def _cancel_tasks(self, source: Address, message: CancelTasks) -> None:
        self.cancellation.tasks(
            message.task_ids, self._effects, force=message.force, recursive=message.recursive, publish=self._others > 0
        )

    def _cancel_scope(self, source: Address, message: CancelScope) -> None:
        if message.done:
            self.cancellation.done(message.scope, self._effects)
        else:
            self.cancellation.scopes([message.scope], self._effects, publish=True)

    def _cancelled(self, source: Address, message: PublishCancel) -> None:
        self.cancellation.scopes(message.scopes, self._effects, publish=False)
        if message.task_ids:
            self.cancellation.tasks(
                message.task_ids, self._effects, force=message.force, recursive=message.recursive, publish=False
            )

    # -- the cluster -------------------------------------------------------------------------------------------

    def _nodes_changed(self, source: Address, message: NodesChanged) -> None:
        for info in message.nodes:
            known = self.nodes.get(info.node)
            self.nodes[info.node] = info
            if info.node != self.info.node:
                was_alive = known is not None and known.alive
                self._others += info.alive - was_alive
                if was_alive and not info.alive:
                    self.losses.node_died(info.node)

    def _heartbeat(self, *, at_once: bool = False) -> None:
        load = self.scheduler.load(
            self.tasks.waiting, self.table.arena.used, self.transfers.bandwidth, len(self.tasks.actors.local),
            self.tasks.assignments,
        )  # fmt: skip
        period = self._config.heartbeat_s
        # Times are compared as they were given to the timers: a difference may round to just below the period.
        pause = 0.0 if at_once else period
        if self._load is None or self._now >= self._load_at + (pause if load != self._load else 5 * period):
            self._load, self._load_at = load, self._now
            self._effects.append(Send(PLACEMENT, Heartbeat(load)))
        due = self._load_at + (period if load != self._load else 5 * period)
        if self._timers.get("heartbeat", due + 1.0) > due:
            self._timers.pop("heartbeat", None)
            self._set_timer("heartbeat", due)

    def _query(self, source: Address, message: Query) -> None:
        if message.subject == "node":
            body = msgspec.msgpack.encode(self.counters())
            self._effects.append(Send(source, Answer(message.number, body)))
            return
        if message.subject == "available" and not self._others:  # a node alone sends no heartbeats
            body = msgspec.msgpack.encode(amounts(tuple(self.scheduler.available.items())))
            self._effects.append(Send(source, Answer(message.number, body)))
            return
        to = PLACEMENT if message.subject == "available" else control_address(0)
        self._effects.append(Send(to, ControlQuery(source, message.number, message.subject, message.argument)))

    def _control_answer(self, source: Address, message: ControlAnswer) -> None:
        if message.process in self.tasks.delivery.processes:
            self._effects.append(Send(message.process, Answer(message.number, message.body, message.error)))

    def counters(self) -> dict[str, float | int | str]:
        """This node's own figures, for ``status``."""
        scheduler = self.scheduler
        return {
            "node": self.info.node,
            "workers": len(scheduler.workers),
            "actors": len(self.tasks.actors.local),
            "queued": scheduler.queued,
            "running": scheduler.running,
            "tasks": len(self.tasks.entries),
            "objects": len(self.table.entries),
            "store_used": self.table.arena.used,
            "store_size": self.table.arena.size,
            "bytes_received": self.transfers.bytes_received,
        }

    def validate(self) -> None:
        """Assert every invariant of the node."""
        self.table.validate()
        self.scheduler.validate()
        self.transfers.validate()
        self.tasks.validate()
        assert not self.table.updates and not self.tasks.finished, "a batch was not sent"
        assert not self.tasks.delivery.ready, "a batch was not sent"


