"""Workloads on a real cluster of three nodes, by the synchronous API; afterwards nothing is left in the stores."""

import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest

import trio_ray as ray
from tests.runtime.processes import enter, eventually, is_quiet
from trio_ray.runtime.client import driver
from trio_ray.runtime.launch.local import ClusterFile

NODES = 3
CPUS = 2
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterFile]:
    with ray.init(
        nodes=NODES, num_cpus=CPUS, resources={"seat": 1, "half": 0.5}, object_store_memory=1200 * MEGABYTE
    ):
        assert driver._driver is not None and driver._driver.cluster is not None
        yield driver._driver.cluster.file


@pytest.fixture(autouse=True)
def nothing_is_left(cluster: ClusterFile) -> Iterator[None]:
    """What a test made is gone when its references are, on every node."""
    yield
    links = [enter(cluster, node.unix) for node in cluster.nodes]
    try:
        for link in links:
            eventually(partial(is_quiet, link))
    finally:
        for link in links:
            link.close()


@ray.remote
def nothing() -> None:
    pass


@ray.remote
def add(*values: int) -> int:
    return sum(values)


@ray.remote
def total(array: Any) -> tuple[float, bool]:
    return float(array.sum()), bool(array.flags.writeable)


@ray.remote
class Counter:
    def __init__(self) -> None:
        self.calls: list[int] = []

    def add(self, number: int) -> int:
        self.calls.append(number)
        return len(self.calls)

    def history(self) -> list[int]:
        return self.calls

    def keep(self, refs: list[ray.ObjectRef]) -> None:
        self.refs = refs

    def kept(self) -> list[Any]:
        return ray.get(self.refs)


def test_ten_thousand_empty_tasks(cluster: ClusterFile) -> None:
    assert ray.get([nothing.remote() for _ in range(10_000)]) == [None] * 10_000


def test_two_thousand_calls_in_order(cluster: ClusterFile) -> None:
    counter = Counter.remote()  # type: ignore[attr-defined]
    assert ray.get([counter.add.remote(i) for i in range(2000)]) == list(range(1, 2001))
    assert ray.get(counter.history.remote()) == list(range(2000))


