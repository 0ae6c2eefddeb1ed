"""The micro-benchmarks of ``ray microbenchmark``, and more, for any system that speaks Ray's API.

One process measures one system: ``python suite.py SYSTEM [NAME ...]`` prints a JSON line per benchmark. The file
imports nothing but the standard library and the system under test, so that it runs in an environment where only Ray
is installed; ``compare`` starts it once per system and repeat, alternating.

A benchmark is a function that sets something up and yields ``(work, amount)``: a callable, and how much of its unit
one call does. What is timed is calls of ``work``, after a warm-up, for about ``seconds`` and at least once.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Work = tuple[Callable[[], object], float]


@dataclass
class Benchmark:
    """A named measurement; ``higher`` tells whether more is better."""

    name: str
    unit: str
    run: Callable[[Any], Iterator[Work]]
    higher: bool = True
    once: bool = False
    """Measured by a single call: it is long, or cannot be repeated."""
    own_cluster: bool = False
    """It starts and stops what it needs; nothing runs when it is called."""
    systems: tuple[str, ...] = ("trio_ray", "ray")


BENCHMARKS: dict[str, Benchmark] = {}


def benchmark(name: str, unit: str, **options: Any) -> Callable[[Callable[[Any], Iterator[Work]]], None]:
    """Register a benchmark."""

    def register(run: Callable[[Any], Iterator[Work]]) -> None:
        BENCHMARKS[name] = Benchmark(name, unit, run, **options)

    return register


class Remote:
    """The remote functions and classes that the benchmarks share, made for one system."""

    def __init__(self, ray: Any) -> None:
        self.ray = ray

        def small_value() -> bytes:
            return b"ok"

        def put_small(count: int) -> None:
            for _ in range(count):
                ray.put(0)

        def ten_thousand_refs() -> list[Any]:
            return [ray.put(1) for _ in range(10_000)]

        class Actor:
            def small_value(self) -> bytes:
                return b"ok"

            def small_value_arg(self, _x: object) -> bytes:
                return b"ok"

            def small_value_batch(self, count: int) -> None:
                ray.get([submitted.remote() for _ in range(count)])

        class AsyncActor:
            async def small_value(self) -> bytes:
                return b"ok"

            async def small_value_with_arg(self, _x: object) -> bytes:
                return b"ok"

        class Client:
            def __init__(self, servers: list[Any]) -> None:
                self.servers = servers

            def small_value_batch(self, count: int) -> None:
                ray.get([server.small_value.remote() for server in self.servers for _ in range(count)])

            def small_value_batch_arg(self, count: int) -> None:
                x = ray.put(0)
                ray.get([server.small_value_arg.remote(x) for server in self.servers for _ in range(count)])

        self.small_value = submitted = ray.remote(small_value)
        self.put_small: Any = ray.remote(put_small)
        self.ten_thousand_refs: Any = ray.remote(ten_thousand_refs)
        free = ray.remote(num_cpus=0)
        self.Actor: Any = free(Actor)
        self.AsyncActor: Any = free(AsyncActor)
        self.Client: Any = free(Client)


# -- objects -----------------------------------------------------------------------------------------------------


@benchmark("single client get calls", "gets/s")
def _get(r: Remote) -> Iterator[Work]:
    ref = r.ray.put(0)

    def work() -> None:
        for _ in range(100):
            r.ray.get(ref)

    yield work, 100


@benchmark("single client put calls", "puts/s")
def _put(r: Remote) -> Iterator[Work]:
    def work() -> None:
        for _ in range(100):
            r.ray.put(0)

    yield work, 100


@benchmark("multi client put calls", "puts/s")
def _multi_put(r: Remote) -> Iterator[Work]:
    yield lambda: r.ray.get([r.put_small.remote(100) for _ in range(10)]), 1000


@benchmark("single client put gigabytes", "GB/s")
def _put_gigabytes(r: Remote) -> Iterator[Work]:
    import numpy as np

    array = np.ones(100 * 1024 * 1024, dtype=np.int64)
    yield lambda: r.ray.put(array), array.nbytes / 1e9


@benchmark("copy gigabytes (plain numpy, no system)", "GB/s", own_cluster=True, systems=("trio_ray",))
def _copy_gigabytes(r: Remote) -> Iterator[Work]:
    import numpy as np

    array = np.ones(100 * 1024 * 1024, dtype=np.int64)
    target = np.ones_like(array)
    yield lambda: np.copyto(target, array), array.nbytes / 1e9


@benchmark("single client get object containing 10k refs", "gets/s")
def _get_refs(r: Remote) -> Iterator[Work]:
    ref = r.ten_thousand_refs.remote()
    r.ray.get(ref)
    yield lambda: r.ray.get(ref), 1


@benchmark("single client wait 1k refs", "rounds/s")
def _wait(r: Remote) -> Iterator[Work]:
    def work() -> None:
        pending = [r.small_value.remote() for _ in range(1000)]
        for _ in range(1000):
            _, pending = r.ray.wait(pending)

    yield work, 1


# -- tasks -------------------------------------------------------------------------------------------------------


@benchmark("single client tasks and get batch", "batches/s", systems=("trio_ray", "ray", "processpool", "dask"))
def _tasks_and_get(r: Remote) -> Iterator[Work]:
    yield lambda: r.ray.get([r.small_value.remote() for _ in range(1000)]), 1


@benchmark("single client tasks sync", "tasks/s", systems=("trio_ray", "ray", "processpool", "dask"))
def _tasks_sync(r: Remote) -> Iterator[Work]:
    def work() -> None:
        for _ in range(10):
            r.ray.get(r.small_value.remote())

    yield work, 10


@benchmark("single client tasks async", "tasks/s", systems=("trio_ray", "ray", "processpool", "dask"))
def _tasks_async(r: Remote) -> Iterator[Work]:
    yield lambda: r.ray.get([r.small_value.remote() for _ in range(1000)]), 1000


@benchmark("multi client tasks async", "tasks/s")
def _multi_tasks(r: Remote) -> Iterator[Work]:
    actors = [r.Actor.remote() for _ in range(4)]
    yield lambda: r.ray.get([actor.small_value_batch.remote(2500) for actor in actors]), 10_000


@benchmark("ten thousand queued tasks", "tasks/s")
def _ten_thousand(r: Remote) -> Iterator[Work]:
    yield lambda: r.ray.get([r.small_value.remote() for _ in range(10_000)]), 10_000


@benchmark("a million queued tasks", "tasks/s", once=True, systems=("trio_ray",))  # Ray would take ten minutes
def _million(r: Remote) -> Iterator[Work]:
    yield lambda: r.ray.get([r.small_value.remote() for _ in range(1_000_000)]), 1_000_000


# -- actors ------------------------------------------------------------------------------------------------------


@benchmark("1:1 actor calls sync", "calls/s")
def _actor_sync(r: Remote) -> Iterator[Work]:
    actor = r.Actor.remote()

    def work() -> None:
        for _ in range(10):
            r.ray.get(actor.small_value.remote())

    yield work, 10


@benchmark("1:1 actor calls async", "calls/s")
def _actor_async(r: Remote) -> Iterator[Work]:
    actor = r.Actor.remote()
    yield lambda: r.ray.get([actor.small_value.remote() for _ in range(1000)]), 1000


@benchmark("1:1 actor calls concurrent", "calls/s")
def _actor_concurrent(r: Remote) -> Iterator[Work]:
    actor = r.Actor.options(max_concurrency=16).remote()
    yield lambda: r.ray.get([actor.small_value.remote() for _ in range(1000)]), 1000


@benchmark("1:n actor calls async", "calls/s")
def _actor_one_to_n(r: Remote) -> Iterator[Work]:
    servers = [r.Actor.remote() for _ in range(4)]
    client = r.Client.remote(servers)
    yield lambda: r.ray.get(client.small_value_batch.remote(1250)), 5000


@benchmark("n:n actor calls async", "calls/s")
def _actor_n_to_n(r: Remote) -> Iterator[Work]:
    servers = [r.Actor.remote() for _ in range(2)]
    clients = [r.Client.remote([server]) for server in servers]
    yield lambda: r.ray.get([client.small_value_batch.remote(2500) for client in clients]), 5000


@benchmark("n:n actor calls with arg async", "calls/s")
def _actor_n_to_n_arg(r: Remote) -> Iterator[Work]:
    servers = [r.Actor.remote() for _ in range(2)]
    clients = [r.Client.remote([server]) for server in servers]
    yield lambda: r.ray.get([client.small_value_batch_arg.remote(500) for client in clients]), 1000


@benchmark("1:1 async-actor calls sync", "calls/s")
def _async_actor_sync(r: Remote) -> Iterator[Work]:
    actor = r.AsyncActor.remote()

    def work() -> None:
        for _ in range(10):
            r.ray.get(actor.small_value.remote())

    yield work, 10


@benchmark("1:1 async-actor calls async", "calls/s")
def _async_actor_async(r: Remote) -> Iterator[Work]:
    actor = r.AsyncActor.remote()
    yield lambda: r.ray.get([actor.small_value.remote() for _ in range(1000)]), 1000


@benchmark("1:1 async-actor calls with args async", "calls/s")
def _async_actor_args(r: Remote) -> Iterator[Work]:
    actor = r.AsyncActor.remote()
    yield lambda: r.ray.get([actor.small_value_with_arg.remote(i) for i in range(1000)]), 1000


@benchmark("actor creation", "actors/s")
def _actor_creation(r: Remote) -> Iterator[Work]:
    def work() -> None:
        actors = [r.Actor.remote() for _ in range(4)]
        r.ray.get([actor.small_value.remote() for actor in actors])

    yield work, 4


# -- the cluster's own cost --------------------------------------------------------------------------------------

START_UP = """
import json, time
begin = time.perf_counter()
import {module} as ray
imported = time.perf_counter()
ray.init(num_cpus=2{options})
started = time.perf_counter()
@ray.remote
def first(): return 1
ray.get(first.remote())
ran = time.perf_counter()
ray.shutdown()
ended = time.perf_counter()
print("FIGURES", json.dumps([imported - begin, started - imported, ran - started, ended - ran]))
"""


def _start_up_times(module: str) -> list[float]:
    """Seconds for import, init, first task and shutdown, in a fresh interpreter."""
    import subprocess

    options = ", include_dashboard=False, log_to_driver=False" if module == "ray" else ""
    program = START_UP.format(module=module, options=options)
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    line = next(line for line in out.splitlines() if line.startswith("FIGURES"))
    return list(map(float, json.loads(line.removeprefix("FIGURES"))))


@benchmark("import + init + first task", "s", higher=False, own_cluster=True)
def _start_up(r: Remote) -> Iterator[Work]:
    yield lambda: sum(_start_up_times(r.ray.__name__)[:3]), -1


@benchmark("shutdown", "s", higher=False, own_cluster=True)
def _shutdown(r: Remote) -> Iterator[Work]:
    yield lambda: _start_up_times(r.ray.__name__)[3], -1


def descendants(pid: int) -> list[int]:
    """All processes below ``pid``; detached node processes count where they name it in their environment."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found


