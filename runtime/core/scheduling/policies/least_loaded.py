"""The node with the fewest tasks for each of its CPUs, whatever they take and wherever the inputs are."""

from collections.abc import Sequence

from trio_ray.runtime.core.scheduling.policies.base import InputView, NodeView, ScoringPolicy, TaskView


class LeastLoaded(ScoringPolicy):
    """Place every task at the node with the fewest queued and running tasks for each CPU."""

    uses_inputs = False

    def score(self, task: TaskView, node: NodeView, inputs: Sequence[InputView]) -> float:
        """Tasks and actors for each CPU; a node that has something free comes before one that has not."""
        return node.load() if node.free_slots(task.placement) > 0 else 1e6 + node.load()

    def reason(self, task: TaskView, node: NodeView, score: float) -> str:
        """The load that won."""
        return f"least loaded, {node.load():.3g} tasks a CPU"
