"""One seed, one history: on every run, under every hash seed; another seed, another history."""

import os
import subprocess
import sys

import pytest

from trio_ray import simulate
from trio_ray.runtime.api.cluster import Cluster

PROGRAM = """
import sys
import numpy as np
import trio
from trio_ray import simulate
from trio_ray.runtime.api import context
from trio_ray.runtime.api.remote import make_remote_function
from trio_ray.runtime.api.actors import make_actor_class

names = {"alpha", "beta", "gamma", "delta"}

def work(x, chosen=frozenset(names)):
    return len(chosen) + x

def big(n):
    return np.arange(n)

def reduce(*arrays):
    return float(sum(a.sum() for a in arrays))

def nested(n):
    session = context.current().session
    refs = [remote_work.remote(i) for i in range(n)]
    session.link.wait(refs, len(refs), None, fetch=True)
    return sum(session.read_all(refs, return_exceptions=False))

async def patient(seconds):
    await trio.sleep(seconds)
    return {word: len(word) for word in names}

def fail():
    raise RuntimeError(str(names))

class Keeper:
    def __init__(self):
        self.kept = set()
    def keep(self, word):
        self.kept.add(word)
        return len(self.kept)

remote_work = make_remote_function(work, {})

async def main(cluster):
    refs = [cluster.submit(work, i) for i in range(60)]
    arrays = [cluster.submit(big, 30_000) for _ in range(6)]
    keeper = cluster.actor(make_actor_class(Keeper, {}))
    kept = [cluster.submit(keeper.keep, word) for word in sorted(names)]
    total = cluster.submit(reduce, *arrays)
    async with trio.open_nursery() as nursery:
        async def each(i):
            await trio.sleep(0.001 * (i % 3))
            await cluster.submit(nested, i)
        for i in range(8):
            nursery.start_soon(each, i)
    try:
        async with cluster.open_nursery() as nursery:
            nursery.start_soon(patient, 5.0)
            nursery.start_soon(fail)
    except BaseExceptionGroup:
        pass
    with trio.move_on_after(0.5):
        await cluster.submit(patient, 9.0)
    return await cluster.gather([*refs, total, *kept])

report = simulate.run(main, nodes=4, cpus=2, seed=int(sys.argv[1]), policy=sys.argv[2], shards=3, spread_shards=True,
                      costs={work: simulate.lognormal(0.01, 1.0), big: simulate.uniform(0.01, 0.02)})
print(report.event_log_hash, report.makespan_s, report.messages)
"""


def history(seed: int, hash_seed: int, policy: str = "bottom-up") -> str:
    environment = {**os.environ, "PYTHONHASHSEED": str(hash_seed)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(seed), policy], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("policy", ["bottom-up", "random"])
def test_one_seed_gives_one_history_under_every_hash_seed(policy: str) -> None:
    first = history(1, 0, policy)
    assert first == history(1, 1, policy) == history(1, 2, policy)


def test_another_seed_gives_another_history() -> None:
    hashes = {history(seed, 0).split()[0] for seed in (1, 2, 3)}
    assert len(hashes) == 3


def test_runs_in_one_process_do_not_touch_each_other() -> None:
    async def main(cluster: Cluster) -> list[int]:
        return await cluster.gather([cluster.submit(divmod, i, 7) for i in range(50)])

    def run(nodes: int) -> str:
        report = simulate.run(main, nodes=nodes, cpus=2, seed=5, costs={"divmod": simulate.exponential(0.01)})
        return report.event_log_hash

    first = run(3)
    assert run(2) != first
    assert run(3) == first
