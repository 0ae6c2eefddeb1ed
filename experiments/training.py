"""The paper's figure 3 in small: simulator actors try a policy out, an update task improves it, over and over.

The program is ``train_policy``, itself a remote task, which never waits for a value: each iteration hands the
references of its rollouts to the next update, so the whole training is one task graph that grows as it runs. ``main``
starts it, on a real cluster and in simulation alike.

The update is the cross-entropy method: simulators draw candidates around the policy's mean, the update moves the mean
and the spread to the best of them.
"""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np

import trio_ray
from trio_ray.experiments.pendulum import EPISODE_STEPS, WEIGHTS, episode, make_environment

ELITE = 0.15
"""Share of the candidates that the next policy is made of."""
EXPLORE = 0.6
"""Spread added in the first update; later ones add less, the last few none."""


@dataclass(frozen=True)
class Plan:
    """The size of a training run."""

    iterations: int = 24
    simulators: int = 10
    """Actors, the paper's ten unless told otherwise."""
    candidates: int = 6
    """Policies that each simulator tries in one rollout."""
    episodes: int = 6
    """Episodes that each candidate is tried for."""
    seed: int = 0

    @property
    def timesteps(self) -> int:
        """Simulated steps of the pendulum in the whole run."""
        return self.iterations * self.simulators * self.candidates * self.episodes * EPISODE_STEPS


@dataclass(frozen=True)
class Policy:
    """Where the search stands."""

    mean: np.ndarray
    spread: np.ndarray
    rewards: tuple[float, ...] = ()
    """The mean episode reward of all candidates, one an update so far."""
    rollout_s: tuple[float, ...] = ()
    """Processor time of each rollout so far, in seconds."""


@dataclass(frozen=True)
class Rollout:
    """What one simulator found in one iteration."""

    candidates: np.ndarray
    """One candidate's weights a row."""
    rewards: np.ndarray
    """The mean episode reward of each candidate."""
    seconds: float
    """Processor time it took, which other processes on the machine do not lengthen as they do elapsed time."""


@trio_ray.remote(num_cpus=0)
def create_policy(seed: int) -> Policy:
    """A policy that knows nothing, and so tries everything."""
    rng = np.random.default_rng(seed)
    return Policy(mean=0.1 * rng.standard_normal(WEIGHTS), spread=np.full(WEIGHTS, 3.0))


class Simulator:
    """An environment that stays loaded between rollouts."""

    def __init__(self, number: int, plan: Plan) -> None:
        self.environment = make_environment()
        self.number = number
        self.plan = plan

    def rollout(self, policy: Policy, iteration: int) -> Rollout:
        """Draw candidates around the policy and try each for a few episodes, the same for all candidates."""
        began = time.thread_time()
        plan = self.plan
        rng = np.random.default_rng((plan.seed, self.number, iteration))
        candidates = policy.mean + policy.spread * rng.standard_normal((plan.candidates, WEIGHTS))
        first_seed = (plan.seed * 1009 + iteration) * plan.episodes
        rewards = np.array(
            [
                np.mean([episode(self.environment, candidate, first_seed + i) for i in range(plan.episodes)])
                for candidate in candidates
            ]
        )
        return Rollout(candidates, rewards, time.thread_time() - began)


simulator_class = trio_ray.remote(num_cpus=1)(Simulator)


def next_policy(policy: Policy, plan: Plan, *rollouts: Rollout) -> Policy:
    """The mean and spread of the best candidates."""
    candidates = np.concatenate([rollout.candidates for rollout in rollouts])
    rewards = np.concatenate([rollout.rewards for rollout in rollouts])
    best = candidates[np.argsort(-rewards)[: max(2, round(ELITE * len(rewards)))]]
    explore = EXPLORE * max(0.0, 1.0 - len(policy.rewards) / (0.6 * plan.iterations))
    return Policy(
        mean=best.mean(axis=0),
        spread=np.sqrt(best.var(axis=0) + explore**2),
        rewards=(*policy.rewards, float(rewards.mean())),
        rollout_s=(*policy.rollout_s, *(rollout.seconds for rollout in rollouts)),
    )


@trio_ray.remote(num_cpus=0)
def update_policy(policy: Policy, plan: Plan, *rollouts: Rollout) -> Policy:
    """Improve the policy. (The paper gives this task the GPUs.)"""
    return next_policy(policy, plan, *rollouts)


class Board:
    """Where the rewards can be read while the training runs."""

    def __init__(self) -> None:
        self.shown: tuple[float, ...] = ()

    def post(self, policy: Policy) -> None:
        """Take the rewards up to this policy."""
        self.shown = policy.rewards

    def rewards(self) -> tuple[float, ...]:
        """One mean episode reward for each update so far."""
        return self.shown


board_class = trio_ray.remote(num_cpus=0)(Board)


@trio_ray.remote(num_cpus=0)
async def train_policy(plan: Plan, board: Any = None) -> Policy:
    """The program of the paper's figure 3; ``board``, if given, is told of each policy as it is made."""
    policy = create_policy.remote(plan.seed)
    simulators = [simulator_class.remote(number, plan) for number in range(plan.simulators)]
    for iteration in range(plan.iterations):
        rollouts = [simulator.rollout.remote(policy, iteration) for simulator in simulators]
        policy = update_policy.remote(policy, plan, *rollouts)
        if board is not None:
            board.post.remote(policy)
    trained: Policy = await policy
    return trained


async def main(cluster: trio_ray.Cluster, plan: Plan, board: Any = None) -> Policy:
    """Train on ``cluster``, real or simulated."""
    trained: Policy = await cluster.submit(train_policy, plan, board)
    return trained
