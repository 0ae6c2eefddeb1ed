"""A node process, from its settings to its end.

The worker template is forked before anything else is imported, so that it stays small and has one thread, and so that
its imports and ours go on at the same time.
"""

import gc
import os
import signal
import socket
import sys
from pathlib import Path

import msgspec

from trio_ray.runtime.node.settings import NodeSettings, Ready

INLINE_LIMIT = 100 * 1024
"""Bytes up to which results and arguments travel in messages (DESIGN section 4)."""


def main() -> None:
    """Read settings from standard input, run the node, end when told to or when the launcher is gone."""
    line = sys.stdin.buffer.readline()
    settings = msgspec.json.decode(line, type=NodeSettings)
    ours, theirs = socket.socketpair()
    template = os.fork()
    if not template:
        ours.close()
        _be_template(theirs, settings)
    theirs.close()
    try:
        _run(settings, ours)
    except BaseException as error:
        _say(settings, Ready(error=f"{error}" or type(error).__name__))
        raise


def socket_path(settings: NodeSettings) -> Path:
    """The node's Unix socket."""
    return Path(settings.session_dir) / "node.sock"


def _say(settings: NodeSettings, ready: Ready) -> None:
    try:
        os.write(settings.ready_fd, msgspec.json.encode(ready) + b"\n")
        if settings.ready_fd > 2:
            os.close(settings.ready_fd)
    except OSError:
        pass  # said already, or the launcher is gone


def _be_template(control: socket.socket, settings: NodeSettings) -> None:
    from trio_ray.runtime.node.template import run_template

    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)  # the lifeline is the node's
    os.close(null)
    if settings.ready_fd > 2:
        os.close(settings.ready_fd)
    sys.path[:0] = [path for path in settings.sys_path if path not in sys.path]

    from trio_ray.runtime.worker.main import run_worker

    address = f"unix:{socket_path(settings)}"
    secret = bytes.fromhex(settings.secret)
    gc.collect()
    gc.freeze()
    run_template(control, lambda number: run_worker(address, secret, number))


def _run(settings: NodeSettings, template: socket.socket) -> None:
    import random
    import time
    from functools import partial

    import trio

    from trio_ray.runtime.core.control.store import ControlMachine
    from trio_ray.runtime.core.machine import Machine
    from trio_ray.runtime.core.messages import PLACEMENT, Address, NodeInfo, control_address
    from trio_ray.runtime.core.node import NodeConfig, NodeMachine
    from trio_ray.runtime.core.scheduling.placement import PlacementMachine
    from trio_ray.runtime.core.scheduling.policies import load
    from trio_ray.runtime.core.spec import resources
    from trio_ray.runtime.node.arena import SharedArena
    from trio_ray.runtime.node.host import Host
    from trio_ray.runtime.node.recording import Recording
    from trio_ray.runtime.transport.addresses import is_loopback
    from trio_ray.runtime.transport.handshake import Welcome
    from trio_ray.runtime.transport.links import MAX_MESSAGE_BYTES

    if not is_loopback(settings.host) and not settings.insecure:
        raise ValueError(
            f"listening on {settings.host} would let other machines connect without encryption; "
            "say --insecure if the network is trusted, or listen on 127.0.0.1"
        )
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = socket_path(settings)
    path.unlink(missing_ok=True)
    unix.bind(str(path))
    unix.listen(256)
    tcp = socket.create_server((settings.host, settings.port), backlog=256)
    tcp_address = f"tcp://{settings.host}:{tcp.getsockname()[1]}"
    arena = SharedArena(settings.store_bytes)
    info = NodeInfo(
        settings.node, tcp_address, resources(settings.resources), tuple(sorted(settings.labels.items())), True,
        settings.store_bytes,
    )  # fmt: skip
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

    def welcome(process: Address) -> Welcome:
        return Welcome(
            process, settings.node, arena.path, settings.store_bytes, INLINE_LIMIT, settings.shards,
            settings.session_dir, time.monotonic(), tuple(settings.sys_path),
        )  # fmt: skip

    recording = Recording(Path(settings.record)) if settings.record else None
    host = Host(
        info, machines, secret=bytes.fromhex(settings.secret), welcome=welcome, arena=arena, head=settings.head,
        recording=recording,
    )  # fmt: skip
    ready = Ready(node=settings.node, pid=os.getpid(), unix=f"unix:{path}", tcp=tcp_address)

    async def websockets(host: Host, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        from trio_websocket import WebSocketRequest, serve_websocket

        async def handler(request: WebSocketRequest) -> None:
            await host.serve_websocket(await request.accept())

        async with trio.open_nursery() as nursery:
            server = await nursery.start(
                partial(serve_websocket, max_message_size=MAX_MESSAGE_BYTES), handler, settings.host, settings.ws_port,
                None,
            )  # fmt: skip
            ready.ws = f"ws://{settings.host}:{server.port}"
            task_status.started()

    async def until_told() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal, nursery)
            nursery.start_soon(_end_when_head_is_lost, host, nursery)
            if not settings.detached:
                nursery.start_soon(_end_with_launcher, nursery)
            serve = websockets if settings.ws_port >= 0 else None
            await host.run([unix, tcp], serve, template, lambda: _up(settings, ready))

    async def _end_on_signal(nursery: trio.Nursery) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                nursery.cancel_scope.cancel()

    async def _end_when_head_is_lost(host: Host, nursery: trio.Nursery) -> None:
        await host.head_lost.wait()
        nursery.cancel_scope.cancel()

    async def _end_with_launcher(nursery: trio.Nursery) -> None:
        async with trio.lowlevel.FdStream(os.dup(0)) as lifeline:
            while await lifeline.receive_some(1024):
                pass
        nursery.cancel_scope.cancel()

    try:
        trio.run(until_told)
    finally:
        path.unlink(missing_ok=True)
        if recording is not None:
            recording.close()
        template.close()


def _up(settings: NodeSettings, ready: Ready) -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    _say(settings, ready)
