"""Table 4 of the paper: simulation throughput on n CPUs, asynchronous tasks against bulk-synchronous rounds.

3n runs of Pendulum-v1 on n CPUs. Bulk-synchronous: three rounds of n runs with a barrier after each, as the paper's MPI
program does; asynchronous: all 3n at once, results gathered as they come. The figure is simulated timesteps per second.

Both are the same system here, so the difference is the barriers alone: a round is as long as its longest run. The
paper does not say how long its runs were. Elsewhere (section 5.3) its simulation tasks have 10 to 1,000 steps, which at
its 22,600 steps a second are 0.4 to 44 ms; a step takes a quarter of the time here, so a run has 40 to 4,000 steps,
evenly drawn, and lasts as long.
"""

import time
from datetime import UTC, datetime
from random import Random
from typing import Any

import numpy as np
import trio

import trio_ray
from trio_ray.experiments.paper import published
from trio_ray.experiments.pendulum import environment, episode
from trio_ray.experiments.registry import Options, Progress
from trio_ray.experiments.results import Point, Result, command_line, machine_facts, point

ASYNCHRONOUS = "asynchronous tasks"
ROUNDS = "bulk-synchronous rounds"
RUNS_PER_CPU = 3
SHORTEST, LONGEST = 40, 4_000
"""Steps of a run."""
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""CPUs."""
CPUS_PER_NODE = 64
"""Of the simulated nodes; the paper's (m4.16xlarge) have as many."""
WEIGHTS = (-5.0, -6.0, -1.0, -3.0, -4.0, -1.0, 2.0, 1.0)
"""Of the policy that is run; any does, a step costs the same whatever the torque."""


@trio_ray.remote
def simulate_pendulum(seed: int) -> tuple[int, float]:
    """One run: how many steps it had, and how many seconds of processor time they took."""
    steps = Random(seed).randint(SHORTEST, LONGEST)
    pendulum = environment()
    began = time.thread_time()
    episode(pendulum, WEIGHTS, seed, steps)
    return steps, time.thread_time() - began


async def asynchronous(cluster: trio_ray.Cluster, cpus: int, first_seed: int) -> list[tuple[int, float]]:
    """All runs at once."""
    refs = [cluster.submit(simulate_pendulum, first_seed + i) for i in range(RUNS_PER_CPU * cpus)]
    return list(await cluster.gather(refs))


async def in_rounds(cluster: trio_ray.Cluster, cpus: int, first_seed: int) -> list[tuple[int, float]]:
    """One run for each CPU, a barrier, and again."""
    runs: list[tuple[int, float]] = []
    for start in range(0, RUNS_PER_CPU * cpus, cpus):
        refs = [cluster.submit(simulate_pendulum, first_seed + start + i) for i in range(cpus)]
        runs += await cluster.gather(refs)
    return runs


async def compare(
    cluster: trio_ray.Cluster, cpus: int, repeats: int, seed: int
) -> dict[str, list[tuple[float, list[tuple[int, float]]]]]:
    """Both ways by turns, ``repeats`` times: for each its seconds and its runs. The same in both worlds."""
    await asynchronous(cluster, cpus, seed)  # starts every worker and loads its environment
    found: dict[str, list[tuple[float, list[tuple[int, float]]]]] = {ASYNCHRONOUS: [], ROUNDS: []}
    for repeat in range(repeats):
        first_seed = seed + 10_000 * (repeat + 1)
        for series, program in ((ASYNCHRONOUS, asynchronous), (ROUNDS, in_rounds)):
            began = cluster.now()
            runs = await program(cluster, cpus, first_seed)
            found[series].append((cluster.now() - began, runs))
    return found


async def measure(cpus: int, repeats: int, options: Options) -> Any:
    """``compare`` on a real one-node cluster."""
    async with trio_ray.open_cluster(num_cpus=cpus, policy=options.policy) as cluster:
        return await compare(cluster, cpus, repeats, options.seed)


