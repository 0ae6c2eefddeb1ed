"""What a node process is told by whoever starts it: one line of JSON on its standard input."""

import msgspec

from trio_ray.runtime.core.messages import Address


class NodeSettings(msgspec.Struct, kw_only=True):
    """A node's settings, complete: the launcher has filled in every default."""

    node: Address
    session_dir: str
    """The node's own folder, which only the user may enter: its Unix socket, its logs."""
    secret: str
    """The cluster's secret, in hexadecimal."""
    resources: dict[str, float]
    labels: dict[str, str] = {}
    store_bytes: int
    head: str = ""
    """Where the head listens (``tcp://host:port``); empty for the head itself."""
    host: str = "127.0.0.1"
    """What to listen on."""
    advertise: str = ""
    """The host name or address by which others reach it; empty: found out."""
    port: int = 0
    """For other nodes and remote drivers; 0: any free one."""
    ws_port: int = -1
    """For drivers over WebSocket; 0: any free one, -1: none."""
    insecure: bool = False
    """Whether listening beyond loopback without TLS is allowed."""
    policy: str = "bottom-up"
    """Of the head; other nodes take the head's."""
    shards: int = 1
    """Of the control store, all on the head; other nodes are told by the head."""
    prestart: int = -1
    seed: int = 0
    remove: str = ""
    """A folder to remove at the end: that of a cluster that ends with this node."""
    record: str = ""
    """A file to record every step of this node's machines in."""
    detached: bool = False
    """Whether to go on when the standard input is closed (else: end, for the launcher is gone)."""
    ready_fd: int = 1
    """Where to write the line that says that the node is up (``Ready``)."""
    sys_path: list[str] = []
    """Put in front of the workers' module search path."""
    heartbeat_s: float = 0.1
    cancel_grace_s: float = 2.0
    infeasible_timeout_s: float = 1.0


class Ready(msgspec.Struct, kw_only=True):
    """A node is up, or why it is not."""

    node: Address = ""
    pid: int = 0
    unix: str = ""
    tcp: str = ""
    ws: str = ""
    error: str = ""
