"""The paper's scheduler (section 4.2.2): bottom-up.

**Keep.** A node keeps a task unless it cannot ever hold it, or its queue is too long. How long is too long cannot be
said in tasks: a thousand tasks of 2 µs are nothing, and one task of a minute behind busy CPUs is a minute lost while
other nodes idle. So the queue is measured in the time a task would wait. With ``slots`` tasks running at once, a task
with ``queued`` tasks ahead of it starts after about ``1 + queued // slots`` rounds of a mean duration each (whole
rounds: tasks submitted together also end together, so that the first free CPU is a full duration away). It is kept if
that is at most ``max_wait_s``, which is chosen a good deal above what handing a task over costs (a fraction of a
millisecond), and well below what anyone would call a long task. While nothing is known of a function's duration, its
tasks are kept only as far as CPUs are free: should they be long, they are spread from the start; should they be
short, only the very first ones paid for the way. Actors stay, and often hold no CPU that would show that a node is
full of them, so each counts as a busy slot.

**Place.** Among the nodes that can hold the task, the one with the lowest estimated wait: the queue times the mean
task time, over the slots it has, plus the bytes of inputs that it lacks over its bandwidth; both means are exponential
averages that the nodes report in heartbeats.
"""

import math
from collections.abc import Sequence

from trio_ray.runtime.core.scheduling.policies.base import InputView, NodeView, ScoringPolicy, TaskView

DEFAULT_BANDWIDTH = 1e9
"""Bytes per second, until transfers have been measured."""
DEFAULT_MEAN_S = 1e-3
"""Task time assumed until tasks have ended: only so that queues count for something."""


def remote_bytes(node: NodeView, inputs: Sequence[InputView]) -> int:
    """How much would have to be moved to the node."""
    total = 0
    for item in inputs:
        if node.node not in item.nodes:
            total += item.size
    return total


def queue_wait_s(task: TaskView, node: NodeView) -> float:
    """How long a task would wait for resources at a node that can hold it; 0 if they are free.

    Infinitely long where actors hold them: these do not end by themselves.
    """
    if node.free_slots(task.placement) > 0:
        return 0.0
    slots = node.slots(task.placement)
    if not slots:
        return math.inf
    mean = node.mean_task_s or task.mean_s or DEFAULT_MEAN_S
    return (node.queued + 1) * mean / slots


class BottomUp(ScoringPolicy):
    """Keep tasks where they are born while the wait is short; else the node with the least estimated wait."""

    inputs_matter_to_holders_only = True
    max_wait_s: float = 0.02
    """How long a task may be expected to wait for a CPU at the node where it was born."""

    def keep(self, task: TaskView, node: NodeView) -> bool:
        """Keep it unless it would wait longer than ``max_wait_s``, or could never run here."""
        return self.keep_many(task, 1, node) == 1

    def keep_many(self, task: TaskView, count: int, node: NodeView) -> int:
        """As ``keep`` for each in turn, in closed form."""
        slots = node.slots(task.placement)
        if slots == 0:
            return 0
        if node.peers == 0:
            return count
        if task.is_actor:
            return max(0, min(count, slots - node.actors - node.running - node.queued))
        room = node.free_slots(task.placement)
        if task.mean_s > 0.0:
            rounds = int(self.max_wait_s / max(task.mean_s, node.mean_task_s))
            room = max(room, rounds * slots)
        return max(0, min(count, room - node.queued))

    def score(self, task: TaskView, node: NodeView, inputs: Sequence[InputView]) -> float:
        """Estimated seconds until the task could start there."""
        wait = queue_wait_s(task, node)
        if inputs:
            wait += remote_bytes(node, inputs) / (node.bandwidth_bytes_per_s or DEFAULT_BANDWIDTH)
        return wait

    def reason(self, task: TaskView, node: NodeView, score: float) -> str:
        """The estimate that won."""
        return f"least estimated wait, {score * 1e3:.3g} ms"
