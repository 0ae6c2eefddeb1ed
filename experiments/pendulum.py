"""Gymnasium's Pendulum-v1: the simulation that the training program and Table 4 run.

A policy here is eight weights of a linear function. Its features are odd in angle and angular velocity, as swinging up
to the left and to the right must be the same, and the terms in velocity and height let it pump energy in; so eight
numbers are enough to swing the pendulum up and hold it there.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

WEIGHTS = 8
EPISODE_STEPS = 200
"""After which Pendulum-v1 ends an episode."""
MAX_TORQUE = 2.0


class GymnasiumMissing(RuntimeError):
    """Gymnasium is not installed."""


def make_environment() -> Any:
    """A Pendulum-v1 without Gymnasium's checking wrappers. Raises ``GymnasiumMissing`` if it is not installed."""
    try:
        import gymnasium
    except ImportError:
        raise GymnasiumMissing(
            "this needs Gymnasium for its Pendulum-v1, which is not installed; run `pip install 'trio-ray[rl]'`"
        ) from None
    return gymnasium.make("Pendulum-v1", disable_env_checker=True).unwrapped


@cache
def environment() -> Any:
    """This process's own environment, made when it is first needed. Raises ``GymnasiumMissing``."""
    return make_environment()


def episode(environment: Any, weights: Sequence[float], seed: int, steps: int = EPISODE_STEPS) -> float:
    """The sum of rewards of one episode: at most 0, about -1,500 for a poor policy and -130 for a good one."""
    k0, k1, k2, k3, k4, k5, k6, k7 = (float(weight) for weight in weights)
    observation, _ = environment.reset(seed=seed)
    torque = np.zeros(1)
    total = 0.0
    for _ in range(steps):
        cosine, sine, velocity = observation.tolist()
        velocity /= 4.0
        wanted = sine * (k0 + cosine * (k1 + cosine * k2)) + velocity * (
            k3 + cosine * (k4 + cosine * k5) + velocity * velocity * k6 + sine * sine * k7
        )
        torque[0] = min(MAX_TORQUE, max(-MAX_TORQUE, wanted))
        observation, reward, _, _, _ = environment.step(torque)
        total += float(reward)
    return total
