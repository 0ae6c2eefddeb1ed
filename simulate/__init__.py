"""Simulated clusters: ``simulate.run(main, nodes=100, cpus=32, …)`` runs a cluster program on a modelled cluster."""

from trio_ray.simulate.cluster import ClusterError, ClusterSpec, NodeGroup
from trio_ray.simulate.costs import CostError, Samples, exponential, lognormal, model, recorded, uniform
from trio_ray.simulate.engine import SimulationError
from trio_ray.simulate.profile import Profile, ProfileError, default_profile, free_profile, load_profile
from trio_ray.simulate.report import Report
from trio_ray.simulate.run import run

__all__ = [
    "ClusterError",
    "ClusterSpec",
    "CostError",
    "NodeGroup",
    "Profile",
    "ProfileError",
    "Report",
    "Samples",
    "SimulationError",
    "default_profile",
    "exponential",
    "free_profile",
    "load_profile",
    "lognormal",
    "model",
    "recorded",
    "run",
    "uniform",
]