def pss_mb(pids: list[int]) -> float:
    """Proportional set size of processes, in MB: shared pages are counted once, divided among who maps them."""
    total = 0
    for pid in pids:
        try:
            for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1])
        except OSError:
            continue
    return total / 1024


@benchmark("idle memory (PSS of all but the driver)", "MB", higher=False)
def _idle_memory(r: Remote) -> Iterator[Work]:
    r.ray.get([r.small_value.remote() for _ in range(10)])
    time.sleep(2.0)  # let what starts late start, and what was only for the start end
    yield lambda: pss_mb(descendants(os.getpid())[1:]), -1


@benchmark("idle processor use", "ms of CPU per s", higher=False, once=True)
def _idle_cpu(r: Remote) -> Iterator[Work]:
    r.ray.get([r.small_value.remote() for _ in range(10)])
    time.sleep(2.0)
    ticks = os.sysconf("SC_CLK_TCK")

    def used() -> float:
        total = 0
        for pid in descendants(os.getpid())[1:]:
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                total += int(fields[11]) + int(fields[12])
            except OSError:
                continue
        return total / ticks

    def work() -> float:
        before = used()
        time.sleep(3.0)
        return (used() - before) / 3.0 * 1000

    yield work, -1


# -- running -----------------------------------------------------------------------------------------------------


