"""Scheduling policies: the interface, those shipped, and ``load`` to get one by name (see docs/policies.md)."""

from trio_ray.runtime.core.scheduling.policies.base import (
    Choice,
    InputView,
    NodeView,
    Policy,
    PolicyError,
    ScoringPolicy,
    TaskView,
)
from trio_ray.runtime.core.scheduling.policies.bottom_up import BottomUp
from trio_ray.runtime.core.scheduling.policies.loader import load, names

__all__ = [
    "BottomUp",
    "Choice",
    "InputView",
    "NodeView",
    "Policy",
    "PolicyError",
    "ScoringPolicy",
    "TaskView",
    "load",
    "names",
]
