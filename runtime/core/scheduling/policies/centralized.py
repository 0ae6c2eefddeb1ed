"""One scheduler for everything, as in systems before the paper's: nothing is kept where it is born."""

from trio_ray.runtime.core.scheduling.policies.base import NodeView, TaskView
from trio_ray.runtime.core.scheduling.policies.bottom_up import BottomUp


class Centralized(BottomUp):
    """Every task goes to global placement, which places by the estimate of ``BottomUp``."""

    def keep(self, task: TaskView, node: NodeView) -> bool:
        """Never, not even where there is only one node: what a central scheduler costs is to be seen."""
        return False

    def keep_many(self, task: TaskView, count: int, node: NodeView) -> int:
        """None."""
        return 0
