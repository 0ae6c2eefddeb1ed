"""Node processes: how they start, whom they let in, and that nothing is left of them, however they end."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import trio

from tests.runtime.processes import ask, enter, eventually, everything, processes
from trio_ray.runtime.core.messages import NodesChanged, Query
from trio_ray.runtime.launch import local
from trio_ray.runtime.launch.local import LocalCluster, StartError
from trio_ray.runtime.transport.blocking import BlockingLink
from trio_ray.runtime.transport.frames import MAX_CONTROL_BYTES, control_frame, data_header
from trio_ray.runtime.transport.handshake import AuthenticationError, Hello
from trio_ray.runtime.transport.links import dial

STORE = 64 << 20


def start(**options: object) -> LocalCluster:
    cluster = LocalCluster.begin(store_bytes=STORE, resources={"CPU": 2.0}, **options)  # type: ignore[arg-type]
    cluster.finish()
    return cluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    with start(log=True, ws_port=0) as cluster:
        yield cluster


def log(cluster: LocalCluster) -> str:
    return (cluster.folder / cluster.file.head.node.removeprefix("n:") / "node.log").read_text()


# -- who is let in -----------------------------------------------------------------------------------------------


def test_a_driver_enters_by_unix_socket_and_by_tcp(cluster: LocalCluster) -> None:
    near, far = enter(cluster.file), enter(cluster.file, cluster.file.head.tcp)
    assert near.welcome.process != far.welcome.process
    assert Path(near.welcome.arena_path).stat().st_size == STORE
    assert not far.welcome.arena_path  # it may be on another machine
    for link in (near, far):
        assert len(ask(link, "nodes")) == 1  # type: ignore[arg-type]
        link.close()


@pytest.mark.parametrize("way", ["unix", "tcp"])
def test_a_wrong_secret_is_told_on_both_sides(cluster: LocalCluster, way: str) -> None:
    other = enter(cluster.file)
    before = log(cluster).count("refused")
    with pytest.raises(AuthenticationError, match="use the secret file of the same cluster"):
        BlockingLink.connect(getattr(cluster.file.head, way), b"wrong" * 7, Hello("driver"))
    eventually(lambda: log(cluster).count("refused") == before + 1)
    assert "secret" in log(cluster).splitlines()[-1]
    assert ask(other, "nodes")
    other.close()


async def test_a_wrong_secret_is_told_over_websocket(cluster: LocalCluster) -> None:
    before = log(cluster).count("refused")
    with pytest.raises(AuthenticationError, match="secret"):
        async with dial(cluster.file.head.ws, b"wrong" * 7, Hello("driver", shares_memory=False)):
            raise AssertionError
    await trio.to_thread.run_sync(lambda: eventually(lambda: log(cluster).count("refused") > before))
    assert "secret" in log(cluster).splitlines()[-1]
    secret = bytes.fromhex(cluster.file.secret)
    async with dial(cluster.file.head.ws, secret, Hello("driver", shares_memory=False)) as (_, welcome):
        assert welcome.process.startswith(cluster.file.head.node)


def raw(address: str) -> socket.socket:
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    return socket.create_connection((host, int(port)), 10)


def is_closed(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\xff\xff\xff\xff\x00",
        control_frame(b"\xc1"),
        control_frame(msgspec.msgpack.encode({"type": "Accepted", "welcome": {"process": "", "node": ""}})),
        data_header(1, 0, 10) + b"0123456789",
    ],
    ids=["http", "oversized", "no msgpack", "out of turn", "data"],
)
def test_strangers_are_shown_the_door(cluster: LocalCluster, garbage: bytes) -> None:
    other = enter(cluster.file)
    with raw(cluster.file.head.tcp) as stranger:
        stranger.sendall(garbage)
        assert is_closed(stranger)
    assert ask(other, "nodes")
    other.close()


def test_strangers_are_shown_the_door_at_the_websocket(cluster: LocalCluster) -> None:
    other = enter(cluster.file)
    with raw(cluster.file.head.ws.removeprefix("ws://")) as stranger:
        stranger.sendall(b"\x00\x01 nothing like HTTP \r\n\r\n")
        assert is_closed(stranger)
    assert ask(other, "nodes")
    other.close()


@pytest.mark.parametrize(
    "frame",
    [
        control_frame(b"\xc1\xc1"),
        control_frame(msgspec.msgpack.encode([["NoSuchMessage", 1]])),
        control_frame(msgspec.msgpack.encode([NodesChanged([])])),
        (MAX_CONTROL_BYTES + 1).to_bytes(4, "little") + b"\x00",
        b"\x05\x00\x00\x00\x09hello",
    ],
    ids=["no msgpack", "no message", "not a process's message", "oversized", "no such kind"],
)
def test_a_broken_link_harms_no_other(cluster: LocalCluster, frame: bytes) -> None:
    other, bad = enter(cluster.file), enter(cluster.file)
    with socket.socket(fileno=os.dup(bad.fileno())) as sock:
        sock.sendall(frame)
    with pytest.raises(ConnectionError):
        while True:
            bad.receive()
    bad.close()
    assert "it broke the protocol" in log(cluster)
    assert ask(other, "nodes")
    other.close()


def test_data_nobody_asked_for_is_dropped(cluster: LocalCluster) -> None:
    link = enter(cluster.file)
    link.send_data(12345, 0, memoryview(b"x" * 100_000))
    assert ask(link, "nodes")
    link.close()


def test_the_secret_is_the_users_alone(cluster: LocalCluster) -> None:
    assert local.secret_file(cluster.file).stat().st_mode & 0o777 == 0o600
    assert (cluster.folder / "cluster.json").stat().st_mode & 0o777 == 0o600
    assert cluster.folder.stat().st_mode & 0o777 == 0o700
    assert local.secret_file(cluster.file).read_text() == cluster.file.secret


# -- starting ----------------------------------------------------------------------------------------------------


def test_clusters_are_found_by_name_and_address(cluster: LocalCluster) -> None:
    head = cluster.file.head
    plain = head.tcp.removeprefix("tcp://")
    for name in (cluster.name, head.tcp, plain, plain.replace("127.0.0.1", "localhost"), head.ws):
        assert local.find(name) == cluster.file
    assert local.find("127.0.0.1:1") is None


def test_a_taken_port_is_a_sentence(cluster: LocalCluster) -> None:
    port = int(cluster.file.head.tcp.rpartition(":")[2])
    with pytest.raises(StartError, match=f"cannot listen on 127.0.0.1:{port}.*choose another port"):
        start(port=port, log=True)


def test_an_unknown_policy_is_a_sentence() -> None:
    with pytest.raises(StartError, match="no-such-policy"):
        start(policy="no-such-policy", log=True)


def test_listening_to_the_world_must_be_asked_for() -> None:
    with pytest.raises(StartError, match="without encryption"):
        start(host="0.0.0.0", log=True)
    with start(host="0.0.0.0", insecure=True, log=True) as cluster:
        assert "0.0.0.0" not in cluster.file.head.tcp
        link = enter(cluster.file, cluster.file.head.tcp)
        assert ask(link, "nodes")
        link.close()


def test_a_node_joins_a_cluster_that_runs_elsewhere(cluster: LocalCluster) -> None:
    link = enter(cluster.file)
    with LocalCluster.join(
        cluster.file.head.tcp, cluster.file.secret, resources={"CPU": 1.0}, store_bytes=STORE, log=True
    ) as joined:
        assert joined.file.head.tcp == cluster.file.head.tcp
        eventually(lambda: len(ask(link, "nodes")) == 2)  # type: ignore[arg-type]
        through = enter(joined.file)
        assert through.welcome.node == joined.file.nodes[0].node
        through.close()
    eventually(lambda: sum(node["alive"] for node in ask(link, "nodes")) == 1)  # type: ignore[attr-defined]
    link.close()


def test_joining_with_a_wrong_secret_is_a_sentence(cluster: LocalCluster) -> None:
    with pytest.raises(StartError, match="secret"):
        LocalCluster.join(cluster.file.head.tcp, "00" * 32, store_bytes=STORE, log=True)
    assert local.find(cluster.name) is not None


def test_joining_nobody_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(StartError, match=f"no cluster answers at tcp://127.0.0.1:{port}"):
        LocalCluster.join(f"tcp://127.0.0.1:{port}", "00" * 32, store_bytes=STORE, log=True)


def test_a_policy_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "my_own_policy.py").write_text(
        "from trio_ray.runtime.core.scheduling.policies import BottomUp\n\n\nclass Mine(BottomUp):\n    pass\n"
    )
    with start(policy="my_own_policy:Mine", sys_path=[str(tmp_path)], nodes=2, log=True) as cluster:
        assert len(cluster.file.nodes) == 2


# -- ending ------------------------------------------------------------------------------------------------------


def workers_are_up(cluster: LocalCluster, count: int) -> None:
    """``count`` workers and the template and the node itself, for each node."""
    eventually(lambda: all(len(processes(node.node)) == count + 2 for node in cluster.file.nodes))


def test_stopping_leaves_nothing() -> None:
    cluster = start(nodes=2, log=True)
    workers_are_up(cluster, 2)
    cluster.stop()
    assert not cluster.folder.exists()
    eventually(lambda: not everything(cluster.file))


def test_a_killed_node_takes_its_workers_along() -> None:
    with start(log=True) as cluster:
        workers_are_up(cluster, 2)
        os.kill(cluster.file.head.pid, signal.SIGKILL)
        eventually(lambda: not everything(cluster.file))


def test_without_the_head_the_others_end() -> None:
    with start(nodes=3, log=True) as cluster:
        workers_are_up(cluster, 2)
        os.kill(cluster.file.head.pid, signal.SIGKILL)
        eventually(lambda: not everything(cluster.file))


def test_without_its_template_a_node_ends() -> None:
    with start(log=True) as cluster:
        workers_are_up(cluster, 2)
        head = cluster.file.head.pid
        (template,) = (pid for pid in processes(cluster.file.head.node) if parent(pid) == head)
        os.kill(template, signal.SIGKILL)
        eventually(lambda: not everything(cluster.file))


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_a_worker_that_dies_harms_nobody() -> None:
    with start(log=True) as cluster:
        workers_are_up(cluster, 2)
        link = enter(cluster.file)
        eventually(lambda: ask(link, "node")["workers"] == 2)  # type: ignore[index]
        mine = (os.getpid(), cluster.file.head.pid)
        (worker, *_) = (pid for pid in processes(cluster.file.head.node) if parent(pid) not in mine)
        os.kill(worker, signal.SIGKILL)
        eventually(lambda: worker not in processes(cluster.file.head.node))
        assert ask(link, "nodes")
        link.close()


DRIVER = """
import subprocess, sys, time
import trio_ray

