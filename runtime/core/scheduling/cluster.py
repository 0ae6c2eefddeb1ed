"""What placement knows of the nodes: their rows, their last heartbeats, and what it has assigned to them since.

Heartbeats are old when they arrive, and placement decides many times between two of them. Taken as they are, they
would send everything to whichever node looked idle last. So each node's view counts what placement itself has sent
there until a heartbeat says that it has arrived (``Load.assigned``).
"""

from collections import deque
from heapq import heapify, heappop, heappush, heapreplace

from trio_ray.runtime.core.messages import Address, Load, NodeInfo
from trio_ray.runtime.core.scheduling.policies.base import InputView, NodeView, ScoringPolicy, TaskView
from trio_ray.runtime.core.spec import Resources

IN_FLIGHT_BATCHES = 4096
"""How many batches to a node may be unconfirmed; older ones have surely arrived."""
SHAPES = 256
RANKINGS = 32
TYPICAL_WEIGHT = 0.1
"""Of the newest heartbeat, in what stands in for the averages of nodes that have none of their own yet."""

Entry = tuple[float, float, int]
"""Score, load and index of a candidate: the least is the best."""


class NodeState:
    """One node that is alive."""

    __slots__ = ("assigned", "in_flight", "info", "labels", "load", "position", "total", "view")

    def __init__(self, info: NodeInfo, position: int) -> None:
        self.info = info
        self.position = position
        self.total = dict(info.resources)
        self.labels = dict(info.labels)
        self.load: Load | None = None
        self.assigned = 0
        """Tasks ever assigned to it."""
        self.in_flight: deque[tuple[int, int, Resources]] = deque()
        """Batches it has not confirmed: ``assigned`` after the batch, tasks, what each needs."""
        self.view = NodeView(info.node, self.total, self.total, 0, 0, labels=self.labels, position=position)

    def sent(self, tasks: int, shape: Resources) -> None:
        """So many tasks were assigned; the view shows them already."""
        self.assigned += tasks
        self.in_flight.append((self.assigned, tasks, shape))

    def heard(self, load: Load) -> None:
        """A heartbeat."""
        self.load = load
        in_flight = self.in_flight
        if load.assigned < 0:
            in_flight.clear()
        while in_flight and in_flight[0][0] <= load.assigned:
            in_flight.popleft()


class Ranking:
    """The candidates for tasks that look alike, best first, kept from batch to batch.

    A heap with lazy deletion: a node whose view changed gets a new entry, and the old one is skipped when it comes up.
    """

    __slots__ = ("_current", "_heap", "_policy", "_task", "_views", "dirty")

    def __init__(self, policy: ScoringPolicy, task: TaskView, views: list[NodeView]) -> None:
        self._policy = policy
        self._task = task
        self._views = views
        self._current: list[Entry] = [self._entry(index) for index in range(len(views))]
        self._heap = list(self._current)
        heapify(self._heap)
        self.dirty: dict[int, None] = {}
        """Candidates whose views changed since they were scored."""

    def _entry(self, index: int) -> Entry:
        view = self._views[index]
        return (self._policy.score(self._task, view, ()), view.load(), index)

    def refresh(self) -> None:
        """Score anew what has changed."""
        for index in self.dirty:
            entry = self._current[index] = self._entry(index)
            heappush(self._heap, entry)
        self.dirty = {}
        if len(self._heap) > 4 * len(self._current) + 64:
            self._heap = list(self._current)
            heapify(self._heap)

    def assign(self, count: int, chosen: list[int]) -> None:
        """Choose a node for each of ``count`` tasks without inputs, one after the other; indices go to ``chosen``."""
        if self.dirty:
            self.refresh()
        heap, current, views, task = self._heap, self._current, self._views, self._task
        score, shape = self._policy.score, task.placement
        while count:
            index = heap[0][2]
            if current[index] is not heap[0]:
                heappop(heap)
                continue
            view = views[index].after(1, shape)
            entry = (score(task, view, ()), view.load(), index)
            views[index] = view
            current[index] = entry
            heapreplace(heap, entry)
            chosen.append(index)
            count -= 1

    def assign_with(self, task: TaskView, inputs: list[InputView], holders: list[int]) -> tuple[int, float]:
        """Choose a node for a task with inputs among those that hold some of them and the best of the others.

        Answers with its index and score.
        """
        if self.dirty:
            self.refresh()
        heap, current, views = self._heap, self._current, self._views
        aside: list[Entry] = []
        others: list[int] = []
        while heap:
            entry = heap[0]
            if current[entry[2]] is not entry:
                heappop(heap)
            elif entry[2] in holders:
                aside.append(heappop(heap))
            else:
                others.append(entry[2])
                break
        for entry in aside:
            heappush(heap, entry)
        score = self._policy.score
        best = min((score(task, views[i], inputs), views[i].load(), i) for i in (*holders, *others))
        index = best[2]
        views[index] = views[index].after(1, task.placement)
        self.dirty[index] = None
        return index, best[0]

    def validate(self) -> None:
        """Assert that every candidate has its entry."""
        present = set(map(id, self._heap))
        for index, entry in enumerate(self._current):
            assert entry[2] == index and id(entry) in present
            assert index in self.dirty or entry == self._entry(index), "a view changed unnoticed"


