"""What crashes, and what goes on: tasks, actors, drivers, nodes; and what strangers do to the others."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import trio_ray as ray
from tests.runtime.processes import enter, eventually, everything, is_quiet, processes
from trio_ray import exceptions
from trio_ray.runtime.client import driver
from trio_ray.runtime.launch import local
from trio_ray.runtime.launch.local import ClusterFile, LocalCluster
from trio_ray.runtime.transport.frames import MAX_CONTROL_BYTES

STORE = 64 << 20


def cluster_of_this_driver() -> LocalCluster:
    assert driver._driver is not None and driver._driver.cluster is not None
    return driver._driver.cluster


@pytest.fixture(scope="module")
def shared() -> Iterator[ClusterFile]:
    """A cluster in which only workers are broken. Entered anew by each test: others start clusters of their own."""
    with LocalCluster.begin(nodes=2, resources={"CPU": 2.0, "seat": 1.0}, store_bytes=STORE, log=True) as cluster:
        yield cluster.finish()


@pytest.fixture
def cluster(shared: ClusterFile) -> Iterator[ClusterFile]:
    with ray.init(shared.head.tcp):
        yield shared


def node_of(pid: int) -> str:
    """The name of the node whose worker a process is."""
    return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[-2].decode()


@ray.remote
def add(*values: int) -> int:
    return sum(values)


@ray.remote
class Counter:
    def __init__(self) -> None:
        self.value = 0

    def add(self) -> int:
        self.value += 1
        return self.value

    def pid(self) -> int:
        return os.getpid()

    def exit(self, code: int) -> None:
        os._exit(code)

    def hang(self, mark: str) -> None:
        Path(mark).touch()
        time.sleep(600)


# -- workers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("retries", [0, 2])
def test_a_task_that_exits_is_retried_then_told(cluster: ClusterFile, tmp_path: Path, retries: int) -> None:
    @ray.remote(max_retries=retries)
    def leave(folder: str) -> None:
        (Path(folder) / str(os.getpid())).touch()
        os._exit(7)

    with pytest.raises(exceptions.WorkerCrashedError, match=r"leave.*on node n:[0-9a-f]{8}.*exit code 7"):
        ray.get(leave.remote(str(tmp_path)), timeout=20)
    assert len(list(tmp_path.iterdir())) == retries + 1
    assert ray.get([add.remote(i) for i in range(10)]) == list(range(10))


def test_a_crash_on_another_node_names_that_node(cluster: ClusterFile) -> None:
    @ray.remote(resources={"seat": 1}, num_cpus=0)
    class Seat:
        def node(self) -> str:
            return node_of(os.getpid())

    @ray.remote(resources={"seat": 1}, max_retries=0)
    def crash() -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    seats = [Seat.remote(), Seat.remote()]  # type: ignore[attr-defined]
    nodes = ray.get([seat.node.remote() for seat in seats])
    assert sorted(nodes) == sorted(node.node for node in cluster.nodes)
    far = nodes.index(cluster.nodes[1].node)
    del seats[far]
    with pytest.raises(exceptions.WorkerCrashedError, match=f"{cluster.nodes[1].node}.*SIGSEGV"):
        ray.get(crash.remote(), timeout=20)


def test_what_waits_for_a_crashed_task_fails_with_its_error(cluster: ClusterFile) -> None:
    @ray.remote(max_retries=0)
    def crash() -> int:
        os._exit(1)

    with pytest.raises(exceptions.WorkerCrashedError, match="exit code 1"):
        ray.get(add.remote(1, crash.remote()), timeout=20)

    @ray.remote
    def outer() -> int:
        return int(ray.get(crash.remote()))

    with pytest.raises(exceptions.WorkerCrashedError, match="exit code 1"):
        ray.get(outer.remote(), timeout=20)


def test_a_crash_frees_what_the_worker_held(cluster: ClusterFile) -> None:
    @ray.remote(max_retries=0)
    def hold_and_crash() -> None:
        ref = ray.put(bytes(1 << 20))
        assert len(ray.get(ref)) == 1 << 20
        os._exit(1)

    @ray.remote(max_retries=0)
    def start_and_crash() -> None:
        refs = [add.remote(i) for i in range(50)]
        ray.wait(refs, num_returns=10)
        os._exit(1)

    for crash in (hold_and_crash, start_and_crash):
        with pytest.raises(exceptions.WorkerCrashedError):
            ray.get(crash.remote(), timeout=20)
    links = [enter(cluster, node.unix) for node in cluster.nodes]
    eventually(lambda: all(is_quiet(link) for link in links))
    for link in links:
        link.close()


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_an_actor_that_dies_says_how(cluster: ClusterFile, tmp_path: Path, how: str) -> None:
    counter = Counter.remote()  # type: ignore[attr-defined]
    pid = ray.get(counter.pid.remote())
    if how == "exit":
        running = counter.exit.remote(3)
        pattern = "exit code 3"
    else:
        running = counter.hang.remote(str(tmp_path / "mark"))
        eventually((tmp_path / "mark").exists)
        os.kill(pid, signal.SIGKILL)
        pattern = "SIGKILL"
    behind = counter.add.remote()
    for ref in (running, behind, counter.add.remote()):
        with pytest.raises(exceptions.ActorDiedError, match=f"Counter.*n:[0-9a-f]{{8}}.*{pattern}"):
            ray.get(ref, timeout=20)
    with pytest.raises(exceptions.ActorDiedError, match=pattern):
        ray.get(counter.add.remote(), timeout=20)


def test_an_actor_restarts_and_forgets(cluster: ClusterFile) -> None:
    counter = Counter.options(max_restarts=1).remote()  # type: ignore[attr-defined]
    assert ray.get([counter.add.remote() for _ in range(3)]) == [1, 2, 3]
    with pytest.raises(exceptions.RayActorError):
        ray.get(counter.exit.remote(1), timeout=20)
    assert ray.get(counter.add.remote(), timeout=20) == 1
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(counter.exit.remote(1), timeout=20)
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(counter.add.remote(), timeout=20)


def test_an_idle_worker_that_is_killed_is_replaced(cluster: ClusterFile) -> None:
    ray.get([add.remote(i) for i in range(10)])
    mine = {os.getpid(), *(node.pid for node in cluster.nodes)}
    workers = [pid for node in cluster.nodes for pid in processes(node.node) if pid not in mine]
    templates = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in workers}
    for pid in workers:
        if pid not in templates:
            os.kill(pid, signal.SIGKILL)
    assert ray.get([add.remote(i) for i in range(100)], timeout=20) == list(range(100))


# -- drivers -----------------------------------------------------------------------------------------------------

DRIVER = """
import os, sys, time
import trio_ray as ray
from trio_ray.runtime.client import driver

