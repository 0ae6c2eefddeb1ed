"""Tasks go to their data: the node that lacks the fewest bytes of a task's inputs (paper, figure 8a)."""

from collections.abc import Sequence

from trio_ray.runtime.core.scheduling.policies.base import InputView, NodeView, TaskView
from trio_ray.runtime.core.scheduling.policies.bottom_up import BottomUp, remote_bytes


class Locality(BottomUp):
    """Keep tasks whose inputs are here, as ``BottomUp`` does; place the others where most of their inputs are."""

    def keep_many(self, task: TaskView, count: int, node: NodeView) -> int:
        """As ``BottomUp``, but none of those that would have to fetch something."""
        if task.inputs_here < task.inputs and node.peers:
            return 0
        return super().keep_many(task, count, node)

    def score(self, task: TaskView, node: NodeView, inputs: Sequence[InputView]) -> float:
        """Bytes to fetch; placement takes the node with the least load of several with equal scores."""
        return float(remote_bytes(node, inputs))

    def reason(self, task: TaskView, node: NodeView, score: float) -> str:
        """What is still to fetch."""
        return f"fewest input bytes to fetch, {score:.0f}"
