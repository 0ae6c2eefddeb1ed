"""Actors, as one node sees them: those that live here, and where the others live.

An actor's id is the task id of its creation, and it lives as long as the creation's (empty) result object is referred
to: a handle holds a reference to that object, so passing handles around, counting them and ending the actor with its
last one need no machinery of their own.

Calls go from the submitter's node straight to the actor's node. Each submitter's calls run in the order in which they
were made: a call whose inputs are not there yet holds back only the later calls of the same process.
"""

from collections import deque
from collections.abc import Callable

from trio_ray.runtime.core.effects import AnyEffect, Send, StopWorker
from trio_ray.runtime.core.ids import shard_of
from trio_ray.runtime.core.messages import (
    ActorInfo,
    ActorState,
    Address,
    CallActors,
    UpdateActors,
    WatchActors,
    control_address,
)
from trio_ray.runtime.core.scheduling.local import LocalScheduler, Phase, TaskEntry, WorkerEntry
from trio_ray.runtime.core.spec import TaskTemplate


class LocalActor:
    """An actor whose worker is on this node."""

    __slots__ = ("alive", "creation", "released", "verdict", "waiting", "worker")

    def __init__(self, creation: TaskEntry, worker: WorkerEntry) -> None:
        self.creation = creation
        self.worker = worker
        self.alive = False
        """Its constructor has returned."""
        self.released = False
        """Nobody has a handle any more; it ends when its calls are done."""
        self.verdict = ""
        """Why the actor table refuses it, for example because its name is taken."""
        self.waiting: dict[Address, deque[TaskEntry]] = {}
        """By submitter: calls in order, the first of which lacks inputs (or all, until the actor is alive)."""


class ActorView:
    """What this node knows of an actor it calls."""

    __slots__ = ("kind", "node", "queue", "reason", "state", "watched")

    def __init__(self) -> None:
        self.state = ActorState.PENDING
        self.node: Address = ""
        self.reason = ""
        self.kind = "ActorDiedError"
        """The error of calls to it when it is dead."""
        self.watched = False
        self.queue: list[TaskEntry] = []
        """Calls that wait for the actor to be alive somewhere."""


FailTask = Callable[[TaskEntry, str, str], None]


