"""Ending tasks before they end themselves: cancelled, out of time, or out of scope.

A cancelled task that has not begun ends at once. One that a worker has is interrupted there (the worker drops it if it
has not begun it); a worker that does not yield within the grace is killed and replaced. Cancelling reaches every node
through the control store. A scope that was cancelled is remembered, and so is a task that is not here: what is still
on its way is refused.
"""

from collections.abc import Iterable

from trio_ray.runtime.core import ids
from trio_ray.runtime.core.effects import AnyEffect, Send, SetTimer, StopWorker
from trio_ray.runtime.core.messages import Address, Interrupt, PublishCancel, control_address
from trio_ray.runtime.core.scheduling.local import LocalScheduler, Phase, TaskEntry
from trio_ray.runtime.core.spec import Kind, TaskSpec
from trio_ray.runtime.core.tasks import Tasks

GRACE = "grace:"
"""Prefix of the timer keys of workers that were asked to interrupt a task."""
REMEMBERED = 10_000
"""How many scopes, and tasks that were not here, a node remembers as cancelled."""


class Cancellation:
    """What a node does about cancelled scopes and tasks, and about deadlines."""

    def __init__(self, tasks: Tasks, scheduler: LocalScheduler, grace_s: float) -> None:
        self._tasks = tasks
        self._scheduler = scheduler
        self._grace_s = grace_s
        self._interrupted: dict[Address, list[bytes]] = {}

    def done(self, scope: bytes, effects: list[AnyEffect]) -> None:
        """All that was started in the scope itself has ended well: cancel what that may have left running."""
        if scope in self._tasks.strays:
            self.scopes([scope], effects, publish=True)

    def scopes(self, scopes: list[bytes], effects: list[AnyEffect], *, publish: bool) -> None:
        """End everything in these scopes, here and (with ``publish``) everywhere."""
        tasks = self._tasks
        fresh = [scope for scope in scopes if scope not in tasks.cancelled]
        self._remember(fresh)
        if not fresh:
            return
        for stray in [stray for stray in tasks.strays if any(ids.in_scope(stray, scope) for scope in fresh)]:
            del tasks.strays[stray]
        inside = [
            task for task in tasks.entries.values() if any(ids.in_scope(task.spec.scope, scope) for scope in fresh)
        ]
        self._cancel(inside, "its scope was cancelled", effects, force=False)
        if publish:
            effects.append(Send(control_address(0), PublishCancel(fresh, [])))

    def left_by(self, process: Address, over: list[TaskSpec], effects: list[AnyEffect]) -> None:
        """A process of this node is gone, and these of its tasks are over: end what runs in nurseries that they had
        open, and what the process started in no task's name."""
        opened = {ids.children_prefix(spec.task_id): spec.scope for spec in over}
        own = ids.job_scope(process)

        def open_by_it(siblings: bytes, scope: bytes) -> bool:
            return scope.startswith(own) or opened.get(siblings, scope) != scope

        left = {
            task.spec.scope for task in self._tasks.entries.values()
            if open_by_it(ids.siblings_prefix(task.spec.task_id), task.spec.scope)
        }  # fmt: skip
        for scope, prefixes in self._tasks.strays.items():
            if any(open_by_it(siblings, scope) for siblings in prefixes):
                left.add(scope)
        if left:
            self.scopes(sorted(left), effects, publish=True)

    def tasks(
        self, task_ids: list[bytes], effects: list[AnyEffect], *, force: bool, recursive: bool, publish: bool
    ) -> None:
        """End these tasks and (``recursive``) all that they started."""
        entries = self._tasks.entries
        found = {task_id: entries[task_id] for task_id in task_ids if task_id in entries}
        if recursive:
            prefixes = {ids.children_prefix(task_id) for task_id in task_ids}
            grew = True
            while grew:
                grew = False
                for task_id, task in entries.items():
                    if task_id not in found and ids.siblings_prefix(task_id) in prefixes:
                        found[task_id] = task
                        prefixes.add(ids.children_prefix(task_id))
                        grew = True
        self._remember(task_id for task_id in task_ids if task_id not in found)
        elsewhere = recursive or any(task_id not in found for task_id in task_ids)
        elsewhere = elsewhere or any(task.phase == Phase.FORWARDED for task in found.values())
        self._cancel(list(found.values()), "it was cancelled", effects, force=force)
        if publish and elsewhere:
            effects.append(Send(control_address(0), PublishCancel([], task_ids, force, recursive)))

    def deadlines(self, effects: list[AnyEffect]) -> None:
        """End the tasks whose time is up."""
        overdue = self._tasks.overdue()
        if overdue:
            forwarded = [task.spec.task_id for task in overdue if task.phase == Phase.FORWARDED]
            self._cancel(overdue, "its deadline passed", effects, force=False)
            if forwarded:
                effects.append(Send(control_address(0), PublishCancel([], forwarded)))

    def _remember(self, cancelled: Iterable[bytes]) -> None:
        """What arrives later, and is in one of these scopes or one of these tasks, is refused."""
        remembered = self._tasks.cancelled
        remembered.update(dict.fromkeys(cancelled))
        while len(remembered) > REMEMBERED:
            del remembered[next(iter(remembered))]

    def _cancel(self, cancelled: list[TaskEntry], why: str, effects: list[AnyEffect], *, force: bool) -> None:
        interrupt: dict[Address, list[bytes]] = {}
        ready = [
            task for task in cancelled
            if task.phase == Phase.READY and task.template.template.kind != Kind.ACTOR_CALL
        ]  # fmt: skip
        self._scheduler.withdraw(ready)
        for task in ready:
            task.phase = Phase.WAITING
        for task in cancelled:
            if task.phase == Phase.DISPATCHED:
                assert task.worker is not None
                if force and task.worker.actor is None:
                    effects.append(StopWorker(task.worker.process, kill=True))
                    task.retries = 0
                interrupt.setdefault(task.worker.process, []).append(task.spec.task_id)
            elif task.phase != Phase.DONE and (task.phase != Phase.FORWARDED or not task.node):
                if task.phase == Phase.FORWARDED:  # placement still has it; wherever it arrives, it is refused
                    self._remember([task.spec.task_id])
                self._tasks.fail(task, "TaskCancelledError", f"{task.template.template.name} was cancelled: {why}")
        for process, task_ids in interrupt.items():
            effects.append(Send(process, Interrupt(task_ids)))
            self._interrupted.setdefault(process, []).extend(task_ids)
            effects.append(SetTimer(GRACE + process, self._tasks.now + self._grace_s))

    def grace_over(self, process: Address, effects: list[AnyEffect]) -> None:
        """Kill a worker that still runs what it was asked to end."""
        worker = self._scheduler.workers.get(process)
        overdue = self._interrupted.pop(process, [])
        if worker is None or worker.actor is not None:
            return
        stubborn = [worker.running[task_id] for task_id in overdue if task_id in worker.running]
        if stubborn:
            for task in stubborn:
                task.retries = 0
            # Remembered, so that they end as cancelled and not as crashed.
            self._interrupted[process] = [task.spec.task_id for task in stubborn]
            effects.append(StopWorker(process, kill=True))

    def was_interrupted(self, process: Address) -> list[bytes]:
        """What a worker that is now gone had been asked to end."""
        return self._interrupted.pop(process, [])
