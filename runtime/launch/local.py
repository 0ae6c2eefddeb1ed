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
from trio_ray.runtime.transport import addresses

START_LIMIT_S = 30.0
STOP_LIMIT_S = 3.0
"""After so long a node that was asked to end is killed."""
SECRET_BYTES = 32
STORE_SHARE = 0.3
"""Of this machine's memory, for the object stores of a cluster's nodes together; only what is used is taken."""
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
    """The object store of each of ``nodes`` nodes on this machine: a share of its memory, divided among them."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            available = min(available, int(Path(limit).read_text()))
        except (OSError, ValueError):
            pass  # no such limit, or "max"
    return min(int(available * STORE_SHARE / nodes), MAX_STORE_BYTES)


class LocalNode:
    """A node process that this process started, and its lifeline: it ends when this process does."""

    def __init__(
        self, process: "subprocess.Popen[bytes]", ready: IO[bytes], settings: NodeSettings, log: Path | None
    ) -> None:
        self._process = process
        self._ready = ready
        self.settings = settings
        self.log = log
        """The file it logs to; None: it writes where this process does."""

    def wait_ready(self, deadline: float) -> NodeProcess:
        """Block until the node is up. Raises StartError with what it said."""
        import select

        with self._ready as ready:
            readable, _, _ = select.select([ready], [], [], max(0.0, deadline - time.monotonic()))
            line = ready.readline() if readable else b""
        if not line:
            self.stop()
            code = self._process.returncode
            why = f"it ended with exit code {code}" if readable else f"it took longer than {START_LIMIT_S:.0f} s"
            where = f"its log is {self.log}" if self.log is not None else "what it wrote stands above"
            raise StartError(f"the node {self.settings.node} did not start: {why}; {where}")
        said = msgspec.json.decode(line, type=Ready)
        if said.error:
            self.stop()
            raise StartError(f"the node {self.settings.node} did not start: {said.error}")
        return NodeProcess(
            node=said.node, pid=said.pid, unix=said.unix, tcp=said.tcp, ws=said.ws, resources=self.settings.resources
        )

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


PROGRAM = """
import sys
if {root!r} not in sys.path:
    sys.path.append({root!r})