class Candidates:
    """The nodes whose total resources can hold a shape, in joining order."""

    __slots__ = ("at", "nodes", "rankings", "shape", "views")

    def __init__(self, shape: Resources, nodes: list[NodeState]) -> None:
        self.shape = shape
        self.nodes = nodes
        self.views = [state.view for state in nodes]
        """As policies see them, changed with each choice."""
        self.at = {state.info.node: index for index, state in enumerate(nodes)}
        self.rankings: dict[tuple[ScoringPolicy, bytes, Address], Ranking] = {}
        """By policy, template and origin."""

    def ranking(self, policy: ScoringPolicy, template_id: bytes, task: TaskView) -> Ranking:
        """The ranking for such tasks."""
        key = (policy, template_id, task.origin)
        ranking = self.rankings.get(key)
        if ranking is None:
            if len(self.rankings) >= RANKINGS:
                self.rankings.clear()
            ranking = self.rankings[key] = Ranking(policy, task, self.views)
        return ranking


class ClusterView:
    """All nodes, as placement sees them."""

    def __init__(self) -> None:
        self.nodes: dict[Address, NodeState] = {}
        self._joined = 0
        self._typical_mean_s = 0.0
        self._typical_bandwidth = 0.0
        self._candidates: dict[Resources, Candidates] = {}

    def changed(self, infos: list[NodeInfo]) -> bool:
        """Rows of the node table; True if a node came that was not there."""
        came = False
        for info in infos:
            if not info.alive:
                self.nodes.pop(info.node, None)
                continue
            state = self.nodes.get(info.node)
            if state is None or state.info.resources != info.resources or state.info.labels != info.labels:
                came = True
                self.nodes.pop(info.node, None)  # the last to join stands last
                self.nodes[info.node] = NodeState(info, self._joined)
                self._joined += 1
        self._candidates.clear()
        for state in self.nodes.values():
            state.view = self._view(state)
        return came

    def heard(self, node: Address, load: Load) -> None:
        """A heartbeat; one of a node that is not (or no longer) in the table is ignored."""
        state = self.nodes.get(node)
        if state is None:
            return
        state.heard(load)
        first = (not self._typical_mean_s and load.mean_task_s) or (
            not self._typical_bandwidth and load.bandwidth_bytes_per_s
        )
        self._typical_mean_s = _blend(self._typical_mean_s, load.mean_task_s)
        self._typical_bandwidth = _blend(self._typical_bandwidth, load.bandwidth_bytes_per_s)
        # Nodes without averages of their own learn of later changes with their next heartbeat.
        for changed in self.nodes.values() if first else (state,):
            changed.view = self._view(changed)
            self._show(changed, None, None)

    def _view(self, state: NodeState) -> NodeView:
        load = state.load
        queued = running = actors = 0
        mean_s, bandwidth = self._typical_mean_s, self._typical_bandwidth
        available = dict(state.total)
        if load is not None:
            available.update(dict.fromkeys(available, 0))
            available.update(load.available)
            queued, running, actors = load.queued, load.running, load.actors
            mean_s, bandwidth = load.mean_task_s or mean_s, load.bandwidth_bytes_per_s or bandwidth
        for _, tasks, shape in state.in_flight:
            queued += tasks
            for name, units in shape:
                available[name] = max(0, available.get(name, 0) - tasks * units)
        return NodeView(
            state.info.node,
            state.total,
            available,
            queued,
            running,
            mean_s,
            bandwidth,
            len(self.nodes) - 1,
            state.labels,
            state.position,
            actors,
            dict(load.held) if load is not None else {},
        )

    def candidates(self, shape: Resources) -> Candidates:
        """The nodes that can ever hold the shape."""
        found = self._candidates.get(shape)
        if found is None:
            if len(self._candidates) >= SHAPES:
                self._candidates.clear()
            nodes = [
                state
                for state in self.nodes.values()
                if all(state.total.get(name, 0) >= units for name, units in shape)
            ]
            found = self._candidates[shape] = Candidates(shape, nodes)
        return found

    def assigned(self, candidates: Candidates, ranking: Ranking | None, counts: dict[int, int]) -> None:
        """So many tasks went to these candidates, whose views (and entries in ``ranking``) show it already."""
        for index, tasks in counts.items():
            state = candidates.nodes[index]
            state.view = candidates.views[index]
            state.sent(tasks, candidates.shape)
            if len(state.in_flight) > IN_FLIGHT_BATCHES:
                state.in_flight.popleft()
                state.view = self._view(state)
                self._show(state, None, None)
            else:
                self._show(state, candidates, ranking)

    def _show(self, state: NodeState, shown: Candidates | None, ranked: Ranking | None) -> None:
        """Carry a node's new view everywhere but where it comes from."""
        node, view = state.info.node, state.view
        for candidates in self._candidates.values():
            index = candidates.at.get(node)
            if index is not None:
                if candidates is not shown:
                    candidates.views[index] = view
                for ranking in candidates.rankings.values():
                    if ranking is not ranked:
                        ranking.dirty[index] = None

    def validate(self) -> None:
        """Assert the invariants of the views."""
        for state in self.nodes.values():
            assert state.in_flight == deque(sorted(state.in_flight)), "batches out of order"
            assert state.view.queued == (state.load.queued if state.load else 0) + sum(t for _, t, _ in state.in_flight)
        for candidates in self._candidates.values():
            for state, view in zip(candidates.nodes, candidates.views, strict=True):
                assert self.nodes[state.info.node] is state and state.view is view, "a stale view"
            for ranking in candidates.rankings.values():
                ranking.validate()


def _blend(average: float, newest: float) -> float:
    if not newest:
        return average
    return average + TYPICAL_WEIGHT * (newest - average) if average else newest