class Actors:
    """The node's actors and its calls to others."""

    def __init__(self, node: Address, shards: int, scheduler: LocalScheduler, fail: FailTask) -> None:
        self._node = node
        self._shards = shards
        self._scheduler = scheduler
        self._fail = fail
        self.local: dict[bytes, LocalActor] = {}
        self.views: dict[bytes, ActorView] = {}
        self._calls: dict[Address, list[TaskEntry]] = {}
        """Calls to forward at the end of this step, by node."""
        self._watch: list[bytes] = []
        self._changed: list[ActorInfo] = []

    # -- calling -----------------------------------------------------------------------------------------------

    def expect(self, actor_id: bytes) -> None:
        """The actor's creation was submitted here: its result will tell where it is."""
        if actor_id not in self.views:
            self.views[actor_id] = ActorView()

    def route(self, task: TaskEntry) -> bool:
        """Send a call on its way. True if the actor lives here, and the node is to gather the call's inputs."""
        actor_id = task.spec.actor
        if actor_id in self.local:
            return True
        view = self.views.get(actor_id)
        if view is None:
            view = self.views[actor_id] = ActorView()
            self._look_up(actor_id, view)
        if view.state == ActorState.ALIVE:
            self._forward(task, view.node)
        elif view.state == ActorState.DEAD:
            self._fail(task, view.kind, f"{task.template.template.name} failed: {view.reason}")
        else:
            view.queue.append(task)
        return False

    def _look_up(self, actor_id: bytes, view: ActorView) -> None:
        if not view.watched:
            view.watched = True
            self._watch.append(actor_id)

    def _forward(self, task: TaskEntry, node: Address) -> None:
        task.phase = Phase.FORWARDED
        task.node = node
        self._calls.setdefault(node, []).append(task)

    def located(
        self, actor_id: bytes, state: ActorState, node: Address, reason: str, kind: str = ""
    ) -> list[TaskEntry]:
        """An actor's row changed; answers with the calls that this node is to run itself.

        ``kind``: the error of calls to an actor that is dead, if it is not ``ActorDiedError``.
        """
        view = self.views.setdefault(actor_id, ActorView())
        view.kind = kind or view.kind
        view.state, view.node, view.reason = state, node, reason
        if state == ActorState.PENDING or state == ActorState.RESTARTING:
            return []
        if state == ActorState.ALIVE and node != self._node:
            self._look_up(actor_id, view)
        queue, view.queue = view.queue, []
        return [task for task in queue if task.phase != Phase.DONE and self.route(task)]

    def refused(self, task: TaskEntry) -> None:
        """The node that the call was sent to no longer has the actor: wait for the row to change."""
        view = self.views.setdefault(task.spec.actor, ActorView())
        if view.state == ActorState.ALIVE and view.node == task.node:
            view.state = ActorState.RESTARTING
        task.phase, task.node = Phase.WAITING, ""
        self._look_up(task.spec.actor, view)
        if self.route(task):
            self.enqueue(task)

    # -- running -----------------------------------------------------------------------------------------------

    def created(self, creation: TaskEntry, worker: WorkerEntry, error: str, now: float) -> list[TaskEntry]:
        """A constructor returned (or raised ``error``) here; answers with waiting calls to run here."""
        actor_id = creation.spec.task_id
        name = creation.template.template.name
        if error:
            worker.actor = None
            self.publish(creation, ActorState.DEAD, f"the constructor of {name} failed: {error}")
            return self.located(actor_id, ActorState.DEAD, "", f"the constructor of {name} failed: {error}")
        actor = self.local.get(actor_id)
        if actor is None:
            actor = self.local[actor_id] = LocalActor(creation, worker)
        actor.creation, actor.worker, actor.alive = creation, worker, True
        self.publish(creation, ActorState.ALIVE, "")
        for submitter in list(actor.waiting):
            self._drain(actor, submitter, now)
        return self.located(actor_id, ActorState.ALIVE, self._node, "")

    def enqueue(self, task: TaskEntry) -> None:
        """A call for an actor here; ``ready`` follows when its inputs are here."""
        if task.missing or not self.local[task.spec.actor].alive:
            self._wait(task)

    def _wait(self, task: TaskEntry) -> None:
        waiting = self.local[task.spec.actor].waiting
        queue = waiting.get(task.spec.submitter)
        if queue is None:
            queue = waiting[task.spec.submitter] = deque()
        if task not in queue:
            queue.append(task)

    def ready(self, task: TaskEntry, now: float) -> None:
        """A call has all its inputs: run it, and those behind it that waited for it only."""
        actor = self.local.get(task.spec.actor)
        if actor is None:
            return
        task.phase = Phase.READY
        submitter = task.spec.submitter
        if actor.alive and submitter not in actor.waiting:
            self._scheduler.give(actor.worker, task, now)
            return
        self._wait(task)
        self._drain(actor, submitter, now)

    def _drain(self, actor: LocalActor, submitter: Address, now: float) -> None:
        queue = actor.waiting[submitter]
        while queue and (queue[0].phase == Phase.DONE or (actor.alive and queue[0].phase == Phase.READY)):
            task = queue.popleft()
            if task.phase != Phase.DONE:
                self._scheduler.give(actor.worker, task, now)
        if not queue:
            del actor.waiting[submitter]

    def failed_waiting(self, task: TaskEntry, now: float, effects: list[AnyEffect]) -> None:
        """A call that was waiting here is done without having run: those behind it go on, or the actor ends."""
        actor = self.local.get(task.spec.actor)
        if actor is not None and task.spec.submitter in actor.waiting:
            self._drain(actor, task.spec.submitter, now)
            self.end_if_idle(actor, effects)

    # -- ending ------------------------------------------------------------------------------------------------

    def released(self, actor_id: bytes, effects: list[AnyEffect]) -> None:
        """The last handle is gone."""
        self.views.pop(actor_id, None)
        actor = self.local.get(actor_id)
        if actor is not None:
            actor.released = True
            self.end_if_idle(actor, effects)

    def end_if_idle(self, actor: LocalActor, effects: list[AnyEffect]) -> None:
        """End an actor that nobody can call any more and that has nothing left to do."""
        if actor.released and not actor.worker.running and not actor.waiting and not actor.worker.stopping:
            actor.worker.stopping = True
            effects.append(StopWorker(actor.worker.process))

    def worker_lost(self, actor_id: bytes, reason: str) -> list[TaskEntry]:
        """An actor's worker is gone for good; answers with the calls that waited."""
        actor = self.local.pop(actor_id, None)
        if actor is None:
            return []
        self.publish(actor.creation, ActorState.DEAD, reason)
        waiting = [task for queue in actor.waiting.values() for task in queue if task.phase != Phase.DONE]
        if actor_id in self.views or not actor.released:
            self.located(actor_id, ActorState.DEAD, "", reason)
        return waiting

    def publish(self, creation: TaskEntry, state: ActorState, reason: str) -> None:
        """Tell the actor table."""
        spec, template = creation.spec, creation.template.template
        self._changed.append(
            ActorInfo(
                spec.task_id, spec.actor_name, template.name, state, self._node,
                creation.origin or self._node, reason, spec, template,
            )
        )  # fmt: skip

    def publish_row(self, info: ActorInfo, state: ActorState, reason: str) -> None:
        """Tell the actor table about an actor that is nowhere."""
        self._changed.append(
            ActorInfo(info.actor_id, info.name, info.class_name, state, "", info.owner, reason)
        )

    def flush(self, effects: list[AnyEffect], export: Callable[[TaskEntry], None]) -> None:
        """Send what this step decided; ``export`` is told of each call that leaves the node."""
        for node, tasks in self._calls.items():
            for task in tasks:
                export(task)
            templates: dict[bytes, TaskTemplate] = {task.spec.template: task.template.template for task in tasks}
            effects.append(Send(node, CallActors(self._node, [task.spec for task in tasks], list(templates.values()))))
        self._calls.clear()
        for actor_id in self._watch:
            effects.append(Send(control_address(shard_of(actor_id, self._shards)), WatchActors([actor_id])))
        self._watch.clear()
        for info in self._changed:
            effects.append(Send(control_address(shard_of(info.actor_id, self._shards)), UpdateActors([info])))
        self._changed.clear()

    def validate(self) -> None:
        """Assert the actors' invariants."""
        for actor_id, actor in self.local.items():
            assert actor.worker.actor == actor_id
            for queue in actor.waiting.values():
                assert queue, "an empty queue was kept"
