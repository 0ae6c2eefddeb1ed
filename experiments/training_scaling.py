"""How the policy training of the paper's figure 3 does: for real on a small cluster, simulated up to 256 CPUs.

The real run gives the reward as it rises and what each part costs in processor time; the simulation runs the very same
coroutine with those costs on larger clusters, with one simulator for each CPU.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import trio

import trio_ray
from trio_ray.experiments.pendulum import WEIGHTS, make_environment
from trio_ray.experiments.registry import Options, Progress
from trio_ray.experiments.results import Point, Result, command_line, machine_facts, point
from trio_ray.experiments.training import (
    Plan,
    Policy,
    Rollout,
    board_class,
    create_policy,
    main,
    next_policy,
    simulator_class,
    train_policy,
    update_policy,
)

NODES, CPUS = 3, 4
"""Of the real cluster. Its twelve CPUs are more than most machines here have; tasks take turns then."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""CPUs of the simulated clusters."""
CPUS_PER_NODE = 32
ROLLOUT_BYTES = 4_000
"""A pickled ``Rollout``, about."""
LOOK_EVERY_S = 0.2
"""How often a waiting driver reads the rewards so far."""

OnReward = Callable[[int, float], None]
"""Is told the number of an update (from 1) and the mean episode reward that led to it."""


@dataclass(frozen=True)
class Trained:
    """A finished real training."""

    policy: Policy
    plan: Plan
    elapsed_s: float
    """Of the training itself, the cluster being up."""
    start_s: float
    """To start the cluster."""

    @property
    def timesteps_per_s(self) -> float:
        """Over the whole training."""
        return self.plan.timesteps / self.elapsed_s


async def train(plan: Plan, policy: str, on_reward: OnReward) -> Trained:
    """Train on a real local cluster of its own, which is gone when this returns or raises."""
    began = time.monotonic()
    async with trio_ray.open_cluster(nodes=NODES, num_cpus=CPUS, policy=policy) as cluster:
        started = time.monotonic()
        board = board_class.remote()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_watch, board, plan.iterations, on_reward)
            trained = await main(cluster, plan, board)
        return Trained(trained, plan, time.monotonic() - started, started - began)


async def _watch(board: trio_ray.ActorHandle, updates: int, on_reward: OnReward) -> None:
    """Tell each reward once, soon after it is known."""
    told = 0
    while told < updates:
        rewards = await board.rewards.remote()
        for reward in rewards[told:]:
            told += 1
            on_reward(told, reward)
        if told < updates:
            await trio.sleep(LOOK_EVERY_S)


def update_seconds(simulators: int, plan: Plan) -> float:
    """What ``update_policy`` takes for so many rollouts, measured here on made-up ones: the median of five."""
    rng = np.random.default_rng(0)
    policy = Policy(mean=np.zeros(WEIGHTS), spread=np.ones(WEIGHTS))
    rollouts = [
        Rollout(rng.standard_normal((plan.candidates, WEIGHTS)), rng.standard_normal(plan.candidates), 0.0)
        for _ in range(simulators)
    ]
    times = []
    for _ in range(5):
        began = time.perf_counter()
        next_policy(policy, plan, *rollouts)
        times.append(time.perf_counter() - began)
    return float(np.median(times))


def environment_seconds() -> float:
    """What making an environment takes, once Gymnasium is loaded; measured here."""
    make_environment()
    began = time.perf_counter()
    make_environment()
    return time.perf_counter() - began


def simulate_training(cpus: int, trained: Trained, options: Options) -> float:
    """Simulated timesteps per second of the same program with one simulator for each of ``cpus`` CPUs."""
    from trio_ray import simulate

    plan = replace(trained.plan, simulators=cpus)

    async def program(cluster: trio_ray.Cluster) -> Policy:
        return await main(cluster, plan)

    report = simulate.run(
        program,
        nodes=max(1, cpus // CPUS_PER_NODE),
        cpus=min(cpus, CPUS_PER_NODE),
        policy=options.policy,
        profile=options.profile,
        costs={
            create_policy: simulate.model(0.0001),
            simulator_class: simulate.model(environment_seconds()),
            "Simulator.rollout": simulate.model(
                simulate.Samples(trained.policy.rollout_s), size_bytes=ROLLOUT_BYTES
            ),
            update_policy: simulate.model(update_seconds(cpus, plan), size_bytes=ROLLOUT_BYTES),
            train_policy: 0.0,
        },
        seed=options.seed,
    )
    return plan.timesteps / float(report.makespan_s)


def run(options: Options, progress: Progress) -> Result:
    """The experiment. The real run is always made, as the simulation's costs come from it."""
    plan = Plan(iterations=8, candidates=4, episodes=3) if options.quick else Plan()
    sizes = SIZES[:6] if options.quick else SIZES
    total = plan.iterations + (len(sizes) if options.simulated else 0)

    def on_reward(update: int, reward: float) -> None:
        progress(update, total, f"update {update} of {plan.iterations}: mean reward {reward:,.0f}")

    progress(0, total, f"starting {NODES} nodes")
    return study(plan, sizes if options.simulated else (), options, on_reward, progress)


def study(
    plan: Plan, sizes: tuple[int, ...], options: Options, on_reward: OnReward, progress: Progress
) -> Result:
    """Train for real, then simulate each of ``sizes``; ``progress`` counts on from the updates."""
    began = time.monotonic()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    trained = trio.run(train, plan, options.policy, on_reward)
    rewards = trained.policy.rewards
    points = [
        Point(series="reward", world="measured", x=update, y=reward) for update, reward in enumerate(rewards, start=1)
    ]
    total = plan.iterations + len(sizes)
    for done, cpus in enumerate(sizes, start=plan.iterations):
        progress(done, total, f"simulating {cpus} CPUs")
        points.append(point("scaling", "simulated", cpus, [simulate_training(cpus, trained, options)]))
    progress(total, total, "done")
    facts = machine_facts()
    rollouts = np.array(trained.policy.rollout_s)
    return Result(
        experiment="training",
        title="Policy training (the program of figure 3): Pendulum-v1, cross-entropy method",
        points=points,
        units={"x": "CPUs", "y": "timesteps/s"},
        parameters={
            "updates": plan.iterations, "simulators": plan.simulators, "candidates": plan.candidates,
            "episodes": plan.episodes, "policy": options.policy, "seed": plan.seed,
            "nodes": NODES, "CPUs per node": CPUS,
        },
        figures={
            "first reward": rewards[0], "last reward": rewards[-1], "training_s": trained.elapsed_s,
            "cluster start_s": trained.start_s, "timesteps": plan.timesteps,
            "timesteps/s": trained.timesteps_per_s, "rollouts": len(rollouts),
            "rollout mean_s": float(rollouts.mean()), "rollout p95_s": float(np.percentile(rollouts, 95)),
        },
        notes=[
            f"The real run's {NODES} nodes share this machine's {facts['cores']} cores.",
            "Simulated rollouts draw the processor time of those measured.",
            "Simulated clusters have one simulator for each CPU.",
            f"Simulated nodes have up to {CPUS_PER_NODE} CPUs each.",
        ],
        command=command_line(),
        machine=facts,
        started_at=started_at,
        took_s=time.monotonic() - began,
    )  # fmt: skip
