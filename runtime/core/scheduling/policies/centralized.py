"""One scheduler for everything, as in systems before the paper's: nothing is kept where it is born."""

from trio_ray.runtime.core.scheduling.policies.base import NodeView, Policy, TaskView
from trio_ray.runtime.core.scheduling.policies.bottom_up import BottomUp


class Centralized(BottomUp):
    """Every task goes to global placement, which places by the estimate of ``BottomUp``."""

    def keep(self, task: TaskView, node: NodeView) -> bool:
        """Never, where there is a choice."""
        return Policy.keep(self, task, node)
