"""Figure 8b of the paper: how many empty tasks a second run, as nodes are added.

One actor on each node submits empty tasks to its own node's scheduler (nested remote functions, "critical for
scalability" in section 3.1); the driver waits for all of them. The number of tasks for each node stays the same, so the
ideal is a straight line.

Measured points put all nodes on this one machine, so they share its cores; simulated points give each node a machine
of its own, whose costs are the profile's.
"""

import time
from datetime import UTC, datetime

import trio

import trio_ray
from trio_ray.experiments.paper import published
from trio_ray.experiments.registry import Options, Progress
from trio_ray.experiments.results import Point, Result, command_line, machine_facts, point

SERIES = "empty tasks"
MEASURED = (1, 2, 3)
SIMULATED = (1, 2, 3, 10, 20, 30, 40, 50, 60, 100)
"""Nodes; from ten on the paper's sizes."""
BATCH = 250
"""Two of these are a few milliseconds of work: enough that no worker idles, and a queue short enough for the bottom-up
policy to keep every task at the node where it was born."""
NODES_PER_SHARD = 10
"""Control-store shards grow with the simulated cluster; the paper does not say how many it had."""
SEAT = "submitter"
"""A custom resource of which every node has one, so that each gets one submitter."""


@trio_ray.remote
def empty() -> None:
    """Does nothing."""


class Submitter:
    """Submits empty tasks on its node."""

    async def submit(self, count: int) -> int:
        """Submit ``count`` empty tasks here and wait for them; two batches are under way at a time."""
        ahead: list[trio_ray.ObjectRef] = []
        for start in range(0, count, BATCH):
            batch = [empty.remote() for _ in range(min(BATCH, count - start))]
            for ref in ahead:
                await ref
            ahead = batch
        for ref in ahead:
            await ref
        return count


submitter_class = trio_ray.remote(num_cpus=0, resources={SEAT: 1})(Submitter)


async def empty_tasks(cluster: trio_ray.Cluster, nodes: int, count: int, repeats: int) -> list[float]:
    """Tasks per second of the whole cluster, ``repeats`` times after a warm-up. The same in both worlds."""
    submitters = [submitter_class.remote() for _ in range(nodes)]
    await cluster.gather([submitter.submit.remote(2 * BATCH) for submitter in submitters])
    rates = []
    for _ in range(repeats):
        began = cluster.now()
        done = await cluster.gather([submitter.submit.remote(count) for submitter in submitters])
        rates.append(sum(done) / (cluster.now() - began))
    return rates


async def measure(nodes: int, count: int, repeats: int, options: Options) -> list[float]:
    """``empty_tasks`` on real nodes of this machine."""
    async with trio_ray.open_cluster(nodes=nodes, num_cpus=1, resources={SEAT: 1}, policy=options.policy) as cluster:
        return await empty_tasks(cluster, nodes, count, repeats)


def simulated(nodes: int, cpus: int, count: int, repeats: int, options: Options) -> list[float]:
    """``empty_tasks`` on a simulated cluster."""
    from trio_ray import simulate

    async def main(cluster: trio_ray.Cluster) -> list[float]:
        return await empty_tasks(cluster, nodes, count, repeats)

    report = simulate.run(
        main,
        nodes=nodes,
        cpus=cpus,
        resources={SEAT: 1},
        shards=max(1, nodes // NODES_PER_SHARD),
        spread_shards=True,
        policy=options.policy,
        profile=options.profile,
        costs={empty: 0.0},
        seed=options.seed,
    )
    rates: list[float] = report.result
    return rates


def run(options: Options, progress: Progress) -> Result:
    """The experiment."""
    began = time.monotonic()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    real = MEASURED if options.real else ()
    modelled = (SIMULATED[:5] if options.quick else SIMULATED) if options.simulated else ()
    real_count, modelled_count = (2_000, 500) if options.quick else (20_000, 2_000)
    total = len(real) + len(modelled)
    points: list[Point] = published("fig8b", scale=1e6)
    for done, nodes in enumerate(real):
        progress(done, total, f"measuring {nodes} node{'s' * (nodes > 1)} on this machine")
        rates = trio.run(measure, nodes, real_count, 3 if options.quick else 5, options)
        points.append(point(SERIES, "measured", nodes, rates))
    for done, nodes in enumerate(modelled, start=len(real)):
        progress(done, total, f"simulating {nodes} nodes")
        points.append(point(SERIES, "simulated", nodes, simulated(nodes, 1, modelled_count, 1, options)))
    progress(total, total, "done")
    facts = machine_facts()
    return Result(
        experiment="fig8b",
        title="Empty tasks per second as nodes are added (figure 8b)",
        points=points,
        units={"x": "nodes", "y": "tasks/s"},
        parameters={
            "tasks per node": {"measured": real_count, "simulated": modelled_count},
            "policy": options.policy,
            "seed": options.seed,
        },
        notes=[
            f"Measured nodes share this machine's {facts['cores']} cores; simulated nodes have a machine each.",
            "Each node has one worker and one submitter; the paper states neither.",
            f"Simulated clusters have one control-store shard for {NODES_PER_SHARD} nodes.",
        ],
        command=command_line(),
        machine=facts,
        started_at=started_at,
        took_s=time.monotonic() - began,
    )