trio_ray.init(num_cpus=2, nodes=2, object_store_memory=64 << 20)

@trio_ray.remote
def hang():
    child = subprocess.Popen(["sleep", "600"])
    print("child", child.pid, flush=True)
    time.sleep(600)

ref = hang.remote()
from trio_ray.runtime.client import driver
cluster = driver._driver.cluster
print("cluster", cluster.name, *(node.node for node in cluster.file.nodes), flush=True)
trio_ray.get(ref)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_ends_leaves_nothing(how: signal.Signals) -> None:
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert driver.stdout is not None
    lines = sorted([driver.stdout.readline().split(), driver.stdout.readline().split()])
    (_, child), (_, name, *nodes) = lines
    driver.send_signal(how)
    driver.communicate(timeout=20)
    assert driver.returncode != 0
    eventually(lambda: not any(processes(node) for node in nodes))
    eventually(lambda: not local.is_alive(int(child)))
    eventually(lambda: not (local.runtime_root() / name).exists())


def test_a_background_cluster_outlives_its_launcher() -> None:
    program = (
        "from trio_ray.runtime.launch.local import LocalCluster\n"
        f"print(LocalCluster.begin(nodes=2, store_bytes={STORE}, detached=True, log=True).finish().name)"
    )
    name = subprocess.run(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True, timeout=30,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    ).stdout.strip()  # fmt: skip
    file = local.find(name)
    assert file is not None
    link = enter(file)
    eventually(lambda: len(ask(link, "nodes")) == 2)  # type: ignore[arg-type]
    link.close()
    local.stop_cluster(file)
    assert not everything(file)
    assert local.find(name) is None


