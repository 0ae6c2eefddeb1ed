"""What a simulated cluster is made of: groups of alike nodes, and the links that join them.

A description comes from keyword arguments (``ClusterSpec.uniform``), or from a TOML or JSON file::

    shards = 4                      # control-store shards
    spread_shards = true            # one shard a node, instead of all on the head

    [[groups]]                      # the first node of the first group is the head
    name = "cpu"
    count = 96
    cpus = 32
    latency_s = 0.0001
    bandwidth_bytes_per_s = 1.25e9

    [[groups]]
    name = "gpu"
    count = 4
    cpus = 16
    gpus = 8
    resources = { fast_disk = 1 }
    labels = { zone = "b" }
"""

import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import msgspec

from trio_ray.runtime.core.messages import Address, NodeInfo
from trio_ray.runtime.core.spec import resources

DEFAULT_LATENCY_S = 1e-4
"""One way between two nodes of a data centre, through the kernel's network stack."""
DEFAULT_BANDWIDTH = 1.25e9
"""Bytes per second: 10 Gbit/s."""
DEFAULT_STORE_BYTES = 2 << 30
MAX_NODES = 100_000


class ClusterError(ValueError):
    """A cluster description that cannot be; the sentence says what is wrong with it."""


class NodeGroup(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """``count`` nodes that are alike."""

    name: str = "node"
    """For reports; also the label ``group`` of its nodes."""
    count: int = 1
    cpus: float = 1.0
    gpus: float = 0.0
    memory_bytes: int = 0
    """What tasks may ask for as ``memory``; 0: memory is not counted."""
    store_bytes: int = DEFAULT_STORE_BYTES
    """Size of a node's object store."""
    resources: dict[str, float] = {}
    """Custom resources of each node."""
    labels: dict[str, str] = {}
    latency_s: float = DEFAULT_LATENCY_S
    """One way, between two nodes of this group; between groups the mean of both."""
    bandwidth_bytes_per_s: float = DEFAULT_BANDWIDTH
    """Of each node's link, in each direction."""

    def amounts(self) -> dict[str, float]:
        """All resources of one node by name."""
        named = {"CPU": self.cpus, "GPU": self.gpus, "memory": float(self.memory_bytes)}
        return {**self.resources, **{name: amount for name, amount in named.items() if amount}}


class ClusterSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A whole cluster."""

    groups: tuple[NodeGroup, ...]
    shards: int = 1
    """Control-store shards."""
    spread_shards: bool = False
    """Put shard ``i`` on node ``i`` (modulo the nodes) rather than all of them on the head, as a real cluster does."""

    @classmethod
    def uniform(
        cls, nodes: int = 1, cpus: float = 1.0, gpus: float = 0.0, *, shards: int = 1, spread_shards: bool = False,
        memory_bytes: int = 0, store_bytes: int = DEFAULT_STORE_BYTES, resources: dict[str, float] | None = None,
        labels: dict[str, str] | None = None, latency_s: float = DEFAULT_LATENCY_S,
        bandwidth_bytes_per_s: float = DEFAULT_BANDWIDTH,
    ) -> "ClusterSpec":  # fmt: skip
        """A cluster of ``nodes`` alike nodes. Raises ``ClusterError`` for figures that cannot be."""
        group = NodeGroup(
            count=nodes, cpus=cpus, gpus=gpus, memory_bytes=memory_bytes, store_bytes=store_bytes,
            resources=resources or {}, labels=labels or {}, latency_s=latency_s,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        )  # fmt: skip
        spec = cls(groups=(group,), shards=shards, spread_shards=spread_shards)
        spec.check()
        return spec

    @classmethod
    def load(cls, path: str | Path) -> "ClusterSpec":
        """Read a description. Raises ``ClusterError`` if the file is missing, malformed or describes no cluster."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ClusterError(f"the cluster description {path} cannot be read: {error}") from None
        try:
            plain = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
            spec = msgspec.convert(plain, cls)
        except (ValueError, msgspec.ValidationError) as error:
            kind = "TOML" if path.suffix == ".toml" else "JSON"
            raise ClusterError(f"the cluster description {path} is not valid {kind} of a cluster: {error}") from None
        spec.check()
        return spec

    def check(self) -> None:
        """Raise ``ClusterError`` for figures that cannot be."""
        count = sum(group.count for group in self.groups)
        if not 1 <= count <= MAX_NODES or any(group.count < 1 for group in self.groups):
            raise ClusterError(f"a cluster has 1 to {MAX_NODES:,} nodes, every group at least one; this has {count:,}")
        if self.shards < 1:
            raise ClusterError(f"a cluster has at least one control-store shard, not {self.shards}")
        for group in self.groups:
            for field in ("cpus", "gpus", "memory_bytes", "store_bytes", "latency_s"):
                value = getattr(group, field)
                if not 0 <= value < float("inf"):
                    raise ClusterError(f"group {group.name!r} has {field} = {value}; it must be 0 or more")
            if not group.bandwidth_bytes_per_s > 0:
                raise ClusterError(
                    f"group {group.name!r} has a bandwidth of {group.bandwidth_bytes_per_s} bytes per second; "
                    "it must be more than 0"
                )
            try:
                resources(group.amounts())
            except ValueError as error:
                raise ClusterError(f"group {group.name!r}: {error}") from None

    @property
    def nodes(self) -> int:
        """How many nodes there are."""
        return sum(group.count for group in self.groups)

    def each(self, seed: int = 0) -> Iterator[tuple[NodeInfo, NodeGroup]]:
        """All nodes in joining order, the head first. Their addresses, from which all ids derive, hold the seed."""
        number = 0
        for group in self.groups:
            shape = resources(group.amounts())
            labels = tuple(sorted({"group": group.name, **group.labels}.items()))
            for _ in range(group.count):
                yield NodeInfo(node_address(number, seed), "", shape, labels, True, group.store_bytes), group
                number += 1


def node_address(number: int, seed: int) -> Address:
    """The address of node ``number`` (0: the head)."""
    return f"n:{crc32(b'%d' % seed) & 0xFFFF:04x}{number:05x}"
