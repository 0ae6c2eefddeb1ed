"""``simulate.run``: a coroutine for a cluster, on a modelled cluster."""

import gc
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import trio

from trio_ray.runtime.api import context, refs
from trio_ray.runtime.api.cluster import Cluster
from trio_ray.runtime.core.node import NodeConfig
from trio_ray.simulate.clock import SimulatedClock, deterministic
from trio_ray.simulate.cluster import DEFAULT_BANDWIDTH, DEFAULT_LATENCY_S, DEFAULT_STORE_BYTES, ClusterSpec
from trio_ray.simulate.costs import Cost, TaskCosts
from trio_ray.simulate.engine import SimulationError
from trio_ray.simulate.profile import Profile, default_profile, load_profile
from trio_ray.simulate.report import Report, make_report
from trio_ray.simulate.world import World

Program = Callable[[Cluster], Awaitable[Any]]


def run(
    main: Program, *, nodes: int = 1, cpus: float = 1.0, gpus: float = 0.0,
    cluster: ClusterSpec | str | Path | None = None,
    policy: str = "bottom-up", costs: Mapping[Any, Cost] | None = None, default_cost: Cost = 0.0, seed: int = 0,
    network: str = "simple", profile: Profile | str | Path | None = None, resources: dict[str, float] | None = None,
    labels: dict[str, str] | None = None, memory_bytes: int = 0, store_bytes: int = DEFAULT_STORE_BYTES,
    latency_s: float = DEFAULT_LATENCY_S, bandwidth_bytes_per_s: float = DEFAULT_BANDWIDTH, shards: int = 1,
    spread_shards: bool = False, config: NodeConfig | None = None,
) -> Report:  # fmt: skip
    """Run ``await main(cluster)`` on a simulated cluster, and report how it went.

    ``main`` is the very coroutine that runs on a real cluster: ``cluster`` has the same methods, ``trio.sleep``,
    nurseries and deadlines go by simulated time. Each node has ``cpus``, ``gpus``, ``resources``, …; ``cluster``
    (a ``ClusterSpec``, or the path of a TOML or JSON description) replaces all of these. ``costs`` says what tasks
    take (see ``trio_ray.simulate.costs``); ``profile`` what the control plane takes, measured by ``trio-ray
    calibrate`` (a path; the shipped profile if not given). ``network`` is ``simple`` or ``instant``; ``policy`` any
    scheduling policy's name, or ``module:Class``.

    One seed gives one history: ``report.event_log_hash`` is the same for the same program and arguments.

    Raises what ``main`` raises; ``ValueError`` (``ClusterError``, ``ProfileError``, ``CostError``) for arguments that
    cannot be; ``SimulationError`` when the program waits for something that cannot come.

    >>> report = run(main, nodes=100, cpus=32, costs={square: lognormal(mean=0.005, sigma=1.0)}, seed=1)
    """
    if cluster is None:
        spec = ClusterSpec.uniform(
            nodes, cpus, gpus, shards=shards, spread_shards=spread_shards, memory_bytes=memory_bytes,
            store_bytes=store_bytes, resources=resources, labels=labels, latency_s=latency_s,
            bandwidth_bytes_per_s=bandwidth_bytes_per_s,
        )  # fmt: skip
    else:
        spec = cluster if isinstance(cluster, ClusterSpec) else ClusterSpec.load(cluster)
    if not isinstance(profile, Profile):
        profile = default_profile() if profile is None else load_profile(profile)
    if trio.lowlevel.in_trio_run():
        raise SimulationError(
            "simulate.run runs a Trio loop of its own on simulated time, so it cannot be called from within another; "
            "call it from plain code, or with `await trio.to_thread.run_sync(lambda: simulate.run(...))`"
        )
    began = time.process_time()
    with _no_garbage_collection():
        world = World(
            spec, TaskCosts(costs or {}, default_cost, seed), profile=profile, policy=policy, seed=seed,
            network=network, config=config, elsewhere=refs._dropped,
        )  # fmt: skip
        with world.bound():
            try:
                return _run(world, main, began=began, policy=policy, network=network)
            finally:
                world.close()


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """The collector's own timing depends on what else the process does, and references die in it; the clock has it
    run at fixed points of the simulation instead."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _run(world: World, main: Program, *, began: float, policy: str, network: str) -> Report:
    engine = world.engine
    engine.boot()
    clock = SimulatedClock(engine)
    busy_before = [host.busy_s for host in engine.hosts]
    span: list[float] = []
    busy: list[float] = []
    result: list[Any] = []
    errors: list[BaseException] = []

    async def program() -> None:
        async with trio.open_nursery() as nursery:
            world.nursery = nursery
            clock.stop = nursery.cancel_scope
            session = world.connect_driver()
            session.root.in_trio = True
            context.running.set(session.root)
            span.append(engine.now)
            try:
                result.append(await main(Cluster(session)))
            except trio.Cancelled:
                raise
            except BaseException as error:
                errors.append(error)
            span.append(engine.now)
            busy.extend(host.busy_s for host in engine.hosts)
            clock.over = True
            nursery.cancel_scope.cancel()

    with deterministic(engine.seed):
        trio.run(program, clock=clock)
    if clock.failure is not None:
        raise clock.failure
    if errors:
        raise errors[0]
    return make_report(
        engine.cluster, engine.meter, started_at=span[0], ended_at=span[1],
        node_busy_s=[after - before for before, after in zip(busy_before, busy, strict=True)],
        result=result[0], event_log_hash=engine.history.hexdigest(), messages=engine.history.messages, policy=policy,
        network=network, seed=engine.seed, unused_costs=world.costs.unused, cpu_s=time.process_time() - began,
    )  # fmt: skip
