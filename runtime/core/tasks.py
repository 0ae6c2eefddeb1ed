"""The life of a task on a node: submitted, waiting for inputs, run here or elsewhere, done, failed, cancelled.

A task submitted by a process of this node is *owned* here: the node pins what it refers to, waits for its result,
enforces its deadline and, if the node it was forwarded to dies, submits it again. A task that came from another node
(its *origin*) is only run here.
"""

import heapq
from collections.abc import Callable
from functools import partial

from trio_ray.runtime.core import ids
from trio_ray.runtime.core.actors import Actors
from trio_ray.runtime.core.effects import AnyEffect, Send
from trio_ray.runtime.core.failures import kind_of, system_error, text_of
from trio_ray.runtime.core.messages import (
    PLACEMENT,
    ActorState,
    Address,
    AssignTasks,
    CallActors,
    Function,
    GetFunctions,
    Output,
    PlaceTasks,
    PutFunctions,
    ReturnTasks,
    Status,
    SubmitTasks,
    TaskEvent,
    TaskResult,
    TasksFinished,
    Value,
    Where,
    control_address,
)
from trio_ray.runtime.core.objects.delivery import Delivery
from trio_ray.runtime.core.objects.table import (
    ELSEWHERE,
    GONE,
    INLINE,
    PENDING,
    SHARED,
    UNSEALED,
    ObjectEntry,
    ObjectTable,
)
from trio_ray.runtime.core.objects.transfer import Transfers
from trio_ray.runtime.core.scheduling.local import (
    DISPATCHED,
    DONE,
    FORWARDED,
    READY,
    WAITING,
    LocalScheduler,
    TaskEntry,
    TemplateEntry,
    WorkerEntry,
)
from trio_ray.runtime.core.scheduling.policies.base import PolicyError
from trio_ray.runtime.core.spec import Kind, TaskSpec, TaskTemplate

FIRST = ids.return_id(b"", 0)
"""What a task's id is followed by in the id of its first result."""
OK = Status.OK
CALL, CREATION = Kind.ACTOR_CALL, Kind.ACTOR_CREATION
HERE = Where.INLINE
# Looking one up in its class takes 70 ns in Python 3.11, which counts where it is done for every task.


