"""What a node does when a worker or another node is gone.

A task whose worker died runs again while it has retries left; the ones behind it in that worker had not begun and
simply go back. A task that was forwarded to a node that died is placed again by the node that owns it.
"""

from trio_ray.runtime.core.actors import LocalActor
from trio_ray.runtime.core.failures import system_error
from trio_ray.runtime.core.messages import ActorInfo, ActorState, Address
from trio_ray.runtime.core.objects.table import ObjectEntry, ObjectTable, State
from trio_ray.runtime.core.objects.transfer import Transfers
from trio_ray.runtime.core.recovery.cancellation import Cancellation
from trio_ray.runtime.core.scheduling.local import LocalScheduler, Phase, TaskEntry, TemplateEntry
from trio_ray.runtime.core.spec import Kind, TaskSpec
from trio_ray.runtime.core.tasks import Tasks


class Losses:
    """Reactions to lost workers, nodes and room."""

    def __init__(
        self, node: Address, tasks: Tasks, scheduler: LocalScheduler, table: ObjectTable, transfers: Transfers,
        cancellation: Cancellation,
    ) -> None:  # fmt: skip
        self._node = node
        self._tasks = tasks
        self._scheduler = scheduler
        self._table = table
        self._transfers = transfers
        self._cancellation = cancellation

    def worker_lost(self, process: Address, reason: str) -> None:
        """A worker process ended."""
        tasks, scheduler = self._tasks, self._scheduler
        worker = scheduler.workers[process]
        interrupted = self._cancellation.was_interrupted(process)
        had = scheduler.worker_lost(process)
        how = f"its worker process on node {self._node} ended ({reason or 'it left'})"
        actor_id = worker.actor
        if actor_id is not None and actor_id in tasks.actors.local:
            self._actor_lost(actor_id, had, how)
        else:
            for index, task in enumerate(had):
                template = task.template.template
                task.phase = Phase.WAITING
                if task.spec.task_id in interrupted:
                    tasks.fail(task, "TaskCancelledError", f"{template.name} was cancelled")
                elif index == 0 and not task.retries:
                    kind = "ActorDiedError" if template.kind == Kind.ACTOR_CREATION else "WorkerCrashedError"
                    tasks.fail(task, kind, f"{template.name} was running when {how}")
                else:
                    if index == 0:
                        task.retries -= 1
                    tasks.again(task)
        if process in tasks.submitters:
            tasks.submitters.remove(process)
            # One that runs again opens the very same nurseries, and finds in them what it started the first time.
            over = [task.spec for task in had if task.phase == Phase.DONE]
            self._cancellation.left_by(process, over, tasks.effects)

    def _actor_lost(self, actor_id: bytes, had: list[TaskEntry], how: str) -> None:
        tasks = self._tasks
        actor = tasks.actors.local[actor_id]
        name = actor.creation.template.template.name
        if self._restart_here(actor):
            for task in had:
                if task.phase == Phase.DONE or task.template.template.kind == Kind.ACTOR_CREATION:
                    continue
                task.phase = Phase.WAITING
                if task.retries:
                    task.retries -= 1
                    tasks.again(task)
                else:
                    sentence = f"{task.template.template.name} may not have run: the actor {name} restarts, for {how}"
                    tasks.fail(task, "ActorUnavailableError", sentence)
            return
        reason = f"the actor {name} is dead: {actor.verdict or how}"
        waiting = tasks.actors.worker_lost(actor_id, reason)
        for task in (*had, *waiting):
            if task.phase != Phase.DONE:
                task.phase = Phase.WAITING
                tasks.fail(task, "ActorDiedError", f"{task.template.template.name} failed: {reason}")

    def _restart_here(self, actor: LocalActor) -> bool:
        """Construct an actor anew whose worker is gone, if it has restarts left; its waiting calls go on waiting.

        One whose constructor took objects is not restarted: nothing kept them alive.
        """
        creation = actor.creation
        if not creation.retries or actor.released or actor.verdict or creation.spec.inputs:
            return False
        actor.alive = False
        self._tasks.actors.publish(creation, ActorState.RESTARTING, "")
        self._create_again(creation.spec, creation.template, creation.origin, creation.retries - 1)
        return True

    def restart_elsewhere(self, info: ActorInfo) -> None:
        """An actor of this node's died with its node and has restarts left: construct it anew on another one."""
        if info.owner != self._node or info.creation is None or info.template is None:
            return
        if info.creation.inputs:
            reason = f"the actor {info.class_name} died with its node, and what its constructor took is gone"
            self._tasks.actors.publish_row(info, ActorState.DEAD, reason)
            return
        self._tasks.learn([info.template], [])
        template = self._tasks.templates[info.template.template_id]
        self._create_again(info.creation, template, "", info.template.max_retries)

    def _create_again(self, spec: TaskSpec, template: TemplateEntry, origin: Address, retries: int) -> None:
        if spec.task_id in self._tasks.entries:
            return
        task = self._tasks.entries[spec.task_id] = TaskEntry(spec, template, origin, self._tasks.now, retries)
        if not origin:  # as at its submission: ``_let_go`` undoes it
            for object_id in spec.borrowed:
                self._table.pin(self._table.know(object_id))
        if spec.task_id in self._tasks.actors.local:
            self._tasks.admit(task)
        else:
            self._tasks.forward(task)

    def peer_lost(self, peer: Address) -> None:
        """The link to another node broke: transfers over it will not end."""
        self._transfers.peer_lost(peer, self._tasks.now, self._tasks.effects)

    def node_died(self, node: Address) -> None:
        """The control store declared another node dead."""
        tasks = self._tasks
        self.peer_lost(node)
        for task in [task for task in tasks.entries.values() if task.node == node and task.phase == Phase.FORWARDED]:
            self.forwarded_task_lost(task)
        for view_id, view in list(tasks.actors.views.items()):
            if view.node == node:
                for task in tasks.actors.located(view_id, view.state.DEAD, "", f"its node {node} died"):
                    tasks.admit(task)
        for task in [task for task in tasks.entries.values() if task.origin == node]:
            task.retries = 0  # nobody waits for it any more; what it makes is dropped
        for entry in self._table.entries.values():
            if entry.state == State.ELSEWHERE and node in entry.nodes:
                entry.nodes = tuple(other for other in entry.nodes if other != node)
                if not entry.nodes:
                    entry.state = State.PENDING

    def forwarded_task_lost(self, task: TaskEntry) -> None:
        """A task of ours went to a node that is dead."""
        template = task.template.template
        if template.kind == Kind.ACTOR_CALL or not task.retries:
            kind = "ActorDiedError" if template.kind != Kind.TASK else "NodeDiedError"
            self._tasks.fail(task, kind, f"{template.name} was running on node {task.node} when that node died")
        else:
            task.retries -= 1
            self._tasks.may_have_spawned(task.spec)
            self._tasks.forward(task)

    def unreachable_objects(self) -> None:
        """Objects that are lost, or that found no room here, become errors for those who wait for them."""
        transfers = self._transfers
        if transfers.full:
            full, transfers.full = transfers.full, []
            for entry in full:
                self._fail_waiters(entry, "ObjectStoreFullError", self._table.describe_full(entry.size))
        if transfers.lost:
            lost, transfers.lost = transfers.lost, []
            for entry in lost:
                sentence = f"object {entry.object_id.hex()} is lost: every node that had a copy has died; make it again"
                self._fail_waiters(entry, "ObjectLostError", sentence)

    def _fail_waiters(self, entry: ObjectEntry, kind: str, sentence: str) -> None:
        waiters, entry.waiters = entry.waiters, None
        stand_in = ObjectEntry(entry.object_id, state=State.INLINE, error=True, payload=system_error(kind, sentence))
        for waiter in waiters or []:
            waiter(stand_in)
