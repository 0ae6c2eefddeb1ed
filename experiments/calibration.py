"""What this machine's processes, sockets and memory add to the machines' own cost: the profile for simulations.

``calibrate`` starts a real cluster, runs empty tasks one at a time and in bulk, and reads from the kernel how much CPU
the driver, the node and the worker each spent on them. What remains of a task's round trip is the time it takes to
wake the next process. ``trio_ray.simulate.calibrate`` has timed the machines themselves; their part is taken off the
node's.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import trio_ray
from trio_ray.simulate.calibrate import measure_machines, spread_of
from trio_ray.simulate.profile import ClientCost, LinkCost, Profile, WorkerCost

ROUNDS = 7
QUARTILE = 25
"""Of the rounds: what else the machine does only ever adds."""
BULK = 5_000
SINGLE = 400
ACTORS = 8
ARRAY_BYTES = 64 << 20
MACHINES_PART = 0.5
"""Of the progress that is told."""


@trio_ray.remote
def empty() -> None:
    """An empty task."""


@trio_ray.remote
def process_id() -> int:
    """Of the worker that runs it."""
    return os.getpid()


class Reader:
    """An actor that keeps its node's only ``there``, so that two of them are on two nodes."""

    def read(self, array: np.ndarray[Any, Any]) -> int:
        """Bring an array to this node."""
        return int(array.nbytes)


reader = trio_ray.remote(num_cpus=0, resources={"there": 1})(Reader)


def calibrate(progress: Callable[[float], None] = lambda part: None) -> Profile:
    """This machine's profile. Takes half a minute; a machine that does nothing else gives the truest figures.

    ``progress`` is told the part that is done. Raises RuntimeError when this process is part of a cluster already.
    """
    profile = measure_machines(lambda part: progress(MACHINES_PART * part))
    rounds: list[dict[str, float]] = []
    with trio_ray.init(num_cpus=1):
        template, node = node_processes()
        _bulk(BULK)  # what is measured later runs warm
        for number in range(ROUNDS):
            rounds.append(_round(profile, template, node))
            progress(MACHINES_PART + (0.9 - MACHINES_PART) * (number + 1) / ROUNDS)
    middle = {name: float(np.percentile([found[name] for found in rounds], QUARTILE)) for name in rounds[0]}
    spread = profile.spread | {name: spread_of([found[name] for found in rounds]) for name in rounds[0]}
    stream = _stream_rate()
    progress(1.0)
    return msgspec.structs.replace(
        profile,
        client=ClientCost(
            submit_s=middle["submit"], get_s=middle["get"], put_s=middle["put"], frame_s=middle["client frame"],
            byte_s=middle["byte"],
        ),
        worker=WorkerCost(task_s=middle["task"], frame_s=middle["worker frame"], start_s=middle["worker start"]),
        link=LinkCost(
            send_frame_s=middle["node frame"] / 2, receive_frame_s=middle["node frame"] / 2,
            unix_latency_s=middle["latency"], stream_bytes_per_s=stream,
        ),
        spread=spread,
    )  # fmt: skip


def node_processes() -> tuple[int, int]:
    """The template that workers are forked from, and the node process."""
    template = _parent(trio_ray.get(process_id.remote()))
    return template, _parent(template)


