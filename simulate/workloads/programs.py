"""The ready-made programs. Each says in its parameters how large it is; the ``..._costs`` say what its tasks take."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trio_ray.runtime.api.actors import make_actor_class
from trio_ray.runtime.api.cluster import Cluster
from trio_ray.runtime.api.context import current
from trio_ray.runtime.api.remote import RemoteFunction, make_remote_function
from trio_ray.simulate.costs import Cost, lognormal, model


def _remote(function: Any) -> RemoteFunction:
    return make_remote_function(function, {})


@_remote
def empty() -> None:
    """Does nothing."""


@_remote
def step(value: int = 0) -> int:
    """One link of a chain."""
    return value + 1


@_remote
def leaf(index: int) -> int:
    """One of many."""
    return index


@_remote
def join(*values: int) -> int:
    """Takes what the others made."""
    return sum(values)


@_remote
def branch(depth: int, width: int) -> int:
    """Starts ``width`` branches and waits for them, or is a leaf."""
    if depth == 0:
        return 1
    session = current().session
    refs = [branch.remote(depth - 1, width) for _ in range(width)]
    session.link.wait(refs, len(refs), None, fetch=True)
    return sum(session.read_all(refs, return_exceptions=False))


@_remote
def make_block(index: int, reduces: int, block_bytes: int) -> Any:
    """What a map makes: a block for each reduce."""
    blocks = tuple(np.zeros(block_bytes, dtype=np.uint8) for _ in range(reduces))
    return blocks[0] if reduces == 1 else blocks


@_remote
def merge(*blocks: Any) -> int:
    """What a reduce makes of its blocks."""
    return sum(len(block) for block in blocks)


@_remote
def simulation(index: int) -> int:
    """A simulation; how long it takes is all that matters here."""
    return index


class Simulator:
    """A simulated environment that stays loaded between rollouts."""

    def rollout(self, policy: Any) -> Any:
        """Try a policy out."""
        return policy


simulator = make_actor_class(Simulator, {"num_cpus": 1})


@_remote
def update(policy: Any, *rollouts: Any) -> Any:
    """Improve the policy."""
    return policy


async def noop(cluster: Cluster, tasks: int = 10_000) -> None:
    """Empty tasks."""
    await cluster.gather([empty.remote() for _ in range(tasks)])


def noop_costs(tasks: int) -> Mapping[Any, Cost]:
    """Nothing but overhead."""
    return {empty: 0.0}


async def chain(cluster: Cluster, tasks: int = 1_000, seconds: float = 0.001) -> int:
    """Each task takes the result of the one before."""
    ref = step.remote()
    for _ in range(tasks - 1):
        ref = step.remote(ref)
    return int(await ref)


def chain_costs(tasks: int, seconds: float) -> Mapping[Any, Cost]:
    """``seconds`` each."""
    return {step: seconds}


async def fan_in(cluster: Cluster, tasks: int = 100, seconds: float = 0.01, rounds: int = 10) -> None:
    """``rounds`` times: ``tasks`` tasks, and one that takes all their results."""
    for _ in range(rounds):
        await join.remote(*[leaf.remote(index) for index in range(tasks)])


def fan_in_costs(tasks: int, seconds: float, rounds: int) -> Mapping[Any, Cost]:
    """``seconds`` for each of the many."""
    return {leaf: seconds, join: 0.0}


async def tree(cluster: Cluster, depth: int = 4, width: int = 5, seconds: float = 0.01) -> int:
    """Tasks that start tasks: ``width`` to the power of ``depth`` leaves."""
    return int(await branch.remote(depth, width))


def tree_costs(depth: int, width: int, seconds: float) -> Mapping[Any, Cost]:
    """``seconds`` each, besides waiting for its children."""
    return {branch: seconds}


async def map_reduce(
    cluster: Cluster, maps: int = 64, reduces: int = 16, block_bytes: int = 1_000_000, map_s: float = 0.5,
    reduce_s: float = 0.25,
) -> int:  # fmt: skip
    """``maps`` tasks make a block for each of ``reduces`` tasks, each of which takes one block of every map."""
    mapper = make_block.options(num_returns=reduces)
    made = [mapper.remote(index, reduces, block_bytes) for index in range(maps)]
    columns = [[row] if reduces == 1 else row for row in made]
    merged = [merge.remote(*[row[index] for row in columns]) for index in range(reduces)]
    return int(sum(await cluster.gather(merged)))


def map_reduce_costs(
    maps: int, reduces: int, block_bytes: int, map_s: float, reduce_s: float
) -> Mapping[Any, Cost]:  # fmt: skip
    """Blocks are not made, only counted at their size."""
    blocks: Any = b"" if reduces == 1 else tuple(b"" for _ in range(reduces))
    return {
        make_block: model(lognormal(map_s, 0.3), result=blocks, size_bytes=block_bytes),
        merge: model(lognormal(reduce_s, 0.3), result=block_bytes * maps),
    }


async def actors(cluster: Cluster, actors: int = 16, calls: int = 100, seconds: float = 0.005) -> None:
    """``calls`` calls to each of ``actors`` actors, all at once."""
    made = [simulator.remote() for _ in range(actors)]
    await cluster.gather([actor.rollout.remote(None) for _ in range(calls) for actor in made])


def actors_costs(actors: int, calls: int, seconds: float) -> Mapping[Any, Cost]:
    """``seconds`` a call."""
    return {simulator: model(0.0), "Simulator.rollout": model(seconds)}


async def simulations(cluster: Cluster, tasks: int = 1_000, seconds: float = 0.05, spread: float = 0.8) -> int:
    """Simulations whose lengths differ, each result handled as it comes."""
    done = 0
    refs = [simulation.remote(index) for index in range(tasks)]
    async for _ in cluster.as_completed(refs):
        done += 1
    return done


def simulations_costs(tasks: int, seconds: float, spread: float) -> Mapping[Any, Cost]:
    """Log-normal around ``seconds``."""
    return {simulation: lognormal(seconds, spread)}


async def training(
    cluster: Cluster, simulators: int = 16, iterations: int = 20, rollout_s: float = 0.2, spread: float = 0.3,
    update_s: float = 0.02, policy_bytes: int = 1_000_000, rollout_bytes: int = 200_000,
) -> None:  # fmt: skip
    """Each iteration: every simulator tries the policy, then the update takes all rollouts and makes the next."""
    made = [simulator.remote() for _ in range(simulators)]
    policy: Any = await cluster.put(None)
    for _ in range(iterations):
        policy = update.remote(policy, *[actor.rollout.remote(policy) for actor in made])
    await policy


def training_costs(
    simulators: int, iterations: int, rollout_s: float, spread: float, update_s: float, policy_bytes: int,
    rollout_bytes: int,
) -> Mapping[Any, Cost]:  # fmt: skip
    """Policies and rollouts are not made, only counted at their size."""
    return {
        simulator: model(0.0),
        "Simulator.rollout": model(lognormal(rollout_s, spread), size_bytes=rollout_bytes),
        update: model(update_s, size_bytes=policy_bytes),
    }