ray.init(nodes=3, num_cpus=1, resources={"seat": 1}, object_store_memory=64 << 20)
cluster = driver._driver.cluster

@ray.remote
class Holder:
    def __init__(self):
        self.ref = ray.put(bytes(1 << 20))
    def ready(self):
        return True

@ray.remote(resources={"seat": 1}, num_cpus=0)
def hang(mark):
    open(mark, "w").close()
    time.sleep(600)

holder = Holder.remote()
assert ray.get(holder.ready.remote())
big = ray.put(bytes(8 << 20))
refs = [hang.remote(f"{sys.argv[1]}/{i}") for i in range(3)]
print("cluster", cluster.name, cluster.file.head.pid, *(node.node for node in cluster.file.nodes), flush=True)
ray.get(refs)
"""


@pytest.mark.parametrize("how", ["kill", "interrupt the group", "interrupt twice"])
def test_nothing_is_left_of_a_driver_and_its_cluster(tmp_path: Path, how: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}, start_new_session=True,
    )  # fmt: skip
    assert process.stdout is not None
    _, name, head, *nodes = process.stdout.readline().split()
    eventually(lambda: len(list(tmp_path.iterdir())) == 3, 20)
    assert [fd for fd in Path(f"/proc/{head}/fd").iterdir() if "trio-ray-arena" in str(fd.readlink())]
    begin = time.monotonic()
    if how == "kill":
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGINT)
        if how == "interrupt twice":
            os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode != 0
    eventually(lambda: not any(processes(node) for node in nodes))
    assert time.monotonic() - begin < 5.0, "it took its time"
    if how == "interrupt the group":
        assert err.count("Traceback") == 1 and err.rstrip().endswith("KeyboardInterrupt"), err
    local.sweep()
    assert not (local.runtime_root() / name).exists()
    assert not [entry for entry in Path("/dev/shm").iterdir() if "trio" in entry.name], "a memfd has no name"


# -- nodes -------------------------------------------------------------------------------------------------------


def test_the_tasks_of_a_killed_node_run_again(tmp_path: Path) -> None:
    with ray.init(nodes=3, num_cpus=1, object_store_memory=STORE):
        file = cluster_of_this_driver().file
        victim = file.nodes[2]

        @ray.remote
        def work(i: int, folder: str) -> int:
            """Keep a CPU until the node is dead that is to die."""
            (Path(folder) / node_of(os.getpid())).touch()
            while not (Path(folder) / "dead").exists():
                time.sleep(0.01)
            return i

        refs = [work.remote(i, str(tmp_path)) for i in range(30)]
        eventually((tmp_path / victim.node).exists)
        os.kill(victim.pid, signal.SIGKILL)
        eventually(lambda: not local.is_alive(victim.pid))
        (tmp_path / "dead").touch()
        assert ray.get(refs, timeout=30) == list(range(30))
        eventually(lambda: sum(node["Alive"] for node in ray.nodes()) == 2)
        assert ray.get([add.remote(i) for i in range(100)], timeout=20) == list(range(100))
        eventually(lambda: ray.available_resources() == {"CPU": 2.0})


def test_what_lived_on_a_killed_node_is_an_error(tmp_path: Path) -> None:
    with ray.init(nodes=1, num_cpus=1, object_store_memory=STORE):
        cluster = cluster_of_this_driver()
        victim = cluster.add_node(resources={"CPU": 1.0, "far": 4.0})
        far = {"resources": {"far": 1}, "num_cpus": 0}

        counter = Counter.options(**far).remote()  # type: ignore[attr-defined]
        assert ray.get(counter.add.remote(), timeout=20) == 1
        large = ray.remote(lambda: bytes(1 << 20)).options(**far).remote()
        assert ray.wait([large], fetch_local=False, timeout=20)[0]
        mark = tmp_path / "mark"

        @ray.remote(max_retries=0)
        def hang(mark: str) -> None:
            Path(mark).touch()
            time.sleep(600)

        running = hang.options(**far).remote(str(mark))
        eventually(mark.exists)
        calling = counter.hang.remote(str(tmp_path / "other"))
        eventually((tmp_path / "other").exists)
        os.kill(victim.pid, signal.SIGKILL)
        with pytest.raises(exceptions.NodeDiedError, match=f"hang.*{victim.node}"):
            ray.get(running, timeout=20)
        for ref in (calling, counter.add.remote()):
            with pytest.raises(exceptions.ActorDiedError, match=f"{victim.node}"):
                ray.get(ref, timeout=20)
        with pytest.raises(exceptions.ObjectLostError, match="lost"):
            ray.get(large, timeout=20)
        with pytest.raises(exceptions.TaskUnschedulableError, match="far"):
            ray.get(add.options(**far).remote(1), timeout=20)
        assert ray.get(add.remote(2), timeout=20) == 2
        cluster.add_node(resources={"CPU": 1.0, "far": 1.0})
        assert ray.get(add.options(**far).remote(3), timeout=20) == 3


def test_without_the_head_drivers_are_told_and_the_others_end(tmp_path: Path) -> None:
    with ray.init(nodes=3, num_cpus=1, object_store_memory=STORE):
        file = cluster_of_this_driver().file
        ref = ray.remote(lambda: time.sleep(600)).remote()
        kept = ray.put(1)
        os.kill(file.head.pid, signal.SIGKILL)
        with pytest.raises(exceptions.RaySystemError, match="node"):
            ray.get(ref, timeout=20)
        with pytest.raises(exceptions.RaySystemError, match="node"):
            ray.get(add.remote(1), timeout=20)
        assert ray.get(kept) == 1
        eventually(lambda: not everything(file))
    assert not ray.is_initialized()
    with ray.init(num_cpus=1):
        assert ray.get(add.remote(1)) == 1


# -- strangers ---------------------------------------------------------------------------------------------------


def raw(address: str) -> socket.socket:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), 10)


def test_strangers_do_not_slow_the_others(cluster: ClusterFile) -> None:
    """Half-open connections, garbage and oversized frames, at every node, while work goes on."""
    strangers = []
    for node in cluster.nodes:
        for garbage in (b"", b"\x08", b"GET / HTTP/1.1\r\n\r\n", (MAX_CONTROL_BYTES + 1).to_bytes(4, "little") + b"\0"):
            stranger = raw(node.tcp)
            stranger.sendall(garbage)
            strangers.append(stranger)
        unix = socket.socket(socket.AF_UNIX)
        unix.connect(node.unix.removeprefix("unix:"))
        unix.sendall(os.urandom(1000))
        strangers.append(unix)
    try:
        assert ray.get([add.remote(i) for i in range(500)], timeout=20) == list(range(500))
        seats = [add.options(resources={"seat": 1}).remote(i) for i in range(6)]
        assert ray.get(seats, timeout=20) == list(range(6))
    finally:
        for stranger in strangers:
            stranger.close()
    assert {node["Alive"] for node in ray.nodes()} == {True}


def test_a_driver_that_breaks_the_protocol_loses_its_own_work_only(cluster: ClusterFile) -> None:
    bad = enter(cluster)
    held = ray.put(b"x" * 200_000)
    with socket.socket(fileno=os.dup(bad.fileno())) as sock:
        sock.sendall((5).to_bytes(4, "little") + b"\0\xc1\xc1\xc1\xc1\xc1")
    with pytest.raises(ConnectionError):
        while True:
            bad.receive()
    bad.close()
    assert ray.get(held) == b"x" * 200_000
    assert ray.get(add.remote(1, 2)) == 3
