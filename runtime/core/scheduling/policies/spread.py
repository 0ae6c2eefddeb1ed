"""As many nodes as possible: the node that has the least to do, however small its share."""

from collections.abc import Sequence

from trio_ray.runtime.core.scheduling.policies.base import InputView, NodeView, ScoringPolicy, TaskView


class Spread(ScoringPolicy):
    """Place every task at the node with the fewest tasks and actors, so that equal nodes get equally many."""

    uses_inputs = False

    def score(self, task: TaskView, node: NodeView, inputs: Sequence[InputView]) -> float:
        """Tasks and actors there."""
        return float(node.queued + node.running + node.actors)

    def reason(self, task: TaskView, node: NodeView, score: float) -> str:
        """The count that won."""
        return f"spread, {score:.0f} tasks there"
