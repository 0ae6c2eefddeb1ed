"""Drivers as processes: remote ones, interrupted ones, killed ones, forked ones; what they import and hand on."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trio_ray as ray
from tests.runtime.processes import eventually
from trio_ray import exceptions
from trio_ray.runtime.client.driver import connect_to
from trio_ray.runtime.client.find import SECRET_VARIABLE, Place
from trio_ray.runtime.client.sync import SyncConnection, connect
from trio_ray.runtime.launch.local import ClusterFile, LocalCluster, is_alive
from trio_ray.runtime.transport.blocking import BlockingLink
from trio_ray.runtime.transport.handshake import Hello

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterFile]:
    with LocalCluster.begin(resources={"CPU": 2.0}, ws_port=0) as local:
        yield local.finish()


def start(folder: Path, text: str, *arguments: str) -> "subprocess.Popen[str]":
    """Run a program in a process of its own."""
    script = folder / "program.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, str(script), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=environment, cwd=folder, start_new_session=True,
    )  # fmt: skip


def finish(process: "subprocess.Popen[str]") -> tuple[str, str]:
    out, err = process.communicate(timeout=30)
    return out, err


@ray.remote
def double(x: Any) -> Any:
    return x * 2


@ray.remote
class Counter:
    def __init__(self) -> None:
        self.value = 0

    def add(self) -> int:
        self.value += 1
        return self.value


def use_from_a_thread() -> None:
    assert ray.get([double.remote(i) for i in range(20)]) == [2 * i for i in range(20)]
    array = np.arange(700_000.0)
    assert (ray.get(double.remote(array)) == array * 2).all(), "a large argument and a large result"
    ref = ray.put(array)
    assert (ray.get(ref) == array).all()
    counter: Any = Counter.remote()  # type: ignore[attr-defined]
    assert ray.get([counter.add.remote() for _ in range(5)]) == [1, 2, 3, 4, 5]
    assert ray.cluster_resources()["CPU"] == 2.0
    with pytest.raises(ZeroDivisionError):
        ray.get(ray.remote(lambda: 1 / 0).remote())
    with pytest.raises(exceptions.GetTimeoutError):
        ray.get(ray.remote(time.sleep).options(num_cpus=0).remote(0.5), timeout=0.01)


def test_a_driver_over_websocket(cluster: ClusterFile) -> None:
    assert cluster.head.ws
    with ray.init(cluster.head.ws):
        use_from_a_thread()


def test_a_driver_over_tcp(cluster: ClusterFile) -> None:
    driver = connect_to(Place(cluster.head.tcp, bytes.fromhex(cluster.secret), cluster.head.tcp), None, "default")
    driver.enter()
    assert isinstance(driver.connection, SyncConnection)
    driver.connection.start_pump()
    try:
        use_from_a_thread()
    finally:
        driver.leave()


def test_a_driver_of_a_running_cluster(cluster: ClusterFile) -> None:
    with ray.init(cluster.head.tcp) as facts:
        assert facts["address"] in cluster.head.tcp
        use_from_a_thread()


@pytest.mark.parametrize("scheme", ["tcp", "ws"])
async def test_trio_drivers(cluster: ClusterFile, scheme: str) -> None:
    address = cluster.head.tcp if scheme == "tcp" else cluster.head.ws
    async with ray.connect(address) as joined:
        assert await joined.gather([double.remote(i) for i in range(20)]) == [2 * i for i in range(20)]
        array = np.arange(700_000.0)
        ref = await joined.put(array)
        assert (await double.remote(ref) == array * 2).all()
        with pytest.raises(ExceptionGroup):
            async with joined.open_nursery() as nursery:
                nursery.start_soon(lambda: 1 / 0)
                await trio.sleep_forever()


def test_wrong_addresses_and_secrets_are_sentences(
    cluster: ClusterFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConnectionError, match=r"127\.0\.0\.1:9"):
        ray.init("127.0.0.1:9")
    with pytest.raises(ValueError, match="scheme"):
        ray.init("ftp://somewhere")
    with pytest.raises(ValueError, match="num_cpus"):
        ray.init(cluster.head.tcp, num_cpus=3)
    with pytest.raises(ValueError, match="num_cpus"):
        ray.init(num_cpus=-1)
    secret = tmp_path / "secret"
    secret.write_text("00" * 32)
    monkeypatch.setenv(SECRET_VARIABLE, str(secret))
    with pytest.raises(ConnectionError, match="no cluster answers"):
        ray.init("tcp://127.0.0.1:9")
    for address in (cluster.head.unix, cluster.head.tcp, cluster.head.ws):
        with pytest.raises(exceptions.AuthenticationError, match="secret"):
            connect_to(Place(address, b"wrong", address), None, "default")
    assert not ray.is_initialized()


def test_a_killed_driver_leaves_nothing_running(cluster: ClusterFile, tmp_path: Path) -> None:
    program = """
