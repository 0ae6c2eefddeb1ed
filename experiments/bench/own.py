"""Benchmarks of what only trio-ray has or lets one look at: nodes, transfers, the control store, the object store.

Kept apart from the suite, which must run where trio-ray is not installed.
"""

from __future__ import annotations

import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

Register = Callable[..., Callable[[Callable[[Any], Iterator[tuple[Callable[[], object], float]]]], None]]

TRANSFER_BYTES = 1_000_000_000
BROADCAST_BYTES = 256_000_000
BROADCAST_NODES = 8
QUEUED = 200_000
SPENT = {
    "a task in bulk": (False, 1000), "an actor call in bulk": (True, 1000),
    "a task alone": (False, 1), "an actor call alone": (True, 1),
}  # fmt: skip
"""Whether it is an actor's, and how many are waited for at once."""
PLACES = ("driver", "node", "workers", "time passed")
SPENT_CALLS = 20_000
SPENT_ALONE = 2_000


def register(benchmark: Register) -> None:
    """Add these benchmarks to the suite's."""
    own: dict[str, Any] = {"systems": ("trio_ray",)}
    benchmark("worker start", "ms", higher=False, own_cluster=True, **own)(worker_start)
    benchmark("memory of a queued task (PSS, all processes)", "bytes", higher=False, once=True, **own)(queued_memory)
    benchmark("plain Trio TCP stream, 1 GB", "GB/s", own_cluster=True, **own)(plain_stream)
    benchmark("transfer of 1 GB between two nodes", "GB/s", own_cluster=True, **own)(transfer)
    benchmark("broadcast of 256 MB to eight nodes", "GB/s", own_cluster=True, **own)(broadcast)
    benchmark("control store: object rows written and freed", "rows/s", own_cluster=True, **own)(control_store)
    for name in SPENT:
        for place in PLACES:
            run = _processor_time(name, place)
            benchmark(f"processor time of {name}: {place}", "µs", higher=False, **own)(run)
    for size, name in ((10**3, "1 KB"), (10**5, "100 KB"), (10**6, "1 MB"), (10**7, "10 MB"), (10**8, "100 MB")):
        benchmark(f"figure 9: put of {name}", "GB/s", **own)(_put_of(size, size / 1e9))
    for size, name in ((10**3, "1 KB"), (10**4, "10 KB"), (10**5, "100 KB"), (10**6, "1 MB")):
        benchmark(f"figure 9: IOPS at {name}", "puts/s", **own)(_put_of(size, 1.0))
    for threads in (1, 2, 4, 8):
        run = _copy_with(threads)
        benchmark(f"figure 9: 100 MB into shared memory, {threads} threads", "GB/s", own_cluster=True, **own)(run)


def worker_start(_: Any) -> Iterator[tuple[Callable[[], object], float]]:
    """From the demand for a worker to the end of its first, empty task, on a node that has none."""
    import trio_ray
    from trio_ray.runtime.launch.local import LocalCluster

    def work() -> float:
        with LocalCluster.begin(resources={"CPU": 1.0}, prestart=0) as cluster:
            cluster.finish()
            with trio_ray.init(cluster.name):

                @trio_ray.remote
                def empty() -> None:
                    pass

                begin = time.perf_counter()
                trio_ray.get(empty.remote())
                return (time.perf_counter() - begin) * 1000

    yield work, -1


def queued_memory(remote: Any) -> Iterator[tuple[Callable[[], object], float]]:
    """What a task costs while it waits behind busy CPUs: growth of all processes, the driver's too, for each task."""
    from trio_ray.experiments.bench.suite import descendants, pss_mb

    ray = remote.ray

    hold = ray.remote(lambda: time.sleep(120))

    def work() -> float:
        held = [hold.remote() for _ in range(2)]
        ray.get([ray.put(0)])
        before = pss_mb(descendants(os.getpid()))
        waiting = [remote.small_value.remote() for _ in range(QUEUED)]
        ray.wait(waiting, timeout=2.0)  # let the node take them in and write behind
        after = pss_mb(descendants(os.getpid()))
        for ref in held:
            ray.cancel(ref, force=True)
        del waiting
        return (after - before) * 2**20 / QUEUED

    yield work, -1