from trio_ray.runtime.node.main import main
main()
"""
"""What a node process runs: this very package, wherever it is, without a change to the environment of the workers."""


def start_node(settings: NodeSettings, *, log: bool) -> LocalNode:
    """Start a node process. With ``log`` it writes to a file in its folder, else where this process does."""
    folder = Path(settings.session_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    file = folder / "node.log" if log else None
    read, write = os.pipe()
    settings.ready_fd = write
    output = file.open("ab") if file is not None else None
    program = PROGRAM.format(root=str(Path(__file__).absolute().parents[3]))
    try:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", program, "trio-ray-node", settings.node],
            stdin=subprocess.PIPE, stdout=output, stderr=output, pass_fds=(write,), start_new_session=True,
        )  # fmt: skip
    except BaseException:
        os.close(read)
        raise
    finally:
        os.close(write)
        if output is not None:
            output.close()
    node = LocalNode(process, os.fdopen(read, "rb"), settings, file)
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(settings) + b"\n")
        process.stdin.flush()
        if settings.detached:
            process.stdin.close()
    except BrokenPipeError:
        pass  # it ended at once: ``wait_ready`` says why
    return node


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
        infeasible_timeout_s: float = 1.0, cancel_grace_s: float = 2.0, secret: str = "",
    ) -> "LocalCluster":  # fmt: skip
        """Start the head's process, and answer before it is up: ``finish`` waits for it and starts the others.

        With ``nodes=0`` nothing is started: nodes of a cluster whose head runs elsewhere are added (see ``join``).
        Raises StartError.
        """
        sweep()
        name = f"c-{secrets.token_hex(4)}"
        folder = runtime_root() / name
        folder.mkdir(mode=0o700)
        secret = secret or secrets.token_hex(SECRET_BYTES)
        cluster = cls(name, folder, secret, log=log, detached=detached)
        (folder / "owner").write_text(str(os.getpid()))
        cluster._common = {
            "resources": resources if resources is not None else {"CPU": float(os.cpu_count() or 1)},
            "labels": labels or {},
            "store_bytes": store_bytes or default_store_bytes(max(nodes, 1)),
            "policy": policy, "host": host, "insecure": insecure, "shards": shards, "seed": seed, "detached": detached,
            "sys_path": sys_path or [], "prestart": prestart, "infeasible_timeout_s": infeasible_timeout_s,
            "cancel_grace_s": cancel_grace_s,
        }  # fmt: skip
        cluster._wanted = nodes
        if nodes:
            remove = "" if log or detached else str(folder)
            try:
                cluster._start(port=port, ws_port=ws_port, record=record, remove=remove)
            except BaseException:
                cluster.stop()
                raise
        return cluster

    _wanted: int = 1

    @classmethod
    def join(
        cls, address: str, secret: str, *, resources: dict[str, float] | None = None,
        labels: dict[str, str] | None = None, store_bytes: int | None = None, host: str = "127.0.0.1", port: int = 0,
        insecure: bool = False, detached: bool = False, log: bool = False, sys_path: list[str] | None = None,
    ) -> "LocalCluster":  # fmt: skip
        """Start a node on this machine that joins the cluster whose head listens at ``address`` (``tcp://…``).

        Drivers of this machine enter the cluster through it. Raises StartError.
        """
        cluster = cls.begin(
            nodes=0, resources=resources, labels=labels, store_bytes=store_bytes, host=host, insecure=insecure,
            detached=detached, log=log, sys_path=sys_path, secret=secret,
        )  # fmt: skip
        try:
            node = cluster._start(head=address, port=port)
            process = node.wait_ready(time.monotonic() + START_LIMIT_S)
        except BaseException:
            cluster.stop()
            raise
        head = NodeProcess(node="", pid=0, unix=process.unix, tcp=address)
        cluster.file = ClusterFile(
            name=cluster.name, secret=secret, head=head, nodes=[process], started_at=time.time(), detached=detached
        )
        cluster._save()
        return cluster

    def _start(self, **fields: object) -> LocalNode:
        settings = new_node_settings(self.folder, self.secret, **{**self._common, **fields})
        self._nodes.append(start_node(settings, log=self._log))
        return self._nodes[-1]

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
        started = [self._start(seed=index + 1, head=self.file.head.tcp) for index in range(count)]
        return [node.wait_ready(deadline) for node in started]

    def add_node(self, **fields: object) -> NodeProcess:
        """Start one more node; ``fields`` of ``NodeSettings`` replace the cluster's. Raises StartError."""
        node = self._start(seed=len(self._nodes), head=self.file.head.tcp, **fields)
        process = node.wait_ready(time.monotonic() + START_LIMIT_S)
        self.file.nodes.append(process)
        self._save()
        return process

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
    """Write a cluster's file and its secret, readable by its user only, each in one piece."""
    for path, content in (
        (folder / "cluster.json", msgspec.json.encode(file)), (secret_file(file), file.secret.encode()),
    ):  # fmt: skip
        draft = path.with_suffix(".new")
        draft.touch(mode=0o600)
        draft.write_bytes(content)
        draft.rename(path)


def secret_file(file: ClusterFile) -> Path:
    """The cluster's secret, in hexadecimal: to be copied to machines from which others join."""
    return runtime_root() / file.name / "secret"


def clusters() -> list[ClusterFile]:
    """The clusters of this user on this machine that are alive: in the background first, those whose head is here
    before nodes that joined one, newest first."""
    found = []
    for folder in runtime_root().iterdir():
        try:
            file = msgspec.json.decode((folder / "cluster.json").read_bytes(), type=ClusterFile)
        except (OSError, msgspec.MsgspecError):
            continue
        if any(runs(node) for node in file.nodes):
            found.append(file)
    return sorted(found, key=lambda file: (not file.detached, not file.head.pid, -file.started_at))


def find(address: str = "auto") -> ClusterFile | None:
    """The newest background cluster (else the newest), or that of this name, or whose head listens at ``address``."""
    alive = clusters()
    for file in alive:
        if address in ("auto", file.name):
            return file
    try:
        wanted = _canonical(address)
    except ValueError:
        return None
    for file in alive:
        if wanted in [_canonical(known) for known in (file.head.tcp, file.head.ws) if known]:
            return file
    return None


def _canonical(address: str) -> addresses.Endpoint:
    where = addresses.parse(address)
    return where._replace(host="127.0.0.1") if addresses.is_loopback(where.host) else where


def stop_cluster(file: ClusterFile, progress: Callable[[str], None] = lambda node: None) -> None:
    """End a background cluster's nodes on this machine, from whatever process started it."""
    for node in reversed(file.nodes):
        _signal(node, signal.SIGTERM)
    deadline = time.monotonic() + STOP_LIMIT_S
    for node in file.nodes:
        while runs(node) and time.monotonic() < deadline:
            time.sleep(0.01)
        _signal(node, signal.SIGKILL)
        progress(node.node)
    shutil.rmtree(runtime_root() / file.name, ignore_errors=True)


def sweep() -> None:
    """Remove the folders of clusters that are gone without having cleaned up."""
    for folder in runtime_root().iterdir():
        try:
            file = msgspec.json.decode((folder / "cluster.json").read_bytes(), type=ClusterFile)
            dead = not any(runs(node) for node in file.nodes)
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


def runs(node: NodeProcess) -> bool:
    """Whether the node's process runs, and its number is not some other process's by now."""
    try:
        return node.node.encode() in Path(f"/proc/{node.pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False


def _signal(node: NodeProcess, number: signal.Signals) -> None:
    if runs(node):
        try:
            os.kill(node.pid, number)
        except ProcessLookupError:
            pass
