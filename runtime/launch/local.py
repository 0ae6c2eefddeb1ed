"""Clusters on this machine: node processes started, found again, stopped, and swept up after a crash.

Without Trio and without delay: ``init()`` starts a head through this and connects to it, so every import counts.
"""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

import msgspec

from trio_ray.runtime.node.settings import NodeSettings, Ready

START_LIMIT_S = 30.0
STOP_LIMIT_S = 3.0
"""After so long a node that was asked to end is killed."""
SECRET_BYTES = 32
STORE_SHARE = 0.3
"""Of this machine's shared memory, for the object stores of a cluster's nodes together."""
MAX_STORE_BYTES = 64 << 30


class StartError(RuntimeError):
    """A cluster, or a node, did not start; the text says why."""


class NodeProcess(msgspec.Struct, kw_only=True):
    """A running node process."""

    node: str
    pid: int
    unix: str
    tcp: str
    ws: str = ""
    resources: dict[str, float] = {}


class ClusterFile(msgspec.Struct, kw_only=True):
    """What is known of a cluster of this machine; kept in its folder, readable by its user only."""

    name: str
    secret: str
    head: NodeProcess
    nodes: list[NodeProcess]
    """All nodes that run on this machine, the head first if it does."""
    started_at: float
    policy: str = "bottom-up"
    detached: bool = False


def runtime_root() -> Path:
    """The folder of this user's clusters, which nobody else may enter. Raises StartError if somebody else owns it."""
    base = os.environ.get("XDG_RUNTIME_DIR")
    root = Path(base) / "trio-ray" if base else Path(tempfile.gettempdir()) / f"trio-ray-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = root.stat()
    if status.st_uid != os.getuid():
        raise StartError(f"{root} belongs to another user; set XDG_RUNTIME_DIR to a folder of your own")
    if status.st_mode & 0o077:
        root.chmod(0o700)
    return root


def default_store_bytes(nodes: int) -> int:
    """The object store of each of ``nodes`` nodes on this machine: memory is shared among them."""
    status = os.statvfs("/dev/shm") if Path("/dev/shm").exists() else os.statvfs("/tmp")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = min(memory, status.f_frsize * status.f_blocks)
    return min(int(available * STORE_SHARE / nodes), MAX_STORE_BYTES)


