"""The Trio API's way in: a cluster for the time of a block."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from functools import partial

import trio

from trio_ray.runtime.api import context
from trio_ray.runtime.api.cluster import Cluster
from trio_ray.runtime.client.driver import Driver, cluster_options, connect_to
from trio_ray.runtime.client.find import Place, find
from trio_ray.runtime.client.sync import SyncConnection
from trio_ray.runtime.client.trio_reader import read_in_trio
from trio_ray.runtime.launch.local import LocalCluster


@asynccontextmanager
async def open_cluster(
    num_cpus: float | None = None, *, num_gpus: float | None = None, resources: Mapping[str, float] | None = None,
    labels: Mapping[str, str] | None = None, object_store_memory: int | None = None, nodes: int = 1,
    policy: str = "bottom-up", namespace: str = "default",
) -> AsyncIterator[Cluster]:  # fmt: skip
    """A cluster of ``nodes`` nodes on this machine, each with these resources, that ends with the block."""
    _refuse_second()
    options = cluster_options(
        num_cpus=num_cpus, num_gpus=num_gpus, resources=resources, labels=labels,
        object_store_memory=object_store_memory, nodes=nodes, policy=policy,
    )  # fmt: skip
    local = LocalCluster.begin(**options)
    try:
        file = await trio.to_thread.run_sync(local.finish)
        place = Place(file.head.unix, bytes.fromhex(local.secret), file.head.tcp)
        async with _join(place, namespace) as cluster:
            yield cluster
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(local.stop)


@asynccontextmanager
async def connect(address: str = "auto", *, namespace: str = "default") -> AsyncIterator[Cluster]:
    """The running cluster at ``address`` (``auto``, ``host:port``, ``tcp://…``, ``ws://…``), left with the block.

    Raises ConnectionError when no cluster answers, ``AuthenticationError`` when the secret is another cluster's.
    """
    _refuse_second()
    async with _join(find(address), namespace) as cluster:
        yield cluster


def _refuse_second() -> None:
    if context.current_or_none() is not None:
        raise RuntimeError("this process is part of a cluster already; leave it first (trio_ray.shutdown)")


@asynccontextmanager
async def _join(place: Place, namespace: str) -> AsyncIterator[Cluster]:
    driver: Driver = await trio.to_thread.run_sync(partial(connect_to, place, None, namespace))
    driver.session.root.in_trio = True
    driver.enter()
    try:
        if isinstance(driver.connection, SyncConnection):
            async with read_in_trio(driver.connection, spin=True):
                yield Cluster(driver.session)
        else:
            yield Cluster(driver.session)
    finally:
        driver.leave()