def test_calls_to_actors_on_every_node(cluster: ClusterFile) -> None:
    counters = [Counter.options(resources={"seat": 1}).remote() for _ in range(NODES)]  # type: ignore[attr-defined]
    refs = [counters[i % NODES].add.remote(i) for i in range(600)]
    assert ray.get(refs) == [i // NODES + 1 for i in range(600)]
    assert ray.get([counter.history.remote() for counter in counters]) == [
        list(range(first, 600, NODES)) for first in range(NODES)
    ]


def test_half_a_gigabyte_read_by_four_tasks(cluster: ClusterFile) -> None:
    array = np.arange(500_000_000 // 8, dtype=np.float64)
    expected = float(array.sum())
    ref = ray.put(array)
    del array
    results = ray.get([total.remote(ref) for _ in range(4)])
    assert results == [(expected, False)] * 4


def test_a_large_array_is_read_on_every_node(cluster: ClusterFile) -> None:
    array = np.arange(40 * MEGABYTE // 8, dtype=np.float64)
    ref = ray.put(array)
    on_seat = total.options(resources={"seat": 1}, num_cpus=0)
    results = ray.get([on_seat.remote(ref) for _ in range(NODES * 2)])
    assert set(results) == {(float(array.sum()), False)}


def test_large_results_of_every_node_meet(cluster: ClusterFile) -> None:
    @ray.remote(resources={"seat": 1})
    def make(number: int) -> Any:
        return np.full(4 * MEGABYTE // 8, float(number))

    @ray.remote
    def join(*arrays: Any) -> list[float]:
        return [float(array[-1]) for array in arrays]

    refs = [make.remote(i) for i in range(9)]
    assert ray.get(join.remote(*refs)) == [float(i) for i in range(9)]
    assert [float(array[0]) for array in ray.get(refs)] == [float(i) for i in range(9)]


def test_a_chain_of_a_thousand(cluster: ClusterFile) -> None:
    ref = ray.put(0)
    for _ in range(1000):
        ref = add.remote(ref, 1)
    assert ray.get(ref) == 1000


def test_a_fan_in_of_a_hundred(cluster: ClusterFile) -> None:
    assert ray.get(add.remote(*[add.remote(i) for i in range(100)])) == sum(range(100))


def test_recursion_with_more_tasks_than_cpus(cluster: ClusterFile) -> None:
    @ray.remote
    def tree(depth: int, width: int) -> int:
        return 1 if not depth else sum(ray.get([tree.remote(depth - 1, width) for _ in range(width)]))

    assert ray.get(tree.remote(3, 4)) == 64


def test_tasks_that_return_references(cluster: ClusterFile) -> None:
    @ray.remote
    def outer(depth: int) -> Any:
        return [outer.remote(depth - 1)] if depth else "bottom"

    value: Any = [outer.remote(4)]
    while isinstance(value, list):
        value = ray.get(value[0])
    assert value == "bottom"

    @ray.remote
    def spawn(count: int) -> list[ray.ObjectRef]:
        return [add.remote(i, 1) for i in range(count)]

    lists = ray.get([spawn.remote(20) for _ in range(10)])
    assert [ray.get(refs) for refs in lists] == [list(range(1, 21))] * 10


def test_references_in_containers(cluster: ClusterFile) -> None:
    @ray.remote
    def pick(things: dict[str, Any]) -> Any:
        first, (second, third) = things["pair"], things["others"]
        assert isinstance(first, ray.ObjectRef)
        return ray.get(first) + ray.get(second) + float(ray.get(third).sum())

    big = ray.put(np.ones(200_000))
    things = {"pair": ray.put(1), "others": (add.remote(2, 3), big)}
    assert ray.get([pick.remote(things) for _ in range(6)]) == [200_006.0] * 6
    stored = ray.put(things)
    del things, big
    assert ray.get([pick.remote(stored) for _ in range(6)]) == [200_006.0] * 6
    assert ray.get(ray.get(stored)["others"][0]) == 5


def test_references_kept_by_an_actor(cluster: ClusterFile) -> None:
    counter = Counter.options(resources={"seat": 1}).remote()  # type: ignore[attr-defined]
    refs = [add.remote(i, i) for i in range(5)] + [ray.put(np.ones(100_000)), ray.put("x")]
    ray.get(counter.keep.remote(refs))
    del refs
    kept = ray.get(counter.kept.remote())
    assert kept[:5] == [0, 2, 4, 6, 8] and kept[5].sum() == 100_000 and kept[6] == "x"


def test_several_returns(cluster: ClusterFile) -> None:
    @ray.remote(num_returns=3)
    def split(x: int) -> Any:
        return x, np.full(100_000, x), [ray.put(x)]

    for small, large, nested in [split.remote(i) for i in range(10)]:
        number = ray.get(small)
        assert ray.get(large)[0] == number and ray.get(ray.get(nested)[0]) == number


def test_fractions_and_custom_resources(cluster: ClusterFile) -> None:
    refs = [add.options(num_cpus=0.25, resources={"half": 0.1}).remote(i) for i in range(40)]
    refs += [add.options(num_cpus=0, resources={"seat": 0.5}).remote(i) for i in range(40)]
    assert ray.get(refs) == [*range(40), *range(40)]
    eventually(lambda: ray.available_resources() == {"CPU": 6.0, "seat": 3.0, "half": 1.5})


def test_handles_are_passed_to_tasks(cluster: ClusterFile) -> None:
    @ray.remote
    def use(handle: Any, times: int) -> list[int]:
        return ray.get([handle.add.remote(i) for i in range(times)])

    counter = Counter.remote()  # type: ignore[attr-defined]
    results = ray.get([use.remote(counter, 20) for _ in range(6)])
    assert sorted(number for result in results for number in result) == list(range(1, 121))
    assert all(result == sorted(result) for result in results)

    @ray.remote
    def make() -> Any:
        handle = Counter.remote()  # type: ignore[attr-defined]
        ray.get(handle.add.remote(1))
        return handle

    handle = ray.get(make.remote())
    assert ray.get(handle.add.remote(2)) == 2


def test_wait(cluster: ClusterFile) -> None:
    @ray.remote
    class Gate:
        def __init__(self) -> None:
            import threading

            self.open = threading.Event()

        def wait(self) -> None:
            self.open.wait(30)

        def let(self) -> None:
            self.open.set()

    gate = Gate.options(max_concurrency=4).remote()  # type: ignore[attr-defined]
    held = [gate.wait.remote(), gate.wait.remote()]
    quick = [add.remote(i) for i in range(3)]
    refs = [held[0], *quick, held[1]]
    assert ray.wait(refs, num_returns=3) == (quick, held)
    assert ray.wait(refs, num_returns=5, timeout=0.01) == (quick, held)
    assert ray.wait(refs, num_returns=1) == (quick[:1], [held[0], *quick[1:], held[1]])
    assert ray.wait(refs, num_returns=5, timeout=0) == (quick, held)
    _, rest = ray.wait(refs)
    ready, rest = ray.wait(rest)
    assert (ready, rest) == (quick[1:2], [held[0], quick[2], held[1]])
    ray.get(gate.let.remote())
    ray.get(held)
    ready, rest = ray.wait(rest)  # what was not ready the last time comes first now
    assert (ready, rest) == (held[:1], [quick[2], held[1]])
    assert ray.wait(refs, num_returns=5) == (refs, [])
    remote = ray.remote(resources={"seat": 1})(lambda: np.ones(100_000))
    far = [remote.remote() for _ in range(NODES)]
    assert ray.wait(far, num_returns=NODES, fetch_local=False) == (far, [])
    assert ray.wait(far, num_returns=NODES) == (far, [])


def test_a_task_on_every_node(cluster: ClusterFile) -> None:
    @ray.remote(resources={"seat": 1})
    class Seat:
        def node(self) -> int:
            return os.getppid()

    seats = [Seat.remote() for _ in range(NODES)]  # type: ignore[attr-defined]
    assert len(set(ray.get([seat.node.remote() for seat in seats]))) == NODES

    @ray.remote(scheduling_strategy="SPREAD")
    def spread() -> int:
        return os.getppid()

    assert len(set(ray.get([spread.remote() for _ in range(12)]))) == NODES


def test_abandoned_results_are_freed(cluster: ClusterFile) -> None:
    @ray.remote
    def make(i: int) -> Any:
        return np.full(200_000, i)

    for i in range(60):
        make.remote(i)
    refs = [make.remote(i) for i in range(20)]
    sums = [add.remote(ray.put(i), i) for i in range(20)]
    del refs
    assert ray.get(sums) == [2 * i for i in range(20)]