class LocalNode:
    """A node process that this process started, and its lifeline: it ends when this process does."""

    def __init__(self, process: "subprocess.Popen[bytes]", ready: IO[bytes], settings: NodeSettings) -> None:
        self._process = process
        self._ready = ready
        self.settings = settings

    def wait_ready(self, deadline: float) -> NodeProcess:
        """Block until the node is up. Raises StartError with what it said."""
        import select

        with self._ready as ready:
            readable, _, _ = select.select([ready], [], [], max(0.0, deadline - time.monotonic()))
            line = ready.readline() if readable else b""
        if not line:
            code = self._process.poll()
            self.stop()
            why = f"it took longer than {START_LIMIT_S:.0f} s" if code is None else f"it ended with exit code {code}"
            raise StartError(f"the node {self.settings.node} did not start: {why}; see its log in {self.log_dir}")
        said = msgspec.json.decode(line, type=Ready)
        if said.error:
            self.stop()
            raise StartError(f"the node {self.settings.node} did not start: {said.error}")
        return NodeProcess(
            node=said.node, pid=said.pid, unix=said.unix, tcp=said.tcp, ws=said.ws, resources=self.settings.resources
        )

    @property
    def log_dir(self) -> Path:
        """Where it logs."""
        return Path(self.settings.session_dir)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def ask_to_stop(self) -> None:
        """Ask it to end; returns at once."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        if self._process.poll() is None:
            self._process.terminate()

    def stop(self, limit_s: float = STOP_LIMIT_S) -> None:
        """End it, and kill it if it does not within ``limit_s`` seconds."""
        self.ask_to_stop()
        try:
            self._process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def start_node(settings: NodeSettings, *, log: bool) -> LocalNode:
    """Start a node process. With ``log`` it writes to files in its folder, else where this process does."""
    folder = Path(settings.session_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    read, write = os.pipe()
    settings.ready_fd = write
    output = (folder / "node.log").open("ab") if log else None
    try:
        process = subprocess.Popen(
            [sys.executable, "-m", "trio_ray.runtime.node"],
            stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=(write,), start_new_session=True,
            env=_environment(),
        )  # fmt: skip
    finally:
        os.close(write)
        if output is not None:
            output.close()
    node = LocalNode(process, os.fdopen(read, "rb"), settings)
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        process.stdin.flush()
        if settings.detached:
            process.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once: ``wait_ready`` says why
    return node


def _environment() -> dict[str, str]:
    """Ours, with a module search path that finds this very package."""
    root = str(Path(__file__).absolute().parents[3])
    known = os.environ.get("PYTHONPATH", "")
    return {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{known}" if known else root}


def new_node_settings(folder: Path, secret: str, **fields: object) -> NodeSettings:
    """Settings of a node with a fresh name and a folder of its own below ``folder``."""
    name = secrets.token_hex(4)
    settings = {"node": f"n:{name}", "session_dir": str(folder / name), "secret": secret, **fields}
    return msgspec.convert(settings, NodeSettings)


class LocalCluster:
    """A head and further nodes on this machine, started by this process.

    ``start`` and ``stop`` may be called from any thread; as a context manager it stops at the end of the block.
    """

    def __init__(self, name: str, folder: Path, secret: str, *, log: bool, detached: bool) -> None:
        self.name = name
        self.folder = folder
        self.secret = secret
        self._log = log
        self._detached = detached
        self._nodes: list[LocalNode] = []
        self.file: ClusterFile
        self._common: dict[str, object] = {}

    @classmethod
    def begin(
        cls, *, nodes: int = 1, resources: dict[str, float] | None = None, labels: dict[str, str] | None = None,
        store_bytes: int | None = None, policy: str = "bottom-up", host: str = "127.0.0.1", port: int = 0,
        ws_port: int = -1, insecure: bool = False, shards: int = 1, seed: int = 0, record: str = "",
        detached: bool = False, log: bool = False, sys_path: list[str] | None = None, prestart: int = -1,
        infeasible_timeout_s: float = 1.0, cancel_grace_s: float = 2.0,
    ) -> "LocalCluster":  # fmt: skip
        """Start the head's process, and answer before it is up: ``finish`` waits for it and starts the others.

        Raises StartError.
        """
        sweep()
        name = f"c-{secrets.token_hex(4)}"
        folder = runtime_root() / name
        folder.mkdir(mode=0o700)
        secret = secrets.token_hex(SECRET_BYTES)
        cluster = cls(name, folder, secret, log=log, detached=detached)
        (folder / "owner").write_text(str(os.getpid()))
        cluster._common = {
            "resources": resources if resources is not None else {"CPU": float(os.cpu_count() or 1)},
            "labels": labels or {},
            "store_bytes": store_bytes or default_store_bytes(nodes),
            "policy": policy, "host": host, "insecure": insecure, "shards": shards, "seed": seed, "detached": detached,
            "sys_path": sys_path or [], "prestart": prestart, "infeasible_timeout_s": infeasible_timeout_s,
            "cancel_grace_s": cancel_grace_s,
        }  # fmt: skip
        head = new_node_settings(
            folder, secret, **cluster._common, port=port, ws_port=ws_port, record=record
        )
        cluster._wanted = nodes
        cluster._nodes.append(start_node(head, log=log))
        return cluster

    _wanted: int = 1

    def finish(self) -> ClusterFile:
        """Wait for the head, start the other nodes, wait for those. Raises StartError, after stopping everything."""
        deadline = time.monotonic() + START_LIMIT_S
        try:
            head = self._nodes[0].wait_ready(deadline)
            self.file = ClusterFile(
                name=self.name, secret=self.secret, head=head, nodes=[head], started_at=time.time(),
                policy=str(self._common["policy"]), detached=self._detached,
            )  # fmt: skip
            self.file.nodes += self._start_more(self._wanted - 1, deadline)
        except BaseException:
            self.stop()
            raise
        self._save()
        return self.file

    def _start_more(self, count: int, deadline: float) -> list[NodeProcess]:
        started = []
        for index in range(count):
            settings = new_node_settings(
                self.folder, self.secret, **{**self._common, "seed": index + 1}, head=self.file.head.tcp
            )
            started.append(start_node(settings, log=self._log))
            self._nodes.append(started[-1])
        return [node.wait_ready(deadline) for node in started]

    def add_node(self, **fields: object) -> NodeProcess:
        """Start one more node; ``fields`` of ``NodeSettings`` replace the cluster's. Raises StartError."""
        settings = new_node_settings(self.folder, self.secret, **{**self._common, **fields}, head=self.file.head.tcp)
        node = start_node(settings, log=self._log)
        self._nodes.append(node)
        process = node.wait_ready(time.monotonic() + START_LIMIT_S)
        self.file.nodes.append(process)
        self._save()
        return process

    def remove_node(self, node: str, *, kill: bool = False) -> None:
        """End one node, politely or at once. Raises KeyError for a node that is not of this cluster."""
        found = next((local for local in self._nodes if local.settings.node == node), None)
        if found is None:
            raise KeyError(node)
        self._nodes.remove(found)
        if kill:
            os.kill(found.pid, signal.SIGKILL)
        found.stop()
        self.file.nodes = [process for process in self.file.nodes if process.node != node]
        self._save()

    def _save(self) -> None:
        save(self.folder, self.file)

    def stop(self) -> None:
        """End every node and remove what the cluster left on disk."""
        for node in reversed(self._nodes):
            node.ask_to_stop()
        deadline = time.monotonic() + STOP_LIMIT_S
        for node in self._nodes:
            node.stop(max(0.01, deadline - time.monotonic()))
        self._nodes.clear()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> "LocalCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def save(folder: Path, file: ClusterFile) -> None:
    """Write a cluster's file, readable by its user only, in one piece."""
    draft = folder / "cluster.json.new"
    draft.touch(mode=0o600)
    draft.write_bytes(msgspec.json.encode(file))
    draft.rename(folder / "cluster.json")


