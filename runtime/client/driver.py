"""This process as a driver: the one cluster it is part of, how it enters and how it leaves."""

import atexit
import os
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from trio_ray.runtime.api import context, refs
from trio_ray.runtime.api.errors import AuthenticationError
from trio_ray.runtime.api.session import Session
from trio_ray.runtime.api.waiting import SessionWaiting

if TYPE_CHECKING:
    # Imported by ``init`` and the like, so that a program that only declares remote functions starts fast.
    from trio_ray.runtime.client.find import Place
    from trio_ray.runtime.launch.local import LocalCluster


class Connection(Protocol):
    """What a driver needs of its connection itself; all else goes through the session."""

    def start_pump(self) -> None:
        """Let a thread send and read what the program's threads do not."""

    def close(self) -> None:
        """Leave the node."""

    def abandon(self) -> None:
        """In a forked child: forget the connection without ending it."""


class Driver:
    """The process's part in a cluster, and what it started for it."""

    def __init__(
        self, session: Session, connection: Connection, cluster: "LocalCluster | None", place: "Place"
    ) -> None:
        self.session = session
        self.connection = connection
        self.cluster = cluster
        self.place = place
        self.pid = os.getpid()

    def enter(self) -> None:
        """Make this the process's session: from now on calls and references are its."""
        global _driver
        _driver = self
        refs.bind(self.session.core)
        refs.wait_with(SessionWaiting())
        context.set_process(self.session.root)

    def leave(self) -> None:
        """End the session, and the cluster if this process started it."""
        global _driver
        if _driver is self:
            _driver = None
            context.set_process(None)
            refs.unbind()
        if self.pid == os.getpid():
            try:
                self.connection.close()
            finally:
                if self.cluster is not None:
                    self.cluster.stop()


_driver: Driver | None = None


class ClientContext(Mapping[str, Any]):
    """What ``init`` returns: facts about the cluster; as a context manager it shuts down at the end of the block."""

    def __init__(self, driver: Driver) -> None:
        session = driver.session
        self.address_info: dict[str, Any] = {
            "address": driver.place.shown.removeprefix("tcp://"),
            "gcs_address": driver.place.shown.removeprefix("tcp://"),
            "node_id": session.link.node,
            "job_id": session.link.process,
            "session_dir": str(driver.cluster.folder) if driver.cluster is not None else "",
            "webui_url": "",
        }
        self.dashboard_url = ""

    def __getitem__(self, key: str) -> Any:
        return self.address_info[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.address_info)

    def __len__(self) -> int:
        return len(self.address_info)

    def __enter__(self) -> "ClientContext":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        shutdown()

    def disconnect(self) -> None:
        """The same as ``shutdown``."""
        shutdown()

    def __repr__(self) -> str:
        return f"ClientContext({self.address_info['address']})"


MIN_STORE_BYTES = 1 << 20


def driver_paths() -> list[str]:
    """Where workers are to look for modules as this process does: the script's directory, added paths."""
    return [str(Path(entry or ".").absolute()) for entry in sys.path if Path(entry or ".").is_dir()]


def cluster_options(
    *, num_cpus: float | None = None, num_gpus: float | None = None, resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None, object_store_memory: int | None = None, nodes: int = 1,
    policy: str = "bottom-up",
) -> dict[str, Any]:  # fmt: skip
    """Arguments of ``LocalCluster.begin`` for what users say. Raises ValueError with a sentence."""
    for name, amount in {"num_cpus": num_cpus, "num_gpus": num_gpus, **(resources or {})}.items():
        if amount is not None and (isinstance(amount, bool) or not isinstance(amount, (int, float)) or amount < 0):
            raise ValueError(f"{name} is a number of zero or more, not {amount!r}")
    if isinstance(nodes, bool) or not isinstance(nodes, int) or nodes < 1:
        raise ValueError(f"nodes is a whole number of one or more, not {nodes!r}")
    if object_store_memory is not None and not object_store_memory >= MIN_STORE_BYTES:
        raise ValueError(
            f"object_store_memory is the bytes of each node's object store, at least {MIN_STORE_BYTES:,}, not "
            f"{object_store_memory!r}; leave it out for a share of this machine's memory"
        )
    for name, label in (labels or {}).items():
        if not isinstance(name, str) or not isinstance(label, str):
            raise ValueError(f"labels are strings by name, which {name!r}: {label!r} is not")
    if not isinstance(policy, str):
        raise ValueError(f"policy is the name of a scheduling policy, or 'module:Class', not {policy!r}")
    amounts: dict[str, float] = {name: float(amount) for name, amount in (resources or {}).items()}
    amounts["CPU"] = float(num_cpus if num_cpus is not None else os.cpu_count() or 1)
    if num_gpus:
        amounts["GPU"] = float(num_gpus)
    return {
        "nodes": nodes, "resources": amounts, "labels": dict(labels or {}),
        "store_bytes": None if object_store_memory is None else int(object_store_memory),
        "policy": policy, "sys_path": driver_paths(),
    }  # fmt: skip