import sys, time, trio_ray as ray
from pathlib import Path
ray.init(sys.argv[1])

@ray.remote
def hang():
    Path(sys_argv_2).touch()
    time.sleep(600)

sys_argv_2 = sys.argv[2]
ref = hang.remote()
ray.get(ref)
"""
    mark = tmp_path / "running"
    process = start(tmp_path, program, cluster.head.tcp, str(mark))
    eventually(mark.exists)
    process.send_signal(signal.SIGKILL)
    finish(process)
    with ray.init(cluster.head.tcp):
        assert ray.get([double.remote(i) for i in range(4)], timeout=20) == [0, 2, 4, 6]
        eventually(lambda: ray.available_resources().get("CPU") == 2.0)


OWN_CLUSTER = """
import sys, time, trio_ray as ray
from pathlib import Path
from trio_ray.runtime.client import driver
ray.init(num_cpus=1)

@ray.remote
def pid():
    import os
    return os.getpid(), os.getppid()

node = driver._driver.cluster._nodes[0].pid
Path(sys.argv[1]).write_text(" ".join(map(str, [node, *ray.get(pid.remote())])))
"""


@pytest.mark.parametrize("end", ["interrupt", "kill", "leave", "fail"])
def test_a_driver_takes_its_own_cluster_along(tmp_path: Path, end: str) -> None:
    last = {"leave": "", "fail": "raise KeyError('mine')"}.get(end, "ray.get(ray.remote(time.sleep).remote(600))")
    facts = tmp_path / "pids"
    process = start(tmp_path, OWN_CLUSTER + last, str(facts))
    eventually(lambda: facts.exists() and len(facts.read_text().split()) == 3)
    if end == "interrupt":  # wherever it is by now
        process.send_signal(signal.SIGINT)
    elif end == "kill":
        process.send_signal(signal.SIGKILL)
    _, err = finish(process)
    for pid in map(int, facts.read_text().split()):
        eventually(lambda pid=pid: not is_alive(pid))
    if end == "interrupt":
        assert process.returncode != 0 and "KeyboardInterrupt" in err
    elif end == "fail":
        assert process.returncode == 1 and "KeyError: 'mine'" in err
    elif end == "leave":
        assert process.returncode == 0 and err == ""


def test_trio_programs_end_on_interrupt(tmp_path: Path) -> None:
    program = """
import sys, trio, trio_ray
from pathlib import Path

async def main():
    async with trio_ray.open_cluster(num_cpus=1) as cluster:
        async with cluster.open_nursery() as nursery:
            nursery.start_soon(hang, sys.argv[1])
            await trio.sleep_forever()

@trio_ray.remote
def hang(mark):
    import os, time
    Path(mark).write_text(f"{os.getpid()} {os.getppid()}")
    time.sleep(600)

trio.run(main)
"""
    facts = tmp_path / "pids"
    process = start(tmp_path, program, str(facts))
    eventually(lambda: facts.exists() and len(facts.read_text().split()) == 2)
    process.send_signal(signal.SIGINT)
    _, err = finish(process)
    assert process.returncode != 0 and "KeyboardInterrupt" in err
    for pid in map(int, facts.read_text().split()):
        eventually(lambda pid=pid: not is_alive(pid))


def test_what_the_program_defines_and_imports_reaches_the_workers(tmp_path: Path) -> None:
    (tmp_path / "helper.py").write_text("class Shape:\n    sides = 4\n\ndef area(x):\n    return x * x\n")
    program = """
import trio_ray as ray
import helper

class Point:
    def __init__(self, x):
        self.x = x

FACTOR = 3

@ray.remote
def use(point, shape):
    return Point(helper.area(point.x) * FACTOR + shape.sides)

ray.init(num_cpus=1)
print(ray.get(use.remote(Point(2), helper.Shape())).x)
print(ray.get(ray.remote(helper.area).remote(5)))
"""
    out, err = finish(start(tmp_path, program))
    assert (out, err) == ("16\n25\n", "")


def test_a_call_initializes_by_itself(tmp_path: Path) -> None:
    program = """