def clusters() -> list[ClusterFile]:
    """The clusters of this user on this machine that are alive, newest first."""
    found = []
    for folder in runtime_root().iterdir():
        try:
            file = msgspec.json.decode((folder / "cluster.json").read_bytes(), type=ClusterFile)
        except (OSError, msgspec.MsgspecError):
            continue
        if any(is_alive(node.pid) for node in file.nodes):
            found.append(file)
    return sorted(found, key=lambda file: -file.started_at)


def find(address: str = "auto") -> ClusterFile | None:
    """The newest cluster, or the one whose head listens at ``address``; None if there is none."""
    for file in clusters():
        known = (file.name, file.head.tcp, file.head.tcp.removeprefix("tcp://"), file.head.ws)
        if address == "auto" or address in known:
            return file
    return None


def stop_cluster(file: ClusterFile, progress: Callable[[str], None] = lambda node: None) -> None:
    """End a background cluster's nodes on this machine, from whatever process started it."""
    for node in reversed(file.nodes):
        _signal(node.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_LIMIT_S
    for node in file.nodes:
        while is_alive(node.pid) and time.monotonic() < deadline:
            time.sleep(0.01)
        if is_alive(node.pid):
            _signal(node.pid, signal.SIGKILL)
        progress(node.node)
    shutil.rmtree(runtime_root() / file.name, ignore_errors=True)


def sweep() -> None:
    """Remove the folders of clusters that are gone without having cleaned up."""
    for folder in runtime_root().iterdir():
        try:
            file = msgspec.json.decode((folder / "cluster.json").read_bytes(), type=ClusterFile)
            dead = not any(is_alive(node.pid) for node in file.nodes)
        except FileNotFoundError:  # it is just being started, or never was
            try:
                dead = not is_alive(int((folder / "owner").read_text()))
            except (OSError, ValueError):
                dead = time.time() - folder.stat().st_mtime > 2 * START_LIMIT_S
        except msgspec.MsgspecError:
            dead = False
        if dead:
            shutil.rmtree(folder, ignore_errors=True)


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _signal(pid: int, number: signal.Signals) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        pass