class ProcessPool:
    """``concurrent.futures.ProcessPoolExecutor`` behind the few calls that its benchmarks use."""

    def __init__(self) -> None:
        self.pool: Any = None

    def init(self, num_cpus: int, **_: object) -> None:
        from concurrent.futures import ProcessPoolExecutor

        self.pool = ProcessPoolExecutor(num_cpus)

    def shutdown(self) -> None:
        self.pool.shutdown()

    def remote(self, function: Any = None, **_: object) -> Any:
        if function is None:
            return lambda function: function
        return Submitter(self)

    def get(self, futures: Any) -> Any:
        return [future.result() for future in futures] if isinstance(futures, list) else futures.result()


class Dask(ProcessPool):
    """``dask.distributed`` behind the same calls."""

    def init(self, num_cpus: int, **_: object) -> None:
        from distributed import Client  # type: ignore[import-not-found,unused-ignore]

        self.pool = Client(n_workers=num_cpus, threads_per_worker=1, dashboard_address=None)

    def shutdown(self) -> None:
        self.pool.close()

    def get(self, futures: Any) -> Any:
        return self.pool.gather(futures)


class Submitter:
    """Has ``remote`` as a remote function does."""

    def __init__(self, system: ProcessPool) -> None:
        self.system = system

    def remote(self) -> Any:
        if isinstance(self.system, Dask):
            return self.system.pool.submit(value, pure=False)
        return self.system.pool.submit(value)


