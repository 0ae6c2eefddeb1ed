"""Two choices (Mitzenmacher, 2001): of two nodes drawn at random, the one with less load."""

from collections.abc import Sequence
from random import Random

from trio_ray.runtime.core.scheduling.policies.base import Choice, InputView, NodeView, Policy, TaskView


class PowerOfTwo(Policy):
    """Look at two random nodes only: nearly as even as looking at all, at a cost that no cluster size changes."""

    uses_inputs = False

    def place(self, task: TaskView, nodes: Sequence[NodeView], inputs: Sequence[InputView], rng: Random) -> Choice:
        """The less loaded of two."""
        first = nodes[int(rng.random() * len(nodes))]
        second = nodes[int(rng.random() * len(nodes))]
        return second if second.load() < first.load() else first
