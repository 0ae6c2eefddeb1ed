"""The machines of a node process, made from its settings: for the real node, and anew for the replay of a recording."""

import random

from trio_ray.runtime.core.control.store import ControlMachine
from trio_ray.runtime.core.machine import Machine
from trio_ray.runtime.core.messages import PLACEMENT, Address, NodeInfo, control_address
from trio_ray.runtime.core.node import NodeConfig, NodeMachine
from trio_ray.runtime.core.scheduling.placement import PlacementMachine
from trio_ray.runtime.core.scheduling.policies import load
from trio_ray.runtime.core.spec import resources
from trio_ray.runtime.node.settings import NodeSettings


def describe(settings: NodeSettings, address: str) -> NodeInfo:
    """The node as the node table shows it; ``address`` is where its transport listens."""
    labels = tuple(sorted(settings.labels.items()))
    return NodeInfo(settings.node, address, resources(settings.resources), labels, True, settings.store_bytes)


def build(settings: NodeSettings, info: NodeInfo) -> dict[Address, Machine]:
    """Every machine that this process hosts, by address. Raises ValueError for a policy that cannot be loaded."""
    machines: dict[Address, Machine] = {}
    if not settings.head:
        for shard in range(settings.shards):
            machines[control_address(shard)] = ControlMachine(shard, settings.shards)
        machines[PLACEMENT] = PlacementMachine(
            load(settings.policy), shards=settings.shards, rng=random.Random(settings.seed),
            infeasible_timeout_s=settings.infeasible_timeout_s,
        )  # fmt: skip
    config = NodeConfig(
        prestart=settings.prestart, heartbeat_s=settings.heartbeat_s, cancel_grace_s=settings.cancel_grace_s
    )
    machines[settings.node] = NodeMachine(
        info, head_shards=settings.shards, config=config, policy=settings.policy, rng=random.Random(settings.seed),
        load_policy=load,
    )  # fmt: skip
    return machines