def test_folders_of_dead_clusters_are_swept() -> None:
    cluster = start(log=True)
    os.kill(cluster.file.head.pid, signal.SIGKILL)
    eventually(lambda: not everything(cluster.file))
    assert cluster.folder.exists()
    local.sweep()
    assert not cluster.folder.exists()
    cluster.stop()


def test_a_peer_that_does_not_read_is_not_read_for_it(cluster: LocalCluster) -> None:
    """Questions without end, answers never taken: others are served all the same."""
    flood, other = enter(cluster.file), enter(cluster.file)
    stop = threading.Event()

    def ask_on() -> None:
        with pytest.raises(ConnectionError):
            while not stop.is_set():
                flood.send([Query(1, "node")] * 100)
        stop.set()

    thread = threading.Thread(target=ask_on)
    thread.start()
    try:
        for _ in range(20):
            assert ask(other, "nodes")
    finally:
        stop.set()
        flood.close()
        thread.join()
        other.close()


def test_a_process_number_that_was_given_away_is_nobodys(cluster: LocalCluster) -> None:
    stranger = msgspec.structs.replace(cluster.file.head, pid=os.getpid())
    assert local.runs(cluster.file.head) and not local.runs(stranger)
    local.stop_cluster(msgspec.structs.replace(cluster.file, name="no-such-folder", nodes=[stranger]))
    assert local.runs(cluster.file.head)
