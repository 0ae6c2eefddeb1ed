"""A node process, from its settings to its end.

The worker template is forked before anything else is imported, so that it stays small and has one thread, and so that
its imports and ours go on at the same time.
"""

import gc
import os
import shutil
import signal
import socket
import sys
from pathlib import Path

import msgspec

from trio_ray.runtime.node.settings import NodeSettings, Ready
from trio_ray.runtime.transport.handshake import AuthenticationError

INLINE_LIMIT = 100 * 1024
"""Bytes up to which results and arguments travel in messages (DESIGN section 4)."""


def main() -> None:
    """Read settings from standard input, run the node, end when told to or when the launcher is gone."""
    settings = msgspec.json.decode(sys.stdin.buffer.readline(), type=NodeSettings)
    ours, theirs = socket.socketpair()
    template = os.fork()
    if not template:
        ours.close()
        _be_template(theirs, settings)
    theirs.close()
    try:
        _run(settings, ours)
    except BaseException as error:
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        starting = settings.ready_fd >= 0
        _say(settings, Ready(error=str(error) or type(error).__name__))
        if starting and isinstance(error, (OSError, ValueError, AuthenticationError, StartRefused)):
            sys.exit(f"trio-ray: the node {settings.node} ends: {error}")
        raise
    finally:
        _clean_up(settings)


class StartRefused(Exception):
    """The node cannot be what its settings say."""


def _clean_up(settings: NodeSettings) -> None:
    socket_path(settings).unlink(missing_ok=True)
    if settings.remove:
        shutil.rmtree(settings.remove, ignore_errors=True)


def socket_path(settings: NodeSettings) -> Path:
    """The node's Unix socket."""
    return Path(settings.session_dir) / "node.sock"


def _say(settings: NodeSettings, ready: Ready) -> None:
    """Tell the launcher, once."""
    fd, settings.ready_fd = settings.ready_fd, -1
    if fd < 0:
        return
    try:
        os.write(fd, msgspec.json.encode(ready) + b"\n")
        if fd > 2:
            os.close(fd)
    except OSError:
        pass  # the launcher is gone


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
    import time
    from functools import partial

    import trio

    from trio_ray.runtime.core.machine import Machine
    from trio_ray.runtime.core.messages import Address
    from trio_ray.runtime.node.arena import SharedArena
    from trio_ray.runtime.node.host import Host
    from trio_ray.runtime.node.machines import build, describe
    from trio_ray.runtime.node.recording import Recording
    from trio_ray.runtime.transport.addresses import is_loopback
    from trio_ray.runtime.transport.handshake import Welcome
    from trio_ray.runtime.transport.links import MAX_MESSAGE_BYTES

    sys.path += [path for path in settings.sys_path if path not in sys.path]  # where a user's policy may be
    if not is_loopback(settings.host) and not settings.insecure:
        raise StartRefused(
            f"listening on {settings.host} would let other machines connect without encryption; "
            "say --insecure if the network is trusted, or listen on 127.0.0.1"
        )
    unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    path = socket_path(settings)
    path.unlink(missing_ok=True)
    unix.bind(str(path))
    unix.listen(256)
    try:
        tcp = socket.create_server((settings.host, settings.port), backlog=256)
    except OSError as error:
        raise StartRefused(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another port with --port, or "
            "0 for any free one"
        ) from None
    port = tcp.getsockname()[1]
    tcp_address = f"tcp://{_reachable(settings)}:{port}"
    try:
        arena = SharedArena(settings.store_bytes)
    except OSError as error:
        raise StartRefused(
            f"an object store of {settings.store_bytes:,} bytes cannot be had ({error.strerror}); ask for a smaller one"
        ) from None
    info = describe(settings, tcp_address)

    def welcome(process: Address, shares_memory: bool) -> Welcome:
        return Welcome(
            process, settings.node, arena.path if shares_memory else "", settings.store_bytes, INLINE_LIMIT,
            settings.shards, settings.session_dir, time.monotonic(), tuple(settings.sys_path), settings.policy,
        )  # fmt: skip

    def machines(head: Welcome | None) -> tuple[dict[Address, Machine], Recording | None]:
        if head is not None:
            settings.shards, settings.policy = head.shards, head.policy
        recording = Recording(Path(settings.record), settings, info) if settings.record else None
        return build(settings, info), recording

    host = Host(
        info, machines, secret=bytes.fromhex(settings.secret), welcome=welcome, arena=arena, head=settings.head
    )
    ready = Ready(node=settings.node, pid=os.getpid(), unix=f"unix:{path}", tcp=tcp_address)

    async def websockets(host: Host, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        from trio_websocket import ConnectionClosed, WebSocketRequest, serve_websocket

        async def handler(request: WebSocketRequest) -> None:
            try:
                await host.serve_websocket(await request.accept())
            except ConnectionClosed:
                pass  # before it was one

        async with trio.open_nursery() as nursery:
            server = await nursery.start(
                partial(serve_websocket, max_message_size=MAX_MESSAGE_BYTES), handler, settings.host, settings.ws_port,
                None,
            )  # fmt: skip
            ready.ws = f"ws://{_reachable(settings)}:{server.port}"
            task_status.started()

    async def until_told() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_end_on_signal)
            if not settings.detached:
                nursery.start_soon(_end_with_launcher)
            serve = websockets if settings.ws_port >= 0 else None
            await host.run([unix, tcp], serve, template, lambda: _up(settings, ready))
            if host.head_lost and settings.detached:  # else its launcher, who ends the head too, knows
                print(f"trio-ray: the node {settings.node} ends: it lost the link to the head", file=sys.stderr)
            nursery.cancel_scope.cancel()

    async def _end_on_signal() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async for _ in signals:
                host.stop()

    async def _end_with_launcher() -> None:
        async with trio.lowlevel.FdStream(os.dup(0)) as lifeline:
            while await lifeline.receive_some(1024):
                pass
        host.stop()

    try:
        trio.run(until_told)
    finally:
        template.close()


def _reachable(settings: NodeSettings) -> str:
    """By what name others reach this node."""
    if settings.advertise:
        return settings.advertise
    if settings.host not in ("0.0.0.0", "::", ""):
        return settings.host
    # Which of this machine's addresses is seen elsewhere: the one from which it would speak to the head, or outwards.
    target = settings.head.removeprefix("tcp://").rpartition(":")[0] or "192.0.2.1"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((target, 9))  # a datagram socket: nothing is sent
            return str(probe.getsockname()[0])
        except OSError:
            return socket.gethostname()


def _up(settings: NodeSettings, ready: Ready) -> None:
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 50)
    _say(settings, ready)