class Tasks:
    """All unfinished tasks that this node owns or runs."""

    def __init__(
        self, node: Address, shards: int, table: ObjectTable, transfers: Transfers, scheduler: LocalScheduler,
        functions: dict[bytes, Function], keep: Callable[[TaskSpec, TemplateEntry, int], int],
    ) -> None:  # fmt: skip
        self._node = node
        self._shards = shards
        self._table = table
        self._transfers = transfers
        self._scheduler = scheduler
        self._functions = functions
        self._keep = keep
        self.actors = Actors(node, shards, scheduler, self.fail)
        self.now = 0.0
        self.effects: list[AnyEffect] = []
        """Of the current step."""
        self.entries: dict[bytes, TaskEntry] = {}
        self.templates: dict[bytes, TemplateEntry] = {}
        self.delivery = Delivery(table, transfers)
        self.finished: dict[Address, list[TaskResult]] = {}
        """Results for the nodes that wait for them."""
        self.waiting = 0
        """Tasks that are to run here and lack inputs, actor calls left out."""
        self.events: list[TaskEvent] = []
        self.unlogged: list[TaskEntry] = []
        self.ended: list[TaskEntry] = []
        """Done after their lineage was logged, and what they were to make was forgotten before: that goes, too."""
        self.cancelled: dict[bytes, None] = {}
        """Scopes that were cancelled, and tasks that were before they came: what arrives for them later is refused."""
        self.strays: dict[bytes, set[bytes]] = {}
        """Nurseries' scopes in which tasks may run that their openers do not know, children of the openers' tasks; with
        what the ids of these begin with."""
        self.submitters: set[Address] = set()
        """Processes that submitted tasks."""
        self.assignments = 0
        """How many tasks placement ever sent here."""
        self._forward: list[TaskEntry] = []
        self._failing: list[tuple[TaskEntry, bytes]] = []
        self._wanting_function: dict[bytes, list[TaskEntry]] = {}
        self._deadlines: list[tuple[float, bytes]] = []
        table.expected = self._expects

    def _expects(self, object_id: bytes) -> bool:
        task = None if ids.is_put(object_id) else self.entries.get(ids.task_of(object_id))
        return task is not None and not task.origin

    # -- arriving ----------------------------------------------------------------------------------------------

    def learn(self, templates: list[TaskTemplate], functions: list[Function]) -> None:
        """Templates and functions that a link brought for the first time."""
        for template in templates:
            if template.template_id not in self.templates:
                self.templates[template.template_id] = TemplateEntry(template)
        fresh = [function for function in functions if function.function_id not in self._functions]
        for function in fresh:
            self._functions[function.function_id] = function
            shard = ids.shard_of(function.function_id, self._shards)
            self.effects.append(Send(control_address(shard), PutFunctions([function])))

    def submit(self, source: Address, message: SubmitTasks) -> None:
        """A process of this node submits tasks."""
        self.submitters.add(source)
        if message.templates or message.functions:
            self.learn(message.templates, message.functions)
        table, entries, templates, now = self._table, self.entries, self.templates, self.now
        objects, solo, actors = table.entries, table.solo(source), self.actors.local
        kept: dict[bytes, int] = {}
        """By template: how many more tasks of this batch stay here. Tasks with inputs are asked about one by one."""
        last = called = scope = b""
        left = -1
        cancelled = self.cancelled
        simple = refused = False
        ready: list[TaskEntry] = []
        """Of the template ``last``, and calls of the actor ``called`` if it is one: they need nothing, and are told to
        the scheduler together."""
        worker: WorkerEntry | None = None
        """Of that actor, if it is here and alive, and no call of this process waits."""
        handle: ObjectEntry | None = None
        log = self.unlogged.append
        for spec in message.specs:
            task_id = spec.task_id
            if spec.template != last or spec.actor != called or (cancelled and spec.scope != scope):
                if ready:
                    self._scheduler.accept(ready, worker, now)
                    ready = []
                called, worker, handle = spec.actor, None, None
                if called:
                    actor = actors.get(called)
                    if actor is not None and actor.alive and source not in actor.waiting:
                        worker = actor.worker
                kept[last] = left
                last = spec.template
                left = kept.get(last, -1)
                template = templates[last]
                retries = template.template.max_retries
                needs = template.template.function_id
                scope = spec.scope
                refused = bool(cancelled) and self._is_cancelled(spec)
                simple = template.simple and not refused and (not needs or needs in self._functions)
            first = task_id + FIRST
            if task_id in entries:
                self._submitted_again(source, entries[task_id])
                continue
            if first in objects:
                if self._made_before(source, spec, template):
                    continue
                result = None
            elif template.simple:
                objects[first] = result = ObjectEntry(first, solo)
            else:
                result = None
            task = entries[task_id] = TaskEntry(spec, template, "", now, retries, READY, result=result)
            if result is None:
                for index in range(template.template.num_returns):
                    table.expect(ids.return_id(task_id, index), source)
            if spec.inputs or spec.borrowed:
                for object_id in spec.inputs:
                    table.pin(table.know(object_id))
                for object_id in spec.borrowed:
                    table.pin(table.know(object_id))
            if called:
                if handle is None or handle.state is GONE:  # a call that failed at once held it last
                    handle = table.know(called + FIRST)
                table.pin(handle)
            if spec.deadline is not None:
                heapq.heappush(self._deadlines, (spec.deadline, task_id))
            log(task)
            if simple and not spec.inputs:
                if worker is not None:
                    ready.append(task)
                    continue
                if left > 0:  # by far the most common: nothing to wait for, and it stays
                    left -= 1
                    ready.append(task)
                    continue
            if ready:
                self._scheduler.accept(ready, worker, now)
                ready = []
            worker = None  # this one may have to wait, and calls behind it do not overtake it
            task.phase = WAITING
            if refused:
                self.fail(task, "TaskCancelledError", f"{template.template.name} was submitted in a cancelled scope")
            elif template.template.kind == CALL:
                if self.actors.route(task):
                    self.admit(task)
            else:
                if template.template.kind == CREATION:
                    self.actors.expect(task_id)
                stays = -1 if spec.inputs else left
                if stays < 0:
                    try:
                        stays = self._keep(spec, template, 1 if spec.inputs else len(message.specs))
                    except PolicyError as error:
                        self.fail(task, "TaskUnschedulableError", str(error))
                        continue
                if stays:
                    self.admit(task)
                else:
                    self.forward(task)
                if not spec.inputs:
                    left = stays - 1 if stays else 0
        if ready:
            self._scheduler.accept(ready, worker, now)

    def may_have_spawned(self, spec: TaskSpec) -> None:
        """This task, which is done or runs again, may have left others running in its scope."""
        if len(spec.scope) > ids.SCOPE_BYTES:  # a job's own is cancelled at its end whatever ran in it
            self.strays.setdefault(spec.scope, set()).add(ids.siblings_prefix(spec.task_id))

    def _submitted_again(self, source: Address, task: TaskEntry) -> None:
        """A parent that runs again submits a child that is still under way: its process now waits for the results."""
        self.may_have_spawned(task.spec)
        template = task.template.template
        if task.origin and not task.retries:  # the node that owned it may be dead, but it is wanted after all
            task.retries = template.max_retries
        for index in range(template.num_returns):
            entry = self._table.expect(ids.return_id(task.spec.task_id, index), source)
            self.delivery.want(source, entry, fetch=False)

    def _made_before(self, source: Address, spec: TaskSpec, template: TemplateEntry) -> bool:
        """Whether a re-executed parent submits a child again whose results are still here."""
        count = template.template.num_returns
        for index in range(count):
            entry = self._table.entries.get(ids.return_id(spec.task_id, index))
            if entry is None or entry.state == PENDING:
                return False
            if entry.state == UNSEALED:
                return False
        self.may_have_spawned(spec)
        for index in range(count):
            entry = self._table.entries[ids.return_id(spec.task_id, index)]
            self._table.hold(entry, source)
            self.delivery.tell(source, entry)
        return count > 0

    def assigned(self, message: AssignTasks | CallActors) -> None:
        """Another node's tasks are to run here."""
        self.learn(message.templates, [])
        reason = ""
        if type(message) is AssignTasks:
            self.assignments += len(message.specs)
            reason = message.reason
        for spec in message.specs:
            template = self.templates[spec.template]
            own = self.entries.get(spec.task_id)
            if own is not None:
                # Placement chose the very node that asked; or a resubmission of what is running here already.
                if own.phase == FORWARDED and not own.origin:
                    own.phase, own.node, own.reason = WAITING, "", reason
                    self.admit(own)
                else:
                    own.origin = message.origin if message.origin != self._node else own.origin
                continue
            task = self.entries[spec.task_id] = TaskEntry(
                spec, template, message.origin, self.now, template.template.max_retries, reason=reason
            )
            if self.cancelled and self._is_cancelled(spec):
                self.fail(task, "TaskCancelledError", f"{template.template.name} arrived after it was cancelled")
            elif template.template.kind != CALL or spec.actor in self.actors.local:
                self.admit(task)
            else:
                del self.entries[spec.task_id]
                self.finished.setdefault(message.origin, []).append(TaskResult(spec.task_id, OK, ()))

    def admit(self, task: TaskEntry) -> None:
        """The task runs here: gather what it needs."""
        spec = task.spec
        task.phase = WAITING
        missing = 0
        function_id = task.template.template.function_id
        if function_id and function_id not in self._functions:
            missing += 1
            self._want_function(function_id, task)
        if spec.inputs:
            table = self._table
            task.using = True
            failure: ObjectEntry | None = None
            for object_id in spec.inputs:
                entry = table.know(object_id)
                entry.uses += 1
                if entry.local:
                    if entry.error:
                        failure = entry
                else:
                    missing += 1
                    waiter = partial(self._input_ready, task)
                    if entry.waiters is None:
                        entry.waiters = [waiter]
                    else:
                        entry.waiters.append(waiter)
                    if ids.task_of(object_id) not in self.entries or entry.state == ELSEWHERE:
                        self._transfers.fetch(entry, self.now, self.effects)
            if failure is not None:
                self._fail_with(task, failure.payload)
                return
        task.missing = missing
        if missing and task.template.template.kind != CALL:
            task.waiting = True
            self.waiting += 1
        if task.template.template.kind == CALL:
            if missing or not self.actors.local[spec.actor].alive:
                task.phase = WAITING if missing else READY
                self.actors.enqueue(task)
            else:
                self.actors.ready(task, self.now)
        elif not missing:
            self._scheduler.enqueue(task)

    def again(self, task: TaskEntry) -> None:
        """Run a task once more that was given to a worker."""
        if not task.origin:
            self.may_have_spawned(task.spec)
        if task.using:
            self._unuse_inputs(task)
        task.worker = None
        self.admit(task)

    def _input_ready(self, task: TaskEntry, entry: ObjectEntry) -> None:
        if task.phase != WAITING:
            return
        if entry.error:
            self._fail_after(task, entry.payload)
            return
        task.missing -= 1
        if not task.missing:
            self._all_here(task)

    def _fail_after(self, task: TaskEntry, payload: bytes) -> None:
        """Fail a task for its input, and then what fails for its result: a chain of tasks may be of any length."""
        self._failing.append((task, payload))
        if len(self._failing) == 1:
            for task, payload in self._failing:  # which grows
                if task.phase == WAITING:
                    self._fail_with(task, payload)
            self._failing = []

    def _all_here(self, task: TaskEntry) -> None:
        self._waits_no_longer(task)
        if task.template.template.kind == CALL:
            self.actors.ready(task, self.now)
        else:
            self._scheduler.enqueue(task)

    def _waits_no_longer(self, task: TaskEntry) -> None:
        if task.waiting:
            task.waiting = False
            self.waiting -= 1

    def _want_function(self, function_id: bytes, task: TaskEntry) -> None:
        waiting = self._wanting_function.get(function_id)
        if waiting is None:
            self._wanting_function[function_id] = [task]
            shard = ids.shard_of(function_id, self._shards)
            self.effects.append(Send(control_address(shard), GetFunctions([function_id])))
        else:
            waiting.append(task)

    def functions_arrived(self, functions: list[Function]) -> None:
        """Rows of the function table that tasks here waited for."""
        for function in functions:
            self._functions[function.function_id] = function
            for task in self._wanting_function.pop(function.function_id, []):
                if task.phase == WAITING:
                    task.missing -= 1
                    if not task.missing:
                        self._all_here(task)

    # -- ending ------------------------------------------------------------------------------------------------

    def done(self, worker: WorkerEntry, results: list[TaskResult]) -> None:
        """A worker reports results."""
        running, objects, process = worker.running, self._table.entries, worker.process
        unfinished, report, log = self.entries, self._table.unreported.append, self.events.append
        handle = None if worker.actor is None else objects.get(worker.actor + FIRST)
        submitter, ready = "", []
        timed, count, duration_s, ended = None, 0, 0.0, 0
        """Of a row of tasks of one template: how many were run, and for how long. And all that are no calls."""
        worker.progress_at = self.now
        for result in results:
            task = running.pop(result.task_id, None)
            if task is None:
                continue
            entry = task.template
            template = entry.template
            started_at = result.started_at
            if template.kind is not CALL:
                ended += 1
                if started_at:
                    if entry is not timed:
                        if timed is not None:
                            self._scheduler.measured(timed, count, duration_s)
                        timed, count, duration_s = entry, 0, 0.0
                    count += 1
                    duration_s += result.duration_s
            spec = task.spec
            if result.spawned and not task.origin:
                self.may_have_spawned(spec)
            made = task.result
            if made is not None and result.status is OK and not (spec.inputs or spec.borrowed or task.origin):
                output = result.outputs[0]
                if made.state is GONE:  # nobody wanted it for a while; somebody may again
                    made = objects.get(spec.task_id + FIRST)
                    if made is not None:
                        task.result = made
                if output.offset < 0 and not output.contained and (
                    made is None or (made.waiters is None and not made.exported)
                ):  # ``_finish`` in one go, for the most common case: a small result that only its submitter knows
                    task.phase = DONE
                    del unfinished[spec.task_id]
                    if task.logged:
                        self._logged_ends(task)
                    if handle is not None and spec.actor:  # tasks may stand before a creation
                        self._table.unpin(handle)
                    if made is not None and made.state is PENDING:
                        payload = output.payload
                        made.state, made.payload, made.size, made.primary = INLINE, payload, len(payload), True
                        report(made)
                        if spec.submitter in made.holders:
                            if spec.submitter != submitter:
                                submitter = spec.submitter
                                ready = self.delivery.ready.setdefault(submitter, [])
                            ready.append(Value(made.object_id, HERE, payload, 0, len(payload)))
                    log(
                        TaskEvent(
                            spec.task_id, template.name, process, task.submitted_at, task.dispatched_at, started_at,
                            started_at + result.duration_s, 0, task.reason,
                        )
                    )  # fmt: skip
                    continue
            if result.status == Status.RETRYABLE:
                if task.retries:
                    task.retries -= 1
                    self.again(task)
                    continue
            elif result.status == Status.CANCELLED:
                self.fail(task, "TaskCancelledError", f"{template.name} was cancelled")
                continue
            if template.kind == CREATION:
                self._constructed(worker, task, result)
            self._finish(task, result, process)
        self._scheduler.running -= ended
        if timed is not None:
            self._scheduler.measured(timed, count, duration_s)
        if worker.actor is not None:
            actor = self.actors.local.get(worker.actor)
            if actor is not None and actor.released:
                self.actors.end_if_idle(actor, self.effects)

    def _constructed(self, worker: WorkerEntry, task: TaskEntry, result: TaskResult) -> None:
        failed = "" if result.status == OK else _why(result)
        for call in self.actors.created(task, worker, failed, self.now):
            self.admit(call)
        entry = self._table.entries.get(ids.return_id(task.spec.task_id, 0))
        if failed:
            return
        if entry is None and not task.origin:
            self.actors.released(task.spec.task_id, self.effects)
        else:
            entry = entry or self._table.know(ids.return_id(task.spec.task_id, 0))
            entry.on_free = self._actor_freed

    def _actor_freed(self, entry: ObjectEntry) -> None:
        self.actors.released(ids.task_of(entry.object_id), self.effects)

    def _finish(self, task: TaskEntry, result: TaskResult, process: Address) -> None:
        """The task is done, here: store or discard what it made, tell who waits, let go of what it used."""
        spec = task.spec
        task.phase = DONE
        self._waits_no_longer(task)
        del self.entries[spec.task_id]
        if task.logged:
            self._logged_ends(task)
        if task.origin:
            self._finish_for(task, result, process)
        else:
            self._store(spec, result, process)
        self._let_go(task)
        self.events.append(
            TaskEvent(
                spec.task_id, task.template.template.name, process or self._node, task.submitted_at, task.dispatched_at,
                result.started_at, result.started_at + result.duration_s if process else self.now, result.status,
                task.reason,
            )
        )  # fmt: skip

    def _logged_ends(self, task: TaskEntry) -> None:
        made = task.result
        if made is None or made.state is GONE or not made.logged:
            self.ended.append(task)

    def _store(self, spec: TaskSpec, result: TaskResult, process: Address) -> None:
        """Results of a task that this node owns, made here."""
        entries, table = self._table.entries, self._table
        failed = result.status != OK
        for index, output in enumerate(result.outputs):
            object_id = spec.task_id + (index.to_bytes(4, "big") if index else FIRST)
            entry = entries.get(object_id)
            if output.offset >= 0:
                entry = table.unsealed_by(process, object_id)
                if entry is None:
                    continue
                table.seal(entry, SHARED, size=output.size, contained=output.contained)
            elif entry is None:
                continue
            else:
                payload = output.payload
                table.seal(
                    entry, INLINE, payload=payload, size=len(payload), error=failed, contained=output.contained
                )
            if spec.submitter in entry.holders:
                self.delivery.tell(spec.submitter, entry)

    def wait(self, process: Address, object_ids: list[bytes], fetch: bool) -> None:
        """A process wants to know when objects are ready and, with ``fetch``, to have them here."""
        for object_id in object_ids:
            entry = self._table.know(object_id)
            if not self.delivery.want(process, entry, fetch=fetch) and (
                entry.state == ELSEWHERE or ids.task_of(object_id) not in self.entries
            ):
                self._transfers.fetch(entry, self.now, self.effects)

    def _finish_for(self, task: TaskEntry, result: TaskResult, process: Address) -> None:
        """Results of another node's task: small plain ones move there, the others stay here and are reported."""
        outputs: list[Output] = []
        table = self._table
        stays = task.template.template.kind == CREATION and result.status == OK
        for index, output in enumerate(result.outputs):
            object_id = ids.return_id(task.spec.task_id, index)
            if output.offset >= 0:
                entry = table.unsealed_by(process, object_id)
                if entry is None:
                    continue
                entry.exported = True
                table.seal(entry, SHARED, size=output.size, contained=output.contained)
            elif output.contained or stays or object_id in table.entries:
                # The last: something here waits for it, too.
                entry = table.know(object_id)
                table.seal(
                    entry, INLINE, payload=output.payload, size=len(output.payload),
                    error=result.status != OK, contained=output.contained,
                )  # fmt: skip
            outputs.append(output)
        again = task.retries < task.template.template.max_retries
        told = TaskResult(
            result.task_id, result.status, tuple(outputs), result.started_at, result.duration_s, result.spawned or again
        )
        self.finished.setdefault(task.origin, []).append(told)

    def finished_elsewhere(self, source: Address, results: list[TaskResult]) -> list[bytes]:
        """Another node ran tasks of this one. Answers with objects it kept that nobody here wants any more."""
        unwanted: list[bytes] = []
        table = self._table
        for result in results:
            task = self.entries.get(result.task_id)
            if task is None or task.phase != FORWARDED:
                continue
            kind = task.template.template.kind
            if not result.outputs and task.template.template.num_returns:  # the actor was not there
                self.actors.refused(task)
                continue
            task.phase = DONE
            del self.entries[result.task_id]
            if result.spawned:
                self.may_have_spawned(task.spec)
            if task.logged:
                self._logged_ends(task)
            failed = result.status != OK
            for index, output in enumerate(result.outputs):
                object_id = ids.return_id(result.task_id, index)
                entry = table.entries.get(object_id)
                stays = output.offset >= 0 or bool(output.contained) or (kind == CREATION and not failed)
                if entry is None:
                    if stays:
                        unwanted.append(object_id)
                    continue
                if stays and not (entry.holders or entry.pins or entry.uses or entry.exported):
                    entry.waiters = None  # of processes that waited for it, and dropped it since
                    table.discard_when_unused(entry)
                    unwanted.append(object_id)
                    continue
                if stays:
                    table.export(entry)
                if output.offset >= 0:
                    table.exists_at(entry, output.size, (source,))
                    if entry.waiters:
                        self._transfers.fetch(entry, self.now, self.effects)
                    elif not (entry.holders or entry.pins):  # it was lent, and is not any more
                        table.discard_when_unused(entry)
                        continue
                else:
                    table.seal(
                        entry, INLINE, payload=output.payload, size=len(output.payload), error=failed,
                        contained=output.contained,
                    )  # fmt: skip
                if task.spec.submitter in entry.holders:
                    self.delivery.tell(task.spec.submitter, entry)
            if kind == CREATION:
                self._creation_elsewhere(task, source, result)
            self._let_go(task)
        return unwanted

    def _creation_elsewhere(self, task: TaskEntry, source: Address, result: TaskResult) -> None:
        failed = result.status != OK
        state = ActorState.DEAD if failed else ActorState.ALIVE
        reason = f"the constructor of {task.template.template.name} failed: {_why(result)}" if failed else ""
        for call in self.actors.located(task.spec.task_id, state, source, reason):
            self.admit(call)

    def _let_go(self, task: TaskEntry) -> None:
        spec = task.spec
        if task.using:
            self._unuse_inputs(task)
        if not task.origin:
            table = self._table
            for object_id in spec.inputs:
                table.unpin(table.entries[object_id])
            for object_id in spec.borrowed:
                table.unpin(table.entries[object_id])
            if spec.actor:
                table.unpin(table.entries[ids.return_id(spec.actor, 0)])

    def _unuse_inputs(self, task: TaskEntry) -> None:
        task.using = False
        for object_id in task.spec.inputs:
            self._table.unuse(self._table.entries[object_id])

    def fail(self, task: TaskEntry, kind: str, sentence: str) -> None:
        """The task ends with a system error."""
        self._fail_with(task, system_error(kind, sentence))

    def _fail_with(self, task: TaskEntry, payload: bytes) -> None:
        template = task.template.template
        if task.phase == READY and template.kind != CALL:
            self._scheduler.withdraw([task])
        result = TaskResult(task.spec.task_id, Status.ERROR, (Output(payload),) * template.num_returns)
        self._finish(task, result, "")
        if template.kind == CALL:
            self.actors.failed_waiting(task, self.now, self.effects)
        elif template.kind == CREATION:
            reason = f"{template.name} could not be created: {text_of(payload)}"
            self.actors.publish(task, ActorState.DEAD, reason)
            kind = kind_of(payload)
            self.actors.located(
                task.spec.task_id, ActorState.DEAD, "", reason, kind if kind == "ActorUnschedulableError" else ""
            )

    def _is_cancelled(self, spec: TaskSpec) -> bool:
        if spec.task_id in self.cancelled:
            return True
        scope = spec.scope
        step = ids.SCOPE_BYTES
        return any(scope[:end] in self.cancelled for end in range(step, len(scope) + 1, step))

    # -- leaving a step ----------------------------------------------------------------------------------------

    @property
    def forwarding(self) -> bool:
        """Whether this step hands tasks to placement."""
        return bool(self._forward)

    def forward(self, task: TaskEntry) -> None:
        """Let placement choose a node for the task."""
        task.phase, task.node = FORWARDED, ""
        self._forward.append(task)

    def place_anew(self, tasks: list[TaskEntry]) -> None:
        """Tasks withdrawn from the queues, for there is no room here: they go back to their owners, or to placement."""
        returned: dict[Address, list[bytes]] = {}
        for task in tasks:
            if task.using:
                self._unuse_inputs(task)
            if task.origin:
                del self.entries[task.spec.task_id]
                returned.setdefault(task.origin, []).append(task.spec.task_id)
                self._expect_from_elsewhere(task)
            else:
                self.forward(task)
        for origin, task_ids in returned.items():
            self.effects.append(Send(origin, ReturnTasks(task_ids)))

    def _expect_from_elsewhere(self, task: TaskEntry) -> None:
        """The task was to run here and will not: who waits here for its results has to have them fetched."""
        for index in range(task.template.template.num_returns):
            entry = self._table.entries.get(ids.return_id(task.spec.task_id, index))
            if entry is not None and entry.waiters and not entry.local:
                self._transfers.fetch(entry, self.now, self.effects)

    def returned(self, source: Address, task_ids: list[bytes]) -> None:
        """Another node had no room for tasks of this one."""
        for task_id in task_ids:
            task = self.entries.get(task_id)
            if task is None or task.phase != FORWARDED or task.node not in ("", source):
                continue
            if self.cancelled and self._is_cancelled(task.spec):
                self.fail(task, "TaskCancelledError", f"{task.template.template.name} was cancelled on its way")
            else:
                self.forward(task)

    def flush(self) -> None:
        """Send what this step collected, but results for other nodes (they may have to wait for the ledger)."""
        effects = self.effects
        if self._forward:
            forward = [task for task in self._forward if task.phase == FORWARDED and not task.node]
            self._forward = []
            for task in forward:
                self.export(task)
            if forward:
                templates = {task.spec.template: task.template.template for task in forward}
                specs = [task.spec for task in forward]
                effects.append(Send(PLACEMENT, PlaceTasks(specs, list(templates.values()))))
        self.actors.flush(effects, self.export)
        self.delivery.flush(effects)

    def export(self, task: TaskEntry) -> None:
        """What the task refers to is about to be known on another node."""
        table = self._table
        for object_id in (*task.spec.inputs, *task.spec.borrowed):
            table.export(table.know(object_id))
        if task.template.template.kind == CREATION:
            entry = table.entries.get(ids.return_id(task.spec.task_id, 0))
            if entry is not None:
                table.export(entry)

    def take_finished(self) -> list[AnyEffect]:
        """The results for other nodes."""
        effects: list[AnyEffect] = [
            Send(origin, TasksFinished(results)) for origin, results in self.finished.items()
        ]
        self.finished = {}
        return effects

    def next_deadline(self) -> float | None:
        """When the next task's time is up."""
        while self._deadlines and self._deadlines[0][1] not in self.entries:
            heapq.heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    def overdue(self) -> list[TaskEntry]:
        """Tasks whose time is up."""
        tasks = []
        while self._deadlines and self._deadlines[0][0] <= self.now:
            task = self.entries.get(heapq.heappop(self._deadlines)[1])
            if task is not None:
                tasks.append(task)
        return tasks

    def validate(self) -> None:
        """Assert the invariants of the tasks' life."""
        assert self.waiting == sum(task.waiting for task in self.entries.values())
        for task_id, task in self.entries.items():
            assert task.spec.task_id == task_id and task.phase != DONE
            if task.phase == WAITING:
                assert task.missing > 0 or task.spec.actor, "waits for nothing"
            if task.phase == DISPATCHED:
                assert task.worker is not None and task.worker.running.get(task_id) is task
            for object_id in task.spec.inputs:
                assert object_id in self._table.entries, "an input was forgotten"
        self.actors.validate()


def _why(result: TaskResult) -> str:
    """What a failed constructor says."""
    return text_of(result.outputs[0].payload) if result.outputs else "it was cancelled"