def plain_stream(_: Any) -> Iterator[tuple[Callable[[], object], float]]:
    """The reference for transfers: one process sends, another receives into one buffer, over loopback."""
    import trio

    async def receive(port: int) -> None:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
        left = TRANSFER_BYTES
        while left:
            left -= len(await stream.receive_some(1 << 20))
        await stream.send_all(b"k")

    async def send(listener: socket.socket, begun: list[float]) -> None:
        data = bytes(1 << 20)
        with trio.socket.from_stdlib_socket(listener) as accepting:
            connection, _ = await accepting.accept()
        stream = trio.SocketStream(connection)
        begun.append(time.perf_counter())
        for _ in range(TRANSFER_BYTES // len(data)):
            await stream.send_all(data)
        await stream.send_all(data[: TRANSFER_BYTES % len(data)])
        await stream.receive_some(1)
        begun.append(time.perf_counter())

    def work() -> float:
        listener = socket.create_server(("127.0.0.1", 0))
        child = os.fork()
        if not child:
            trio.run(receive, listener.getsockname()[1])
            os._exit(0)
        times: list[float] = []
        trio.run(send, listener, times)
        os.waitpid(child, 0)
        return TRANSFER_BYTES / (times[1] - times[0]) / 1e9

    yield work, -1


def _spread(nodes: int, size: int) -> Iterator[tuple[Callable[[], object], float]]:
    """Puts an object on the head and has a task on each of ``nodes`` other nodes read it; bytes moved a second."""
    import numpy as np

    import trio_ray
    from trio_ray.runtime.launch.local import LocalCluster

    def work() -> float:
        with LocalCluster.begin(resources={"CPU": 1.0}, store_bytes=size + (64 << 20)) as cluster:
            cluster.finish()
            for index in range(nodes):
                cluster.add_node(resources={"CPU": 1.0, f"node-{index}": 1.0})
            with trio_ray.init(cluster.name):

                @trio_ray.remote
                def last(array: Any) -> int:
                    return int(array[-1])

                readers = [last.options(resources={f"node-{index}": 0.01}) for index in range(nodes)]
                small = trio_ray.put(np.ones(10))
                trio_ray.get([reader.remote(small) for reader in readers])
                array = np.ones(size, dtype=np.uint8)
                for _ in range(3):  # the first touches memory that nobody has touched before; the last is told
                    large = trio_ray.put(array)
                    begin = time.perf_counter()
                    trio_ray.get([reader.remote(large) for reader in readers])
                    seconds = time.perf_counter() - begin
                    del large
                    _wait_until_empty(trio_ray)
                return nodes * size / seconds / 1e9

    yield work, -1


def _wait_until_empty(trio_ray: Any) -> None:
    """Until the nodes have freed what was dropped; a small task goes round meanwhile, for messages to travel."""

    empty = trio_ray.remote(lambda: None)
    end = time.perf_counter() + 0.3
    while time.perf_counter() < end:
        trio_ray.get(empty.remote())


def transfer(_: Any) -> Iterator[tuple[Callable[[], object], float]]:
    """An object pulled by another node, over loopback."""
    yield from _spread(1, TRANSFER_BYTES)


def broadcast(_: Any) -> Iterator[tuple[Callable[[], object], float]]:
    """An object pulled by eight nodes at once; the sum of what arrives."""
    yield from _spread(BROADCAST_NODES, BROADCAST_BYTES)


def control_store(_: Any) -> Iterator[tuple[Callable[[], object], float]]:
    """One shard, without its links: location and hold of an object written, then freed, in batches of 100."""
    from trio_ray.runtime.core.control.store import ControlMachine
    from trio_ray.runtime.core.machine import Received
    from trio_ray.runtime.core.messages import HoldObjects, NodeInfo, ObjectsChanged, ObjectUpdate, RegisterNode

    machine = ControlMachine(0, 1)
    machine.start(0.0)
    machine.step([Received("n:1", RegisterNode(NodeInfo("n:1", "", ())))], 0.0)
    rng = random.Random(0)

    def work() -> None:
        object_ids = [rng.randbytes(20) for _ in range(100)]
        updates = [ObjectUpdate(object_id, 10) for object_id in object_ids]
        machine.step(
            [
                Received("n:1", HoldObjects(1, object_ids, [], object_ids)),
                Received("n:1", ObjectsChanged(updates)),
            ],
            0.0,
        )
        machine.step([Received("n:1", HoldObjects(0, [], object_ids))], 0.0)

    yield work, 100


def _processor_time(name: str, place: str) -> Callable[[Any], Iterator[tuple[Callable[[], object], float]]]:
    """What one call costs each process, to the nanosecond of the kernel's own accounts; all threads together.

    A driver that waits for a single result stays awake while others work on it: its figure is then nearly all the time
    that passed.
    """
    of_actor, at_once = SPENT[name]

    def run(remote: Any) -> Iterator[tuple[Callable[[], object], float]]:
        from trio_ray.experiments.calibration import Spent, node_processes

        ray = remote.ray
        call = remote.Actor.remote().small_value.remote if of_actor else remote.small_value.remote
        calls = SPENT_ALONE if at_once == 1 else SPENT_CALLS

        def rounds(number: int) -> None:
            for _ in range(number // at_once):
                ray.get([call() for _ in range(at_once)] if at_once > 1 else call())

        def work() -> float:
            rounds(calls // 4)
            with Spent(*node_processes()) as spent:
                rounds(calls)
            figures = dict(zip(PLACES, (spent.driver, spent.node, spent.workers, spent.elapsed), strict=True))
            return figures[place] / calls * 1e6

        yield work, -1

    return run


def _put_of(size: int, amount: float) -> Callable[[Any], Iterator[tuple[Callable[[], object], float]]]:
    def run(remote: Any) -> Iterator[tuple[Callable[[], object], float]]:
        import numpy as np

        array = np.ones(size, dtype=np.uint8)
        yield lambda: remote.ray.put(array), amount

    return run


def _copy_with(threads: int) -> Callable[[Any], Iterator[tuple[Callable[[], object], float]]]:
    def run(_: Any) -> Iterator[tuple[Callable[[], object], float]]:
        from trio_ray.runtime.client.memory import SharedMemory
        from trio_ray.runtime.node.arena import SharedArena

        size = 100_000_000
        arena = SharedArena(size)
        memory = SharedMemory(arena.path, size, lambda object_id: None)
        data = bytearray(b"x") * size
        yield lambda: memory.write(0, [(0, memoryview(data))], size, threads=threads), size / 1e9

    return run
