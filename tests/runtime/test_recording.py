"""What a real node's machines saw, replayed into fresh machines, gives the very effects that they had."""

import os
import time
from pathlib import Path

import msgspec
import numpy as np
import pytest

import trio_ray
from tests.runtime.processes import enter, eventually
from trio_ray import exceptions
from trio_ray.runtime.client.driver import connect_to
from trio_ray.runtime.client.find import Place
from trio_ray.runtime.launch.local import LocalCluster
from trio_ray.runtime.node.recording import replay


@trio_ray.remote
def square(x: int) -> int:
    return x * x


@trio_ray.remote
def total(array: "np.ndarray[tuple[int], np.dtype[np.float64]]") -> float:
    return float(array.sum())


@trio_ray.remote
def nested(n: int) -> int:
    return sum(trio_ray.get([square.remote(i) for i in range(n)]))


@trio_ray.remote
def fail() -> None:
    raise ValueError("no good")


@trio_ray.remote
class Counter:
    def __init__(self) -> None:
        self.value = 0

    def add(self) -> int:
        self.value += 1
        return self.value


@trio_ray.remote(max_retries=1)
def crash() -> None:
    os._exit(3)


@trio_ray.remote
def give(n: int) -> list[trio_ray.ObjectRef]:
    return [square.remote(i) for i in range(n)]


@trio_ray.remote(resources={"far": 1}, num_cpus=0)
def make(size: int) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    return np.full(size, 2.0)


@trio_ray.remote
def hang(mark: str) -> None:
    Path(mark).touch()
    time.sleep(600)


def work(folder: Path) -> None:
    """Some of everything: that machines do the same again is to hold whatever happens to them."""
    assert sum(trio_ray.get([square.remote(i) for i in range(300)])) == sum(i * i for i in range(300))
    array = trio_ray.put(np.ones(100_000))
    assert trio_ray.get([total.remote(array) for _ in range(4)]) == [100_000.0] * 4
    assert trio_ray.get(total.remote(make.remote(100_000))) == 200_000.0
    assert trio_ray.get(make.remote(50_000))[-1] == 2.0
    assert trio_ray.get(nested.remote(5)) == 30
    assert [trio_ray.get(refs) for refs in trio_ray.get([give.remote(10) for _ in range(4)])] == [
        [i * i for i in range(10)]
    ] * 4
    counters = [Counter.remote(), Counter.options(resources={"far": 1}).remote()]  # type: ignore[attr-defined]
    for counter in counters:
        assert trio_ray.get([counter.add.remote() for _ in range(20)])[-1] == 20
    with pytest.raises(ValueError, match="no good"):
        trio_ray.get(fail.remote())
    with pytest.raises(exceptions.WorkerCrashedError, match="exit code 3"):
        trio_ray.get(crash.remote())
    trio_ray.kill(counters[1])
    with pytest.raises(exceptions.ActorDiedError):
        trio_ray.get(counters[1].add.remote())
    with pytest.raises(exceptions.TaskUnschedulableError, match="unicorn"):
        trio_ray.get(square.options(resources={"unicorn": 1}).remote(1))
    with pytest.raises(ExceptionGroup), trio_ray.task_scope() as scope:
        for i in range(8):
            scope.start_soon(hang, str(folder / str(i)))
        eventually(lambda: any(folder.iterdir()))
        raise KeyError("enough")


def test_recordings_replay_to_the_same_effects(tmp_path: Path) -> None:
    paths = [tmp_path / f"{index}.recording" for index in range(3)]
    marks = tmp_path / "marks"
    marks.mkdir()
    cluster = LocalCluster.begin(
        resources={"CPU": 2.0}, store_bytes=64 << 20, record=str(paths[0]), seed=7, shards=2, cancel_grace_s=0.5
    )
    with cluster:
        cluster.finish()
        for path in paths[1:]:
            cluster.add_node(record=str(path), resources={"CPU": 2.0, "far": 1.0})
        secret = bytes.fromhex(cluster.secret)
        driver = connect_to(Place(cluster.file.head.unix, secret, "test"), None, "default")
        driver.enter()
        try:
            work(marks)
        finally:
            driver.leave()
        enter(cluster.file).close()
        nodes = [node.node for node in cluster.file.nodes]
    encode = msgspec.msgpack.Encoder().encode
    for index, (path, node) in enumerate(zip(paths, nodes, strict=True)):
        machines = set()
        events = 0
        for step, effects in replay(path):
            assert encode(effects) == encode(step.effects), f"{step.machine} at {step.now}: {step.events}"
            machines.add(step.machine)
            events += len(step.events or ())
        assert machines == ({node} if index else {node, "placement", "control/0", "control/1"})
        assert events > 20


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x03\x00\x00\x00abc")
    with pytest.raises(ValueError, match="no recording"):
        list(replay(path))
