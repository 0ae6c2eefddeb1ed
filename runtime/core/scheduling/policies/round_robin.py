"""One node after the other, in joining order."""

from collections.abc import Sequence
from random import Random

from trio_ray.runtime.core.scheduling.policies.base import Choice, InputView, NodeView, Policy, TaskView


class RoundRobin(Policy):
    """Place every task at the next node that is large enough for it."""

    uses_inputs = False

    def __init__(self) -> None:
        self._last = -1
        """Position of the node chosen last."""

    def place(self, task: TaskView, nodes: Sequence[NodeView], inputs: Sequence[InputView], rng: Random) -> Choice:
        """The first node behind the one chosen last, or the first of all."""
        low, high = 0, len(nodes)
        while low < high:
            middle = (low + high) // 2
            if nodes[middle].position <= self._last:
                low = middle + 1
            else:
                high = middle
        chosen = nodes[low % len(nodes)]
        self._last = chosen.position
        return chosen
