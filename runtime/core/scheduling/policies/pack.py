"""As few nodes as possible: fill one before the next is touched, so that others can be given back."""

from collections.abc import Sequence

from trio_ray.runtime.core.scheduling.policies.base import InputView, NodeView, ScoringPolicy, TaskView


class Pack(ScoringPolicy):
    """Place every task at the fullest node that still has room; when none has, at the one with the least load."""

    uses_inputs = False

    def score(self, task: TaskView, node: NodeView, inputs: Sequence[InputView]) -> float:
        """How much room it has, then which joined first; any room is better than none."""
        free = node.free_slots(task.placement)
        return free / node.slots(task.placement) + 1e-6 * node.position if free > 0 else 2.0 + node.load()

    def reason(self, task: TaskView, node: NodeView, score: float) -> str:
        """Whether it was room or load."""
        return "pack, the fullest node with room" if score < 2.0 else "pack, all full, least load"
