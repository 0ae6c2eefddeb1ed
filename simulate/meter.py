"""What a simulation measures as it goes: the raw figures behind a ``Report``."""

import re
from array import array

from trio_ray.runtime.core.messages import Address, AssignTasks, SubmitTasks, TasksDone, node_of
from trio_ray.runtime.core.spec import Resources

_FIGURE = re.compile(r"\d[\d.,]*(e[+-]?\d+)?")

MAX_RUNS = 1_000_000
"""Task runs kept for traces and plots; what comes later is counted, not kept."""

Run = tuple[str, Address, float, float, Resources]
"""A task that ran: its name, worker, start, end, and what it held."""


class Meter:
    """Counts, sums and samples; times are simulated seconds."""

    def __init__(self) -> None:
        self.tasks = 0
        """Tasks and actor calls that workers finished."""
        self.failed = 0
        self.latencies = array("d")
        """From a task's submission (the frame leaving its submitter) to its worker's report, in order of ending."""
        self.runs: list[Run] = []
        self.busy: dict[Address, dict[str, float]] = {}
        """Resource units times seconds, by node and resource."""
        self.bytes_moved = 0
        """Of objects, from node to node."""
        self.transfers = 0
        self.frames = 0
        """Control frames from node to node."""
        self.frame_bytes = 0
        self.reasons: dict[str, int] = {}
        """How many tasks placement sent where for which reason, figures in the reason left out."""
        self.placed: dict[Address, int] = {}
        """How many tasks ran on each node."""
        self._submitted: dict[bytes, float] = {}

    def submitted(self, message: SubmitTasks, now: float) -> None:
        """Tasks leave their submitter."""
        submitted = self._submitted
        for spec in message.specs:
            submitted[spec.task_id] = now

    def done(self, message: TasksDone, now: float) -> None:
        """A worker reports results."""
        submitted, latencies = self._submitted, self.latencies
        self.tasks += len(message.results)
        for result in message.results:
            if result.status:
                self.failed += 1
            at = submitted.pop(result.task_id, None)
            if at is not None:
                latencies.append(now - at)

    def assigned(self, message: AssignTasks) -> None:
        """Placement sends tasks to a node."""
        reason = _FIGURE.sub("#", message.reason) or "placed"
        self.reasons[reason] = self.reasons.get(reason, 0) + len(message.specs)

    def ran(self, name: str, worker: Address, start: float, end: float, held: Resources) -> None:
        """A task kept a worker busy."""
        node = node_of(worker)
        busy = self.busy.get(node)
        if busy is None:
            busy = self.busy[node] = {}
        for resource, units in held:
            busy[resource] = busy.get(resource, 0.0) + units * (end - start)
        self.placed[node] = self.placed.get(node, 0) + 1
        if len(self.runs) < MAX_RUNS:
            self.runs.append((name, worker, start, end, held))
