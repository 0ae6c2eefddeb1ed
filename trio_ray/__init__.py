"""trio-ray: remote functions and actors over a cluster, by Ray's names and in Trio's style.

``import trio_ray as ray`` runs a Ray program. Under Trio, ``trio_ray.open_cluster()`` and ``trio_ray.connect()`` give a
``Cluster`` whose nurseries no task outlives. ``trio_ray.simulate`` runs the same programs on a modelled cluster.
"""

from typing import TYPE_CHECKING, Any

from trio_ray import exceptions
from trio_ray.runtime.api.actors import ActorClass, ActorHandle, get_actor, method
from trio_ray.runtime.api.nursery import Nursery, open_nursery, task_scope
from trio_ray.runtime.api.refs import ObjectRef
from trio_ray.runtime.api.remote import RemoteFunction
from trio_ray.runtime.client.driver import ClientContext, init, is_initialized, shutdown
from trio_ray.runtime.client.sync_api import (
    available_resources,
    cancel,
    cluster_resources,
    get,
    kill,
    nodes,
    put,
    remote,
    timeline,
    wait,
)

if TYPE_CHECKING:
    from trio_ray import simulate
    from trio_ray.runtime.api.cluster import Cluster
    from trio_ray.runtime.client.trio_api import connect, open_cluster

__version__ = "0.1.0"
__all__ = [
    "ActorClass",
    "ActorHandle",
    "ClientContext",
    "Cluster",
    "Nursery",
    "ObjectRef",
    "RemoteFunction",
    "available_resources",
    "cancel",
    "cluster_resources",
    "connect",
    "exceptions",
    "get",
    "get_actor",
    "init",
    "is_initialized",
    "kill",
    "method",
    "nodes",
    "open_cluster",
    "open_nursery",
    "put",
    "remote",
    "shutdown",
    "simulate",
    "task_scope",
    "timeline",
    "wait",
]

_LATE = {
    "Cluster": "trio_ray.runtime.api.cluster",
    "connect": "trio_ray.runtime.client.trio_api",
    "open_cluster": "trio_ray.runtime.client.trio_api",
}
"""What is imported when it is first used: it needs Trio, which plain programs and workers do not."""


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "simulate":
        return import_module("trio_ray.simulate")
    module = _LATE.get(name)
    if module is None:
        raise AttributeError(f"module 'trio_ray' has no attribute {name!r}")
    value = getattr(import_module(module), name)
    globals()[name] = value
    return value