def _parent(process: int) -> int:
    for line in Path(f"/proc/{process}/status").read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("PPid:"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/{process}/status names no parent process, so the node process cannot be found")


def _cpu(process: int) -> float:
    """CPU seconds a process has spent, all threads together, to the nanosecond."""
    total = 0
    try:
        for thread in Path(f"/proc/{process}/task").iterdir():
            total += int((thread / "schedstat").read_text(encoding="ascii").split()[0])
    except FileNotFoundError:  # it has just ended
        return 0.0
    return total / 1e9


def _workers_cpu(template: int) -> dict[int, float]:
    """CPU seconds of each worker there is."""
    children = Path(f"/proc/{template}/task/{template}/children").read_text(encoding="ascii")
    return {int(process): _cpu(int(process)) for process in children.split()}


class Spent:
    """CPU time spent by the driver, the workers and the node, and time passed, in a block."""

    def __init__(self, template: int, node: int) -> None:
        self._template, self._node = template, node
        self.driver = self.workers = self.node = self.elapsed = 0.0

    def __enter__(self) -> "Spent":
        self._workers = _workers_cpu(self._template)
        self._before = _cpu(os.getpid()), _cpu(self._node)
        self._began = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.elapsed = time.perf_counter() - self._began
        self.driver, self.node = _cpu(os.getpid()) - self._before[0], _cpu(self._node) - self._before[1]
        after = _workers_cpu(self._template)
        # One that has ended meanwhile was idle, and did nothing of what is measured.
        self.workers = sum(spent - self._workers.get(process, 0.0) for process, spent in after.items())


def _bulk(count: int) -> None:
    trio_ray.get([empty.remote() for _ in range(count)])


def _round(profile: Profile, template: int, node: int) -> dict[str, float]:
    """All figures once, in seconds."""
    with Spent(template, node) as submitting:
        refs = [empty.remote() for _ in range(BULK)]
    trio_ray.wait(refs, num_returns=BULK, timeout=30)
    with Spent(template, node) as whole:
        _bulk(BULK)
    with Spent(template, node) as single:
        for _ in range(SINGLE):
            trio_ray.get(empty.remote())
    with Spent(template, node) as putting:
        stored = [trio_ray.put(index) for index in range(BULK)]
    del stored
    submit = submitting.driver / BULK
    task = whole.workers / BULK
    get = max(0.0, whole.driver / BULK - submit)
    once_driver, once_worker, once_node = (x / SINGLE for x in (single.driver, single.workers, single.node))
    # The driver stays awake while it waits for a single task: what it spends while the others work is no work.
    once_driver = min(once_driver, max(0.0, single.elapsed / SINGLE - once_worker - once_node))
    machine = sum(
        profile.step_s + cost.step_message_s + cost.step_item_s
        for cost in (profile.kind("SubmitTasks"), profile.kind("TasksDone"), profile.kind("References"))
    )  # fmt: skip
    wire = sum(
        cost.decode_message_s + cost.decode_item_s for cost in map(profile.kind, ("SubmitTasks", "TasksDone"))
    ) + sum(cost.encode_message_s + cost.encode_item_s for cost in map(profile.kind, ("RunTasks", "ObjectsReady")))
    apart = max(0.0, single.elapsed / SINGLE - once_driver - once_worker - once_node)
    return {
        "submit": submit,
        "get": get,
        "put": putting.driver / BULK,
        "task": task,
        "client frame": max(0.0, once_driver - submit - get) / 2,
        "worker frame": max(0.0, once_worker - task) / 2,
        "node frame": max(0.0, once_node - machine - wire) / 2,
        "latency": apart / 4,
        "worker start": _worker_start(),
        "byte": _byte(),
    }


def _worker_start() -> float:
    """Seconds that one more worker takes, when several are started together."""

    class Idler:
        """A class that travels by value, so that a new worker does not spend its start on importing this module."""

        def ready(self) -> None:
            """Nothing."""

    idler = trio_ray.remote(num_cpus=0)(Idler)
    began = time.perf_counter()
    actors = [idler.remote() for _ in range(ACTORS)]
    trio_ray.get([actor.ready.remote() for actor in actors])
    return (time.perf_counter() - began) / ACTORS


def _byte() -> float:
    """Seconds for a byte written into the object store, its pages being warm."""
    array = np.ones(ARRAY_BYTES, dtype=np.uint8)
    trio_ray.put(array)
    times = []
    for _ in range(3):
        began = time.perf_counter()
        trio_ray.put(array)
        times.append(time.perf_counter() - began)
    return min(times) / ARRAY_BYTES


def _stream_rate() -> float:
    """Bytes per second of one object from node to node on this machine."""
    import trio

    async def main() -> float:
        async with trio_ray.open_cluster(nodes=2, num_cpus=1, resources={"there": 1}) as cluster:
            best = 0.0
            readers = [reader.remote(), reader.remote()]
            for _ in range(4):
                ref = await cluster.put(np.ones(ARRAY_BYTES, dtype=np.uint8))
                began = cluster.now()
                await cluster.gather([each.read.remote(ref) for each in readers])  # one is not where the array is
                best = max(best, ARRAY_BYTES / (cluster.now() - began))
            return best

    return trio.run(main)