import trio_ray as ray
assert not ray.is_initialized()
assert ray.get(ray.put(1)) == 1
assert ray.is_initialized()
ray.shutdown()
assert not ray.is_initialized()
ray.shutdown()
ray.init(num_cpus=1)
print(ray.get(ray.remote(lambda: 2).remote()))
"""
    out, err = finish(start(tmp_path, program))
    assert (out, err) == ("2\n", "")


def test_a_forked_child_is_no_driver(tmp_path: Path) -> None:
    program = """
import os, trio_ray as ray
ray.init(num_cpus=1)
ref = ray.put(5)
child = os.fork()
if not child:
    assert not ray.is_initialized()
    del ref
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(ray.get(ref), ray.get(ray.remote(lambda: 2).remote()))
"""
    out, err = finish(start(tmp_path, program))
    assert (out, err) == ("5 2\n", "")


def test_the_import_is_light(tmp_path: Path) -> None:
    program = """
import sys, trio_ray
print([name for name in ("trio", "numpy", "simpy", "matplotlib", "typer", "rich", "asyncio", "cloudpickle")
       if name in sys.modules])
from trio_ray.exceptions import RayTaskError
assert set(trio_ray.__all__) <= {name for name in dir(trio_ray)} | {"Cluster", "connect", "open_cluster", "simulate"}
assert trio_ray.open_cluster and trio_ray.Cluster
"""
    out, err = finish(start(tmp_path, program))
    assert (out, err) == ("[]\n", "")


def test_what_tasks_print_is_seen(tmp_path: Path) -> None:
    program = """
import time, trio_ray as ray
ray.init(num_cpus=1)

@ray.remote
def talk():
    print("out of a task")
    time.sleep(600)

ref = talk.remote()
ray.wait([ref], timeout=1)
"""
    out, err = finish(start(tmp_path, program))
    assert (out, err) == ("out of a task\n", "")


def test_views_outlive_the_session_and_nothing_else_does(tmp_path: Path) -> None:
    program = """
import gc
import numpy as np, trio_ray as ray

def mapped():
    with open("/proc/self/maps") as lines:
        return sum("memfd:" in line for line in lines)

gc.disable()
ray.init(num_cpus=1)
ref = ray.put(np.arange(100_000.0))
view = ray.get(ref)[5:8]
ray.shutdown()
print(mapped(), view.tolist())
ray.init(num_cpus=1)
other = ray.put(np.arange(100_000.0))
ray.get(other)
ray.shutdown()
print(mapped())
"""
    out, err = finish(start(tmp_path, program))
    assert (out, err) == ("1 [5.0, 6.0, 7.0]\n1\n", "")


def node_pid() -> int:
    from trio_ray.runtime.client import driver

    assert driver._driver is not None and driver._driver.cluster is not None
    return driver._driver.cluster._nodes[0].pid


def test_a_lost_node_is_an_error_for_who_waits() -> None:
    with ray.init(num_cpus=1):
        ref = ray.remote(time.sleep).remote(600)
        future = ref.future()
        os.kill(node_pid(), signal.SIGKILL)
        with pytest.raises(exceptions.RaySystemError, match="lost"):
            ray.get(ref)
        with pytest.raises(exceptions.RaySystemError, match="lost"):
            future.result(timeout=10)
        with pytest.raises(exceptions.RaySystemError, match="lost"):
            ray.get(double.remote(1))
    assert not ray.is_initialized()


def test_a_node_that_ends_while_a_driver_enters_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    shake_hands = BlockingLink.connect

    with LocalCluster.begin(resources={"CPU": 1.0}) as local:
        file = local.finish()

        def shake_hands_with_the_dying(*arguments: Any) -> BlockingLink:
            link = shake_hands(*arguments)
            os.kill(file.head.pid, signal.SIGKILL)
            eventually(lambda: not is_alive(file.head.pid))
            return link

        monkeypatch.setattr(BlockingLink, "connect", shake_hands_with_the_dying)
        with pytest.raises(ConnectionError, match="ended while this process entered"):
            connect(SyncConnection, file.head.unix, bytes.fromhex(file.secret), Hello("driver", os.getpid()))


async def test_a_lost_node_is_an_error_for_trio_tasks() -> None:
    with LocalCluster.begin(resources={"CPU": 1.0}) as local:
        file = await trio.to_thread.run_sync(local.finish)
        async with ray.connect(file.head.tcp) as joined:
            ref = joined.submit(time.sleep, 600)
            waiting = trio.Event()

            async def wait() -> None:
                waiting.set()
                with pytest.raises(exceptions.RaySystemError, match="lost"):
                    await ref

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await waiting.wait()
                os.kill(file.head.pid, signal.SIGKILL)
