"""Ready-made programs for ``trio-ray simulate`` and for studies, and loading of a user's own."""

from trio_ray.simulate.workloads.catalogue import WORKLOADS, Workload, WorkloadError, load_workload

__all__ = ["WORKLOADS", "Workload", "WorkloadError", "load_workload"]