def run(options: Options, progress: Progress) -> Result:
    """The experiment. One CPU is always measured, as the simulation draws the runs' times from it."""
    began = time.monotonic()
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    facts = machine_facts()
    fitting = [1] if not options.real else [size for size in SIZES if size <= int(facts["cores"])]
    sizes = (SIZES[:5] if options.quick else SIZES) if options.simulated else ()
    real_repeats, simulated_repeats = (5, 2) if options.quick else (30, 10)
    total = len(fitting) + len(sizes)
    points: list[Point] = published("table4")
    runs: list[tuple[int, float]] = []

    for done, cpus in enumerate(fitting):
        progress(done, total, f"measuring on {cpus} CPU{'s' * (cpus > 1)} of this machine")
        found = trio.run(measure, cpus, real_repeats, options)
        for series, rounds in found.items():
            if options.real:
                rates = [sum(steps for steps, _ in part) / took for took, part in rounds]
                points.append(point(series, "measured", cpus, rates))
        if cpus == 1:
            runs = [run for rounds in found.values() for _, part in rounds for run in part]

    seconds = np.array([took for _, took in runs])
    mean_steps = float(np.mean([steps for steps, _ in runs]))
    for done, cpus in enumerate(sizes, start=len(fitting)):
        progress(done, total, f"simulating {cpus} CPUs")
        repeats = max(simulated_repeats, 30 * simulated_repeats // cpus)  # few runs differ more
        for series, rates in simulated(cpus, repeats, seconds, mean_steps, options).items():
            points.append(point(series, "simulated", cpus, rates))

    progress(total, total, "done")
    return Result(
        experiment="table4",
        title="Simulation throughput (table 4): Pendulum-v1, 3n runs on n CPUs",
        points=points,
        units={"x": "CPUs", "y": "timesteps/s"},
        parameters={
            "steps of a run": f"{SHORTEST} to {LONGEST}, evenly drawn",
            "runs per CPU": RUNS_PER_CPU,
            "policy": options.policy,
            "seed": options.seed,
            "repeats": {"measured": real_repeats, "simulated": f"{simulated_repeats}, more on few CPUs"},
        },
        figures={
            "seconds per timestep, one CPU": float(seconds.sum() / (mean_steps * len(runs))),
            "seconds of a run": {
                "runs": len(runs), "mean": float(seconds.mean()), "p50": float(np.median(seconds)),
                "p95": float(np.percentile(seconds, 95)), "max": float(seconds.max()),
            },
        },
        notes=[
            "The paper's MPI program is replaced by rounds of the same tasks: what differs is the barriers alone.",
            "The paper does not state how long a run is; a run's length decides how much barriers cost.",
            "Simulated runs draw their seconds from the processor time of those measured on one CPU.",
            f"Simulated nodes have up to {CPUS_PER_NODE} CPUs each.",
        ],
        command=command_line(),
        machine=facts,
        started_at=started_at,
        took_s=time.monotonic() - began,
    )  # fmt: skip


def simulated(
    cpus: int, repeats: int, seconds: np.ndarray, mean_steps: float, options: Options
) -> dict[str, list[float]]:
    """Timesteps per second of both ways on a simulated cluster, by series.

    A run's time is drawn from ``seconds``, whatever its steps; so the steps of all runs together are counted by their
    mean.
    """
    from trio_ray import simulate

    async def main(cluster: trio_ray.Cluster) -> Any:
        return await compare(cluster, cpus, repeats, options.seed)

    report = simulate.run(
        main,
        nodes=max(1, cpus // CPUS_PER_NODE),
        cpus=min(cpus, CPUS_PER_NODE),
        policy=options.policy,
        profile=options.profile,
        costs={simulate_pendulum: simulate.model(simulate.Samples(seconds.tolist()), result=(0, 0.0))},
        seed=options.seed,
    )
    steps = RUNS_PER_CPU * cpus * mean_steps
    return {series: [steps / took for took, _ in rounds] for series, rounds in report.result.items()}