def value() -> bytes:
    """What the pool's tasks do."""
    return b"ok"


def system_module(system: str) -> Any:
    """The module (or a stand-in with its functions) of a system."""
    if system == "processpool":
        return ProcessPool()
    if system == "dask":
        return Dask()
    return importlib.import_module(system)


def measure(found: Benchmark, ray: Any, seconds: float, warm_up: float) -> float:
    """One figure, in the benchmark's unit."""
    for work, amount in found.run(Remote(ray)):
        if amount < 0:  # the call itself answers with the figure
            return float(work())  # type: ignore[arg-type]
        if not found.once:
            end = time.perf_counter() + warm_up
            while True:
                work()
                if time.perf_counter() >= end:
                    break
        calls = 0
        begin = now = time.perf_counter()
        while not calls or (now < begin + seconds and not found.once):
            work()
            calls += 1
            now = time.perf_counter()
        return calls * amount / (now - begin)
    raise AssertionError(f"the benchmark {found.name!r} yielded nothing")


def main() -> None:
    """Run benchmarks of one system, a JSON line each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("system")
    parser.add_argument("names", nargs="*")
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--warm-up", type=float, default=0.5)
    options = parser.parse_args()
    ray = system_module(options.system)
    if options.system == "trio_ray":
        from trio_ray.experiments.bench.own import register

        register(benchmark)
    for name in options.names or list(BENCHMARKS):
        found = BENCHMARKS[name]
        if options.system not in found.systems:
            continue
        figure: float | None = None
        error = ""
        try:
            if not found.own_cluster:
                quiet = {"include_dashboard": False, "log_to_driver": False} if options.system == "ray" else {}
                ray.init(num_cpus=2, **quiet)
            try:
                figure = measure(found, ray, options.seconds, options.warm_up)
            finally:
                if not found.own_cluster:
                    ray.shutdown()
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
        line = {"name": name, "system": options.system, "figure": figure, "error": error}
        print("FIGURE", json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
