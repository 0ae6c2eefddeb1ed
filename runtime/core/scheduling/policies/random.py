"""Any node, all equally likely: the baseline that every other policy has to beat."""

from collections.abc import Sequence
from random import Random

from trio_ray.runtime.core.scheduling.policies.base import Choice, InputView, NodeView, Policy, TaskView


class RandomNode(Policy):
    """Place every task at a node drawn at random."""

    uses_inputs = False

    def place(self, task: TaskView, nodes: Sequence[NodeView], inputs: Sequence[InputView], rng: Random) -> Choice:
        """Any of the nodes."""
        return nodes[int(rng.random() * len(nodes))]
