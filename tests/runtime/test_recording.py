"""What a real node's machines saw, replayed into fresh machines, gives the very effects that they had."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

import trio_ray
from tests.runtime.processes import enter
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


def work() -> None:
    assert sum(trio_ray.get([square.remote(i) for i in range(300)])) == sum(i * i for i in range(300))
    array = trio_ray.put(np.ones(100_000))
    assert trio_ray.get([total.remote(array) for _ in range(4)]) == [100_000.0] * 4
    assert trio_ray.get(nested.remote(5)) == 30
    counter = Counter.remote()  # type: ignore[attr-defined]
    assert trio_ray.get([counter.add.remote() for _ in range(20)])[-1] == 20
    with pytest.raises(ValueError, match="no good"):
        trio_ray.get(fail.remote())


def test_a_recording_replays_to_the_same_effects(tmp_path: Path) -> None:
    path = tmp_path / "head.recording"
    cluster = LocalCluster.begin(nodes=2, resources={"CPU": 2.0}, store_bytes=64 << 20, record=str(path))
    with cluster:
        cluster.finish()
        secret = bytes.fromhex(cluster.secret)
        driver = connect_to(Place(cluster.file.head.unix, secret, "test"), None, "default")
        driver.enter()
        try:
            work()
        finally:
            driver.leave()
        enter(cluster.file).close()
    encode = msgspec.msgpack.Encoder().encode
    machines = set()
    events = 0
    for step, effects in replay(path):
        assert encode(effects) == encode(step.effects), f"at {step.now}: {step.events}"
        machines.add(step.machine)
        events += len(step.events or ())
    assert machines == {cluster.file.head.node, "placement", "control/0"}
    assert events > 100


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"\x03\x00\x00\x00abc")
    with pytest.raises(ValueError, match="no recording"):
        list(replay(path))
