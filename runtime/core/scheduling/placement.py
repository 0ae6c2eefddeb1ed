"""The global scheduler (paper, section 4.2.2): nodes hand it the tasks that they do not keep, it chooses their nodes.

What arrives in one step is placed together: tasks of one template and origin look alike to a policy, so that they
share a ``Ranking`` of the nodes, and leave in one message for each node chosen.

Where a task's inputs are matters to some policies. What is not known yet is asked of the object table, once, and
waited for a few milliseconds at most: the table answers only when an object exists, and a task whose input is still
to be made is better placed without knowing than late.

A task that no node could ever hold waits a moment for a node to join, then its owner is told why.
"""

from collections import deque
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

import msgspec

from trio_ray.runtime.core.effects import AnyEffect, Send, SetTimer
from trio_ray.runtime.core.ids import shard_of
from trio_ray.runtime.core.machine import AnyEvent, Received, TimerFired
from trio_ray.runtime.core.messages import (
    Address,
    AssignTasks,
    ControlAnswer,
    ControlQuery,
    Heartbeat,
    LocateObjects,
    NodesChanged,
    ObjectsLocated,
    PlaceTasks,
    TasksPlaced,
    TasksUnplaceable,
    control_address,
)
from trio_ray.runtime.core.recent import Recent
from trio_ray.runtime.core.scheduling.cluster import Candidates, ClusterView, Ranking
from trio_ray.runtime.core.scheduling.policies import (
    InputView,
    NodeView,
    Policy,
    PolicyError,
    ScoringPolicy,
    TaskView,
    load,
)
from trio_ray.runtime.core.spec import RESOURCE_UNIT, Kind, Resources, TaskSpec, TaskTemplate, amounts

LOCATE = "locate"
INFEASIBLE = "infeasible"
REMEMBERED = 50_000
"""Objects whose places are remembered."""


class _Locating:
    """A task that waits to be told where its inputs are."""

    __slots__ = ("deadline", "done", "origin", "spec", "template", "unknown")

    def __init__(self, origin: Address, spec: TaskSpec, template: TaskTemplate, unknown: int, deadline: float) -> None:
        self.origin = origin
        self.spec = spec
        self.template = template
        self.unknown = unknown
        self.deadline = deadline
        self.done = False


class _Group:
    """Tasks of one template and one origin, to be placed in this step."""

    __slots__ = ("origin", "specs", "template")

    def __init__(self, origin: Address, template: TaskTemplate) -> None:
        self.origin = origin
        self.template = template
        self.specs: list[TaskSpec] = []