def connect_to(place: "Place", cluster: "LocalCluster | None", namespace: str) -> Driver:
    """Enter a cluster, from a plain thread. Raises ConnectionError and AuthenticationError with a sentence."""
    from trio_ray.runtime.client.sync import SyncConnection, connect
    from trio_ray.runtime.transport import handshake
    from trio_ray.runtime.transport.handshake import Hello

    hello = Hello("driver", os.getpid(), shares_memory=place.address.startswith("unix:"))
    try:
        if place.address.startswith("ws"):
            from trio_ray.runtime.client.trio_link import BackgroundTrio, RemoteSession

            background = BackgroundTrio(place.address, place.secret, hello)
            return Driver(RemoteSession(background.connection, namespace=namespace), background, cluster, place)
        connection = connect(SyncConnection, place.address, place.secret, hello)
    except handshake.AuthenticationError as error:
        raise AuthenticationError(f"{place.shown}: {error}") from None
    return Driver(Session(connection, namespace=namespace), connection, cluster, place)


def init(
    address: str | None = None, *, num_cpus: float | None = None, num_gpus: float | None = None,
    resources: Mapping[str, float] | None = None, labels: Mapping[str, str] | None = None,
    object_store_memory: int | None = None, namespace: str | None = None, ignore_reinit_error: bool = False,
    nodes: int = 1, policy: str = "bottom-up", runtime_env: Mapping[str, Any] | None = None, **accepted: Any,
) -> ClientContext:  # fmt: skip
    """Make this process a driver, of a cluster of its own or of the one at ``address``.

    ``address``: None (or ``"local"``) starts a local cluster of ``nodes`` nodes with these resources each;
    ``"auto"`` finds a running one of this machine; ``host:port``, ``tcp://…`` or ``ws://…`` name one. The environment
    variable TRIO_RAY_ADDRESS stands in for None. Further arguments of Ray's ``init`` (dashboard, logging,
    ``_system_config``) are accepted and mean nothing here.

    Raises RuntimeError when it was called before (unless ``ignore_reinit_error``), ConnectionError when no cluster
    answers, ``AuthenticationError`` when the secret is another cluster's.
    """
    known = context.current_or_none()
    if known is not None:
        if ignore_reinit_error and _driver is not None:
            return ClientContext(_driver)
        raise RuntimeError(
            "trio_ray.init() was called in a process that is part of a cluster already; call shutdown() first, or pass "
            "ignore_reinit_error=True"
        )
    if runtime_env:
        raise ValueError("runtime_env is not available in this version; call init() without it")
    from trio_ray.runtime.client.find import ADDRESS_VARIABLE, Place, find

    if address is None:
        address = os.environ.get(ADDRESS_VARIABLE) or None
    cluster = None
    if address is None or address == "local":
        options = cluster_options(
            num_cpus=num_cpus, num_gpus=num_gpus, resources=resources, labels=labels,
            object_store_memory=object_store_memory, nodes=nodes, policy=policy,
        )  # fmt: skip
        from trio_ray.runtime.launch.local import LocalCluster

        cluster = LocalCluster.begin(**options)
        for name in ("trio_ray.runtime.client.sync", "cloudpickle"):
            import_module(name)  # needed next; the head takes longer to start
        head = cluster.finish().head
        place = Place(head.unix, bytes.fromhex(cluster.secret), head.tcp)
    else:
        own = {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources, "labels": labels,
               "object_store_memory": object_store_memory}  # fmt: skip
        given = [name for name, value in own.items() if value is not None]
        if given:
            raise ValueError(
                f"{', '.join(given)}: these describe a cluster that init() starts, but it is to join the one at "
                f"{address}; leave them out, or the address"
            )
        place = find(address)
    try:
        driver = connect_to(place, cluster, namespace or "default")
    except BaseException:
        if cluster is not None:
            cluster.stop()
        raise
    driver.enter()
    driver.connection.start_pump()
    return ClientContext(driver)


def shutdown() -> None:
    """Leave the cluster, and end it if this process started it. Nothing happens when there is none."""
    if _driver is not None:
        _driver.leave()


def is_initialized() -> bool:
    """Whether this process is part of a cluster."""
    return context.current_or_none() is not None


def _forget_after_fork() -> None:
    """A forked child has no connection of its own; what it inherited is the parent's."""
    global _driver
    if _driver is not None:
        _driver.connection.abandon()
        _driver = None
        context.set_process(None)
        refs.unbind()


atexit.register(shutdown)
os.register_at_fork(after_in_child=_forget_after_fork)
context.initialize_with(lambda: (init(), None)[1])
