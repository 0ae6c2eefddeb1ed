"""The experiments' programs, small: the same coroutine in both worlds."""

from random import Random

import numpy as np
import pytest
import trio

import trio_ray
from trio_ray import simulate
from trio_ray.experiments import fig8b, pendulum, table4, training
from trio_ray.experiments.training_scaling import train, update_seconds

pytest.importorskip("gymnasium")

TINY = training.Plan(iterations=3, simulators=2, candidates=4, episodes=1)


def test_training_is_the_same_in_both_worlds() -> None:
    told: list[tuple[int, float]] = []
    trained = trio.run(train, TINY, "bottom-up", lambda update, reward: told.append((update, reward)))
    assert [update for update, _ in told] == [1, 2, 3]
    assert trained.policy.rewards == tuple(reward for _, reward in told)
    assert len(trained.policy.rollout_s) == 6

    async def program(cluster: trio_ray.Cluster) -> training.Policy:
        return await training.main(cluster, TINY)

    report = simulate.run(program, nodes=3, cpus=4, costs={"Simulator.rollout": 0.05})
    assert report.result.rewards == trained.policy.rewards  # functions ran for real, on modelled time
    assert np.array_equal(report.result.mean, trained.policy.mean)
    assert 0.15 < report.makespan_s < 0.3


def test_rollouts_on_other_nodes_begin_when_the_policy_is_there() -> None:
    plan = training.Plan(iterations=10, simulators=4, candidates=2, episodes=1)
    costs = {
        training.simulator_class: simulate.model(0.0),
        "Simulator.rollout": simulate.model(0.05, size_bytes=4000),
        training.create_policy: simulate.model(0.0),
        training.update_policy: simulate.model(0.0),
    }

    async def program(cluster: trio_ray.Cluster) -> training.Policy:
        return await training.main(cluster, plan)

    report = simulate.run(program, nodes=2, cpus=2, costs=costs)
    assert len(report.tasks_by_node) == 2
    assert report.makespan_s < 10 * 0.06  # a policy that waits for the next write-behind takes 0.1 s longer


def test_the_update_moves_towards_the_best() -> None:
    policy = training.Policy(mean=np.zeros(8), spread=np.ones(8))
    rng = np.random.default_rng(0)
    for _ in range(12):
        candidates = policy.mean + policy.spread * rng.standard_normal((60, 8))
        rewards = -np.abs(candidates - 1.0).sum(axis=1)
        rollout = training.Rollout(candidates, rewards, 0.0)
        policy = training.next_policy(policy, training.Plan(iterations=12), rollout)
    assert policy.rewards[-1] > policy.rewards[0] / 3
    assert update_seconds(2, TINY) > 0.0


def test_an_episode_depends_on_its_seed_only() -> None:
    environment = pendulum.make_environment()
    first = pendulum.episode(environment, table4.WEIGHTS, seed=3, steps=50)
    assert first == pendulum.episode(environment, table4.WEIGHTS, seed=3, steps=50)
    assert first != pendulum.episode(environment, table4.WEIGHTS, seed=4, steps=50)


def test_barriers_cost_what_they_must() -> None:
    rng = Random(0)
    seconds = [rng.uniform(0.01, 1.0) for _ in range(500)]

    async def program(cluster: trio_ray.Cluster) -> object:
        return await table4.compare(cluster, cpus=16, repeats=3, seed=0)

    costs = {table4.simulate_pendulum: simulate.model(simulate.Samples(seconds), result=(0, 0.0))}
    found = simulate.run(program, nodes=1, cpus=16, costs=costs).result
    for (fast, _), (slow, _) in zip(found[table4.ASYNCHRONOUS], found[table4.ROUNDS], strict=True):
        assert fast < slow


def test_empty_tasks_stay_on_their_nodes_and_scale() -> None:
    async def program(cluster: trio_ray.Cluster) -> list[float]:
        return await fig8b.empty_tasks(cluster, nodes, 1000, 1)

    rates = []
    for nodes in (1, 4):
        report = simulate.run(program, nodes=nodes, cpus=1, resources={fig8b.SEAT: 1}, costs={fig8b.empty: 0.0})
        rates += report.result
    assert rates[1] > 3 * rates[0]