class PlacementMachine:
    """Every decision of global placement."""

    def __init__(
        self,
        policy: Policy,
        *,
        shards: int,
        rng: Random,
        load_policy: Callable[[str], Policy] = load,
        infeasible_timeout_s: float = 1.0,
        locate_timeout_s: float = 0.005,
    ) -> None:
        self._policy = policy
        self._shards = shards
        self._rng = rng
        self._load_policy = load_policy
        self._infeasible_timeout_s = infeasible_timeout_s
        self._locate_timeout_s = locate_timeout_s
        self._policies: dict[str, Policy] = {}
        """Of templates that name their own."""
        self.cluster = ClusterView()
        self._groups: dict[tuple[bytes, Address], _Group] = {}
        self._known: Recent[bytes, InputView] = Recent(REMEMBERED)
        self._asked: Recent[bytes, float] = Recent(REMEMBERED)
        """When we began to wait for objects that may not exist yet."""
        self._locating: deque[_Locating] = deque()
        """In order of their deadlines."""
        self._waiting_for: dict[bytes, list[_Locating]] = {}
        self._locate: dict[int, list[bytes]] = {}
        """What to ask each shard at the end of this step."""
        self._infeasible: deque[tuple[float, Address, TaskSpec, TaskTemplate]] = deque()
        self._timers: dict[str, float] = {}
        self._now = 0.0
        self._effects: list[AnyEffect] = []
        self._on_message: dict[type, Callable[[Address, Any], None]] = {
            PlaceTasks: self._arrived,
            Heartbeat: lambda source, message: self.cluster.heard(source, message.load),
            NodesChanged: self._nodes_changed,
            ObjectsLocated: self._located,
            ControlQuery: self._query,
        }

    # -- the contract ------------------------------------------------------------------------------------------

    def start(self, now: float) -> list[AnyEffect]:
        """Nothing to do: nodes and tasks come to placement."""
        return []

    def step(self, events: Sequence[AnyEvent], now: float) -> list[AnyEffect]:
        """Take in what happened, answer with what to do."""
        effects: list[AnyEffect] = []
        self._effects, self._now = effects, now
        for event in events:
            if type(event) is Received:
                message = event.message
                self._on_message[type(message)](event.source, message)
            elif type(event) is TimerFired:
                self._timers.pop(event.key, None)
                if event.key == LOCATE:
                    self._locating_over()
        if self._groups:
            groups, self._groups = self._groups, {}
            for group in groups.values():
                self._place(group)
        if self._infeasible:
            self._give_up()
        if self._locate:
            for shard, object_ids in self._locate.items():
                effects.append(Send(control_address(shard), LocateObjects(object_ids)))
            self._locate = {}
        if self._locating:
            self._set_timer(LOCATE, self._locating[0].deadline)
        if self._infeasible:
            self._set_timer(INFEASIBLE, self._infeasible[0][0])
        self._effects = []
        return effects

    def _set_timer(self, key: str, at: float) -> None:
        if key not in self._timers:
            self._timers[key] = at
            self._effects.append(SetTimer(key, at))

    # -- arriving ----------------------------------------------------------------------------------------------

    def _arrived(self, source: Address, message: PlaceTasks) -> None:
        templates = {template.template_id: template for template in message.templates}
        last = b""
        specs: list[TaskSpec] = []
        locates = False
        for spec in message.specs:
            if spec.template != last:
                last = spec.template
                template = templates[last]
                specs = self._group(source, template).specs
                locates = self._uses_inputs(template)
            if locates and spec.inputs and self._must_locate(source, spec, template):
                continue
            specs.append(spec)

    def _group(self, origin: Address, template: TaskTemplate) -> _Group:
        key = (template.template_id, origin)
        group = self._groups.get(key)
        if group is None:
            group = self._groups[key] = _Group(origin, template)
        return group

    def _uses_inputs(self, template: TaskTemplate) -> bool:
        try:
            return len(self.cluster.nodes) > 1 and self._policy_of(template).uses_inputs
        except PolicyError:
            return False

    def _policy_of(self, template: TaskTemplate) -> Policy:
        name = template.policy
        if not name:
            return self._policy
        policy = self._policies.get(name)
        if policy is None:
            try:
                policy = self._policies[name] = self._load_policy(name)
            except ValueError as error:
                raise PolicyError(f"{template.name} cannot be placed: {error}") from error
        return policy

    # -- inputs ------------------------------------------------------------------------------------------------

    def _must_locate(self, origin: Address, spec: TaskSpec, template: TaskTemplate) -> bool:
        """Whether the task is to wait for an answer of the object table."""
        now, deadline = self._now, 0.0
        unknown: list[bytes] = []
        for object_id in spec.inputs:
            if self._known.get(object_id) is None:
                asked_at = self._asked.get(object_id)
                if asked_at is None:
                    asked_at = now
                    self._asked.put(object_id, now)
                    self._locate.setdefault(shard_of(object_id, self._shards), []).append(object_id)
                deadline = max(deadline, asked_at + self._locate_timeout_s)
                unknown.append(object_id)
        if not unknown or deadline <= now:
            return False
        # Not before the last of the queue, so that the queue stays ordered: some tasks wait longer than they have to,
        # but none longer than the timeout.
        deadline = now + self._locate_timeout_s
        waiting = _Locating(origin, spec, template, len(unknown), deadline)
        self._locating.append(waiting)
        for object_id in unknown:
            self._waiting_for.setdefault(object_id, []).append(waiting)
        return True

    def _located(self, source: Address, message: ObjectsLocated) -> None:
        for location in message.locations:
            object_id = location.object_id
            if location.nodes:
                self._known.put(object_id, InputView(object_id, location.size, location.nodes))
                self._asked.drop(object_id)
            else:
                self._known.drop(object_id)
            for waiting in self._waiting_for.pop(object_id, ()):
                waiting.unknown -= 1
                if not waiting.unknown and not waiting.done:
                    self._ready(waiting)
        while self._locating and self._locating[0].done:
            self._locating.popleft()

    def _locating_over(self) -> None:
        while self._locating and (self._locating[0].done or self._locating[0].deadline <= self._now):
            waiting = self._locating.popleft()
            if not waiting.done:
                self._ready(waiting)
                for object_id in waiting.spec.inputs:
                    others = self._waiting_for.get(object_id)
                    if others is not None and all(other.done for other in others):
                        del self._waiting_for[object_id]

    def _ready(self, waiting: _Locating) -> None:
        waiting.done = True
        self._group(waiting.origin, waiting.template).specs.append(waiting.spec)

    def _inputs(self, spec: TaskSpec) -> list[InputView]:
        found = []
        for object_id in spec.inputs:
            known = self._known.get(object_id)
            if known is not None:
                found.append(known)
        return found

    # -- choosing ----------------------------------------------------------------------------------------------

    def _place(self, group: _Group) -> None:
        template, specs = group.template, group.specs
        if not specs:
            return
        candidates = self.cluster.candidates(template.placement)
        if not candidates.nodes:
            deadline = self._now + self._infeasible_timeout_s
            self._infeasible.extend((deadline, group.origin, spec, template) for spec in specs)
            return
        try:
            policy = self._policy_of(template)
        except PolicyError as error:
            self._refuse(group.origin, specs, str(error))
            return
        chosen: list[int] = []
        """An index into the candidates for each task, in order; shorter than ``specs`` if the policy failed."""
        reasons: dict[int, str] = {}
        ranking: Ranking | None = None
        failure = ""
        try:
            task = self._view(group, specs[0])
            if isinstance(policy, ScoringPolicy) and type(policy).place is ScoringPolicy.place:
                ranking = candidates.ranking(policy, template.template_id, task)
                before = candidates.views.copy()
                self._choose_by_score(policy, task, group, candidates, ranking, chosen, reasons)
                for index in dict.fromkeys(chosen):
                    if index not in reasons:
                        view = before[index]
                        reasons[index] = policy.reason(task, view, policy.score(task, view, ()))
            else:
                self._choose(policy, task, group, candidates, chosen, reasons)
        except Exception as error:
            # A user's policy: its faults are the task's, not the cluster's.
            failure = (
                f"{template.name} cannot be placed: the scheduling policy {type(policy).__qualname__} failed with "
                f"{type(error).__name__}: {error}"
            )
        self._send(group, candidates, ranking, chosen, reasons)
        if len(chosen) < len(specs):
            self._refuse(group.origin, specs[len(chosen) :], failure)

    def _refuse(self, origin: Address, specs: list[TaskSpec], sentence: str) -> None:
        self._effects.append(Send(origin, TasksUnplaceable([spec.task_id for spec in specs], sentence)))

    def _view(self, group: _Group, spec: TaskSpec) -> TaskView:
        template = group.template
        is_actor = template.kind == Kind.ACTOR_CREATION
        return TaskView(template.name, template.placement, 0.0, len(spec.inputs), 0, group.origin, is_actor)

    def _choose_by_score(
        self,
        policy: ScoringPolicy,
        task: TaskView,
        group: _Group,
        candidates: Candidates,
        ranking: Ranking,
        chosen: list[int],
        reasons: dict[int, str],
    ) -> None:
        if not policy.uses_inputs:
            ranking.assign(len(group.specs), chosen)
            return
        alike = 0
        for spec in group.specs:
            inputs = self._inputs(spec) if spec.inputs else []
            if not inputs:
                alike += 1
                continue
            if alike:
                ranking.assign(alike, chosen)
                alike = 0
            task = self._view(group, spec)
            if policy.inputs_matter_to_holders_only:
                holders = dict.fromkeys(node for item in inputs for node in item.nodes)
                indices = [candidates.at[node] for node in holders if node in candidates.at]
            else:
                indices = list(range(len(candidates.nodes)))
            index, score = ranking.assign_with(task, inputs, indices)
            chosen.append(index)
            if index not in reasons:
                reasons[index] = policy.reason(task, candidates.views[index], score)
            self._copied(candidates.nodes[index].info.node, inputs)
        if alike:
            ranking.assign(alike, chosen)

    def _choose(
        self,
        policy: Policy,
        task: TaskView,
        group: _Group,
        candidates: Candidates,
        chosen: list[int],
        reasons: dict[int, str],
    ) -> None:
        views, at, shape, rng = candidates.views, candidates.at, candidates.shape, self._rng
        place, uses_inputs = policy.place, policy.uses_inputs
        for spec in group.specs:
            inputs: list[InputView] = []
            if len(spec.inputs) != task.inputs:
                task = self._view(group, spec)
            if spec.inputs and uses_inputs:
                inputs = self._inputs(spec)
            choice = place(task, views, inputs, rng)
            if type(choice) is tuple:
                choice, reason = choice
                reasons.setdefault(at.get(choice.node, -1), reason)
            index = at.get(choice.node) if type(choice) is NodeView else None
            if index is None:
                raise TypeError(f"place() returned {choice!r}, which is none of the nodes it was given")
            views[index] = views[index].after(1, shape)
            chosen.append(index)
            if inputs:
                self._copied(candidates.nodes[index].info.node, inputs)

    def _copied(self, node: Address, inputs: list[InputView]) -> None:
        """The node will have copies of these soon."""
        for item in inputs:
            if node not in item.nodes:
                self._known.put(item.object_id, InputView(item.object_id, item.size, (*item.nodes, node)))

    def _send(
        self,
        group: _Group,
        candidates: Candidates,
        ranking: Ranking | None,
        chosen: list[int],
        reasons: dict[int, str],
    ) -> None:
        batches: dict[int, list[TaskSpec]] = {}
        for index, spec in zip(chosen, group.specs, strict=False):
            batch = batches.get(index)
            if batch is None:
                batches[index] = [spec]
            else:
                batch.append(spec)
        self.cluster.assigned(candidates, ranking, {index: len(batch) for index, batch in batches.items()})
        for index, batch in batches.items():
            node = candidates.nodes[index].info.node
            if node != group.origin:
                self._effects.append(Send(group.origin, TasksPlaced(node, [spec.task_id for spec in batch])))
            assign = AssignTasks(group.origin, batch, [group.template], reasons.get(index, ""))
            self._effects.append(Send(node, assign))

    # -- what cannot be placed ---------------------------------------------------------------------------------

    def _nodes_changed(self, source: Address, message: NodesChanged) -> None:
        if self.cluster.changed(message.nodes) and self._infeasible:
            waiting, self._infeasible = self._infeasible, deque()
            for entry in waiting:
                _, origin, spec, template = entry
                if self.cluster.candidates(template.placement).nodes:
                    self._group(origin, template).specs.append(spec)
                else:
                    self._infeasible.append(entry)

    def _give_up(self) -> None:
        overdue: dict[tuple[bytes, Address], tuple[TaskTemplate, list[bytes]]] = {}
        while self._infeasible and self._infeasible[0][0] <= self._now:
            _, origin, spec, template = self._infeasible.popleft()
            overdue.setdefault((template.template_id, origin), (template, []))[1].append(spec.task_id)
        for (_, origin), (template, task_ids) in overdue.items():
            self._effects.append(Send(origin, TasksUnplaceable(task_ids, self._why_not(template))))

    def _why_not(self, template: TaskTemplate) -> str:
        shape, nodes = template.placement, list(self.cluster.nodes.values())
        asked = _describe(shape)
        if not nodes:
            return f"{template.name} asks for {asked}, but no node is alive; add one (trio-ray start --address …)"
        most: dict[str, int] = {}
        for state in nodes:
            for name, units in state.total.items():
                most[name] = max(most.get(name, 0), units)
        short = [(name, units) for name, units in shape if most.get(name, 0) < units]
        offer = "the only node offers" if len(nodes) == 1 else f"each of the {len(nodes)} nodes offers at most"
        if short:
            problem = f"{offer} {_describe(tuple((name, most.get(name, 0)) for name, _ in short))}"
        else:
            problem = f"none of the {len(nodes)} nodes has all of that at once"
        return (
            f"{template.name} asks for {asked}, but {problem}; ask for less, or add a node that has "
            f"{_describe(tuple(short) or shape)} (trio-ray start --address …)"
        )

    # -- views -------------------------------------------------------------------------------------------------

    def _query(self, source: Address, query: ControlQuery) -> None:
        """``available``: what is free now, over all nodes."""
        if query.subject != "available":
            error = f"there is no view called {query.subject!r} of placement; it shows 'available'"
            self._effects.append(Send(source, ControlAnswer(query.process, query.number, b"", error)))
            return
        free: dict[str, int] = {}
        for state in self.cluster.nodes.values():
            for name, units in state.view.available.items():
                free[name] = free.get(name, 0) + units
        body = msgspec.msgpack.encode({name: units / RESOURCE_UNIT for name, units in sorted(free.items())})
        self._effects.append(Send(source, ControlAnswer(query.process, query.number, body)))

    def validate(self) -> None:
        """Assert every invariant of placement."""
        self.cluster.validate()
        assert not self._groups and not self._locate, "a batch was not placed"
        deadlines = [waiting.deadline for waiting in self._locating]
        assert deadlines == sorted(deadlines)
        assert not self._locating or LOCATE in self._timers
        assert not self._infeasible or INFEASIBLE in self._timers
        for waiting_list in self._waiting_for.values():
            assert any(not waiting.done for waiting in waiting_list), "nobody waits for it"


def _describe(shape: Resources) -> str:
    """``{"CPU": 2.0}`` as ``2 CPU``."""
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts(shape).items()) or "no resources"
