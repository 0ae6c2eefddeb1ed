"""The Trio shell: turns frames, timers and process ends into events, and carries effects out. It decides nothing.

One ``Host`` is one node process. It hosts the node's machine and, on the head, placement and the control-store shards;
a message between machines of one process skips the wire. Whoever reads a link hands what arrived to the machine and
carries the effects out itself, before reading on: there is no queue between the socket and the decision.
"""

import heapq
import math
import os
import socket
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from functools import partial
from itertools import chain
from typing import Any

import msgspec
import trio

from trio_ray.runtime.core.effects import (
    AnyEffect,
    CancelTimer,
    CloseWindow,
    OpenWindow,
    Send,
    SendBytes,
    SetTimer,
    StartWorker,
    StopWorker,
)
from trio_ray.runtime.core.machine import (
    AnyEvent,
    BytesSent,
    Machine,
    PeerLost,
    ProcessConnected,
    ProcessLost,
    Received,
    TimerFired,
    WindowFilled,
    WorkerFailed,
)
from trio_ray.runtime.core.messages import Address, AnyMessage, FromProcess, NodeInfo, NodesChanged, RunTasks, TasksDone
from trio_ray.runtime.node.arena import SharedArena
from trio_ray.runtime.node.recording import Recording
from trio_ray.runtime.node.workers import WorkerPool
from trio_ray.runtime.transport.eager import EagerReads
from trio_ray.runtime.transport.frames import BATCH_BYTES, ProtocolError
from trio_ray.runtime.transport.handshake import AuthenticationError, Hello, Listener, Welcome
from trio_ray.runtime.transport.links import (
    Frame,
    Link,
    LinkClosed,
    SocketLink,
    WebSocketLink,
    open_link,
    receive_hello,
)
from trio_ray.runtime.transport.spinning import Spinning

SPIN_S = 0.0002
"""How long to look for what a driver says to an answer; it takes some 30 µs for its next call."""
STEP_BYTES = 20_000
"""A frame of so many bytes is a step by itself: what takes long anyway gains nothing from waiting for more."""


class Envelope(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A message between machines of two node processes."""

    to: Address
    source: Address
    message: AnyMessage


class Window:
    """Where the bytes of a transfer go."""

    __slots__ = ("left", "offset", "size", "source")

    def __init__(self, source: Address, offset: int, size: int) -> None:
        self.source = source
        self.offset = offset
        self.size = size
        self.left = size


class Host:
    """One node process: machines, links, timers, workers, the arena."""

    def __init__(
        self, info: NodeInfo, machines: Callable[[Welcome | None], tuple[dict[Address, Machine], Recording | None]],
        *, secret: bytes, welcome: Callable[[Address, bool], Welcome], arena: SharedArena, head: str,
    ) -> None:  # fmt: skip
        self.info = info
        self.head_lost = False
        """It ended because its link to the head did."""
        self._build = machines
        """Makes the machines, and the recording if there is to be one, once the head (if another) has been heard."""
        self._machines: dict[Address, Machine] = {}
        self._secret = secret
        self._welcome = welcome
        self._arena = arena
        self._head = head
        """Where the head's transport listens; empty on the head itself."""
        self._recording: Recording | None = None
        self._pool: WorkerPool
        self._nursery: trio.Nursery
        self._eager: EagerReads
        self._spinning = Spinning()
        self._at_work: set[Address] = set()
        """Workers that were given tasks and have reported none since."""
        self._answered = False
        """Something was sent to a driver since the loop last slept."""
        self._inbox: deque[tuple[Address, list[AnyEvent]]] = deque()
        self._running = False
        self._stopping = False
        self._links: dict[Address, Link] = {}
        """Processes of this node."""
        self._workers: dict[Address, int] = {}
        self._worker_process: dict[int, Address] = {}
        self._ended: dict[int, str] = {}
        """Workers whose process ended while their link still has something to read."""
        self._peers: dict[Address, Link] = {}
        """The link by which each peer is spoken to; on all but the head, "" is the head."""
        self._peer_links: dict[Address, list[Link]] = {}
        """All links to each peer: there are two when both sides dialled at once."""
        self._dialling: dict[Address, list[Envelope]] = {}
        """What waits for a link that is being made."""
        self._hosts: dict[Address, str] = {}
        """Where other nodes listen."""
        self._count = 0
        self._windows: dict[int, Window] = {}
        self._timers: list[tuple[float, int, Address, str]] = []
        self._timer_at: dict[tuple[Address, str], float] = {}
        self._timer_count = 0
        self._timer_scope: trio.CancelScope | None = None
        self._to_process: dict[Address, list[AnyMessage]] = {}
        self._to_node: dict[Address, list[Envelope]] = {}
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(list[FromProcess]).decode
        self._decode_peer = msgspec.msgpack.Decoder(list[Envelope]).decode

    # -- life --------------------------------------------------------------------------------------------------

    async def run(
        self, listeners: list[socket.socket], websockets: Callable[..., Any] | None, template: socket.socket,
        ready: Callable[[], None],
    ) -> None:  # fmt: skip
        """Serve until ``stop``; every link, worker and timer ends with it."""
        self._pool = WorkerPool(template, self._worker_ended)
        with closing(EagerReads(self._flush, self._rest)) as self._eager:
            await self._serve(listeners, websockets, ready)

    async def _serve(
        self, listeners: list[socket.socket], websockets: Callable[..., Any] | None, ready: Callable[[], None]
    ) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._eager.run)
            try:
                nursery.start_soon(self._pool.run)
                nursery.start_soon(self._run_timers)
                head: Welcome | None = await nursery.start(self._dial_head) if self._head else None
                self._machines, self._recording = self._build(head)
                for listener in listeners:
                    nursery.start_soon(self._accept_forever, listener)
                if websockets is not None:
                    await nursery.start(partial(websockets, self))
                for address, machine in self._machines.items():
                    now = time.monotonic()
                    effects = machine.start(now)
                    if self._recording is not None:
                        self._recording.write(address, now, None, effects)
                    self._carry_out(address, effects)
                self._drain()
                ready()
                await trio.sleep_forever()
            finally:
                self._stopping = True
                if self._recording is not None:
                    self._recording.close()
                for link in [*self._links.values(), *chain.from_iterable(self._peer_links.values())]:
                    link.close()

    def stop(self) -> None:
        """End, from whatever task."""
        self._stopping = True
        self._pool.kill_all()  # before their links close, which they would complain about
        self._nursery.cancel_scope.cancel()

    # -- machines ----------------------------------------------------------------------------------------------

    def deliver(self, to: Address, events: list[AnyEvent]) -> None:
        """Something happened: let the machine act on it, now unless another is acting."""
        self._inbox.append((to, events))
        if not self._running and not self._stopping:
            self._drain()

    def _drain(self) -> None:
        self._running = True
        try:
            inbox, machines = self._inbox, self._machines
            while inbox:
                to, events = inbox.popleft()
                if inbox:  # what arrived together is one step
                    others = [item for item in inbox if item[0] == to]
                    if others:
                        for item in others:
                            inbox.remove(item)
                            events = events + item[1]
                now = time.monotonic()
                effects = machines[to].step(events, now)
                if self._recording is not None:
                    self._recording.write(to, now, events, effects)
                self._carry_out(to, effects)
        finally:
            self._running = False

    def _carry_out(self, source: Address, effects: list[AnyEffect]) -> None:
        for effect in effects:
            if type(effect) is Send:
                to = effect.to
                if to in self._links:
                    if type(effect.message) is RunTasks:
                        self._at_work.add(to)
                    batch = self._to_process.get(to)
                    if batch is None:
                        self._to_process[to] = [effect.message]
                    else:
                        batch.append(effect.message)
                elif to in self._machines:
                    self._hand_over(to, source, effect.message)
                elif "/" not in to or to.startswith("control/"):
                    if to.startswith("n:"):
                        self._to_node.setdefault(to, []).append(Envelope(to, source, effect.message))
                    else:
                        self._to_node.setdefault("", []).append(Envelope(to, source, effect.message))
            else:
                self._effects[type(effect)](self, source, effect)

    def _hand_over(self, to: Address, source: Address, message: AnyMessage) -> None:
        if type(message) is NodesChanged:
            self._learn_hosts(message)
        inbox = self._inbox
        if inbox and inbox[-1][0] == to:
            inbox[-1][1].append(Received(source, message))
        else:
            inbox.append((to, [Received(source, message)]))

    def _learn_hosts(self, message: NodesChanged) -> None:
        for info in message.nodes:
            if info.alive:
                self._hosts[info.node] = info.host
            else:
                self._hosts.pop(info.node, None)

    def _flush(self) -> bool:
        """Send what waits to be sent; True if that woke a task."""
        woke = False
        if self._to_process:
            batches, self._to_process = self._to_process, {}
            for process, messages in batches.items():
                link = self._links.get(process)
                if link is not None:
                    self._send(link, messages)
                    woke = woke or link.blocked
                    if process not in self._workers:
                        self._answered = True
        if self._to_node:
            envelopes, self._to_node = self._to_node, {}
            for node, batch in envelopes.items():
                peer = self._peers.get(node)
                if peer is not None:
                    self._send(peer, batch)
                    woke = woke or peer.blocked
                elif node in self._dialling:
                    self._dialling[node] += batch
                elif node:
                    self._dialling[node] = batch
                    self._nursery.start_soon(self._dial_peer, node)
                    woke = True
        return woke

    def _rest(self, seconds: float) -> None:
        """The loop is about to sleep. A driver that was answered, while no worker has anything to do, is likely to call
        again at once: with a core that is awake for it, that call takes no wake-up."""
        if self._answered:
            self._answered = False
            if not self._at_work and self._spinning.worth_it(1):
                self._spinning.learn(arrived=self._eager.look(min(seconds, SPIN_S)))

    def _send(self, link: Link, batch: list[Any]) -> None:
        body = self._encode(batch)
        if len(body) > BATCH_BYTES and len(batch) > 1:
            half = len(batch) // 2
            self._send(link, batch[:half])
            self._send(link, batch[half:])
            return
        try:
            link.send(body)
        except ProtocolError as error:  # one message that no peer would take
            link.failure = str(error)
            link.close()

    # -- effects -----------------------------------------------------------------------------------------------

    def _set_timer(self, source: Address, effect: SetTimer) -> None:
        self._timer_count += 1
        self._timer_at[source, effect.key] = effect.at
        soonest = not self._timers or effect.at < self._timers[0][0]
        heapq.heappush(self._timers, (effect.at, self._timer_count, source, effect.key))
        if soonest and self._timer_scope is not None:
            self._timer_scope.cancel()

    def _cancel_timer(self, source: Address, effect: CancelTimer) -> None:
        self._timer_at.pop((source, effect.key), None)

    async def _run_timers(self) -> None:
        while True:
            wait = self._timers[0][0] - time.monotonic() if self._timers else math.inf
            if wait > 0:
                with trio.CancelScope() as self._timer_scope:
                    await trio.sleep(wait)
                self._timer_scope = None
                continue
            at, _, address, key = heapq.heappop(self._timers)
            if self._timer_at.get((address, key)) == at:
                del self._timer_at[address, key]
                self.deliver(address, [TimerFired(key)])
            else:
                await trio.lowlevel.checkpoint()

    def _start_worker(self, source: Address, effect: StartWorker) -> None:
        self._pool.start(effect.number)

    def _stop_worker(self, source: Address, effect: StopWorker) -> None:
        number = self._workers.get(effect.process)
        if number is not None:
            self._pool.stop(number, kill=effect.kill)

    def _open_window(self, source: Address, effect: OpenWindow) -> None:
        self._windows[effect.transfer] = Window(effect.source, effect.offset, effect.size)
        if effect.size >= 1 << 20:
            trio.lowlevel.spawn_system_task(
                partial(trio.to_thread.run_sync, self._arena.populate, effect.offset, effect.size)
            )

    def _close_window(self, source: Address, effect: CloseWindow) -> None:
        window = self._windows.pop(effect.transfer, None)
        if window is not None:
            source = window.source
            for link in [self._links[source]] if source in self._links else self._peer_links.get(source, []):
                link.forget(effect.transfer)

    def _send_bytes(self, source: Address, effect: SendBytes) -> None:
        link = self._links.get(effect.to) or self._peers.get(effect.to)
        event = BytesSent(effect.transfer, effect.to)
        if link is None:
            self._inbox.append((source, [event]))
            return
        self._flush()  # what tells the receiver of the transfer goes first
        data = self._arena.view[effect.offset : effect.offset + effect.size]
        link.send_bulk(effect.transfer, data, partial(self._sent, source, event))

    def _sent(self, source: Address, event: BytesSent) -> None:
        # Called from within a send: let the step that caused it end first.
        self._inbox.append((source, [event]))
        if not self._running:
            trio.lowlevel.current_trio_token().run_sync_soon(self._drain_if_idle, idempotent=True)

    def _drain_if_idle(self) -> None:
        if not self._running and not self._stopping:
            self._drain()

    _effects: dict[type, Callable[["Host", Address, Any], None]] = {
        SetTimer: _set_timer,
        CancelTimer: _cancel_timer,
        StartWorker: _start_worker,
        StopWorker: _stop_worker,
        OpenWindow: _open_window,
        CloseWindow: _close_window,
        SendBytes: _send_bytes,
    }

    # -- links -------------------------------------------------------------------------------------------------

    async def _accept_forever(self, listener: socket.socket) -> None:
        with trio.socket.from_stdlib_socket(listener) as accepting:
            while True:
                try:
                    connection, _ = await accepting.accept()
                except OSError as error:
                    print(f"trio-ray: could not accept a connection: {error}", file=sys.stderr)
                    await trio.sleep(0.1)  # out of file descriptors, most likely: let some be closed
                    continue
                self._nursery.start_soon(self.serve, SocketLink(socket.socket(fileno=connection.detach())))

    async def serve_websocket(self, connection: Any) -> None:
        """One WebSocket connection, from handshake to end."""
        await self.serve(WebSocketLink(connection))

    async def serve(self, link: Link) -> None:
        """One incoming connection: authenticate it, then take in what it sends until it ends."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.write_forever)
            try:
                listener = Listener(self._secret)
                try:
                    hello = await receive_hello(link, listener)
                except LinkClosed:
                    return
                except (AuthenticationError, ProtocolError, trio.TooSlowError) as error:
                    why = str(error) or "the peer did not complete the handshake"
                    print(f"trio-ray: a connection was refused: {why}", file=sys.stderr)
                    return
                if hello.role == "node":
                    link.window = partial(self._window, hello.node)
                    link.send(listener.accept(self._welcome(hello.node, False)))
                    await self._serve_peer(hello.node, link)
                else:
                    await self._serve_process(hello, link, listener)
            finally:
                link.close()
                nursery.cancel_scope.cancel()

    async def _serve_process(self, hello: Hello, link: Link, listener: Listener) -> None:
        self._count += 1
        process = f"{self.info.node}/{self._count}"
        self._links[process] = link
        link.window = partial(self._window, process)
        link.send(listener.accept(self._welcome(process, hello.shares_memory)))
        if hello.role == "worker":
            self._workers[process] = hello.number
            self._worker_process[hello.number] = process
            self._pool.pids.setdefault(hello.number, hello.pid)
        node = self.info.node
        self.deliver(node, [ProcessConnected(process, hello.role, hello.pid, hello.number, hello.shares_memory)])
        reason = ""
        decode = self._decode

        def arrived(frames: list[Frame]) -> None:
            events: list[AnyEvent] = []
            for frame in frames:
                if isinstance(frame, tuple):
                    self._filled(frame, events)
                    continue
                for message in decode(frame):
                    events.append(Received(process, message))
                    if type(message) is TasksDone:
                        self._at_work.discard(process)
                if len(frame) >= STEP_BYTES:
                    self.deliver(node, events)
                    events = []
            if events:
                self.deliver(node, events)

        try:
            await link.read_forever(arrived, self._eager)
        except LinkClosed as closed:
            reason = str(closed)
        except (ProtocolError, msgspec.MsgspecError) as error:
            reason = f"it broke the protocol: {error}"
        finally:
            if reason:
                print(f"trio-ray: the link of {process} is closed: {reason}", file=sys.stderr)
            del self._links[process]
            self._at_work.discard(process)
            if hello.role == "worker":
                self._worker_link_closed(process, hello.number)
            else:
                self.deliver(node, [ProcessLost(process, reason)])

    def _worker_link_closed(self, process: Address, number: int) -> None:
        if number in self._ended:
            self._worker_gone(process, number, self._ended.pop(number))
        else:
            self._pool.stop(number, kill=True)  # its end, and how it ended, is reported by the template

    def _worker_ended(self, number: int, reason: str) -> None:
        process = self._worker_process.get(number)
        if process is None:
            self.deliver(self.info.node, [WorkerFailed(number, reason)])
        elif process in self._links:
            self._ended[number] = reason  # its last results may still be on the link
            link = self._links[process]
            if isinstance(link, SocketLink):
                link.stop_reading()  # a child that it forked may hold the other end
        else:
            self._worker_gone(process, number, reason)

    def _worker_gone(self, process: Address, number: int, reason: str) -> None:
        del self._workers[process], self._worker_process[number]
        self.deliver(self.info.node, [ProcessLost(process, reason)])

    # -- peers -------------------------------------------------------------------------------------------------

    async def _serve_peer(self, node: Address, link: Link) -> None:
        self._peer_links.setdefault(node, []).append(link)
        if node not in self._peers:
            self._peers[node] = link
            waiting = self._dialling.pop(node, None)
            if waiting:
                self._send(link, waiting)
        reason = ""
        try:
            await link.read_forever(self._peer_said, self._eager)
        except LinkClosed as closed:
            reason = str(closed)
        except (ProtocolError, msgspec.MsgspecError) as error:
            reason = f"it broke the protocol: {error}"
        finally:
            if reason:
                print(f"trio-ray: the link to {node} is closed: {reason}", file=sys.stderr)
            link.close()
            links = self._peer_links.get(node, [])
            if link in links:  # else another link of this peer ended first, and all was said then
                del self._peer_links[node], self._peers[node]
                for other in links:
                    other.close()
                self._peer_lost(node, reason)

    def _peer_said(self, frames: list[Frame]) -> None:
        batches: dict[Address, list[AnyEvent]] = {}
        for frame in frames:
            if isinstance(frame, tuple):
                self._filled(frame, batches.setdefault(self.info.node, []))
                continue
            for envelope in self._decode_peer(frame):
                if type(envelope.message) is NodesChanged:
                    self._learn_hosts(envelope.message)
                batches.setdefault(envelope.to, []).append(Received(envelope.source, envelope.message))
        for to, events in batches.items():
            if events and to in self._machines:
                self.deliver(to, events)

    def _peer_lost(self, node: Address, reason: str) -> None:
        for address in self._machines:
            self.deliver(address, [PeerLost(node, reason)])

    async def _dial_peer(self, node: Address) -> None:
        window = partial(self._window, node)
        try:
            address = self._hosts.get(node)
            if address is None:
                raise ConnectionError(f"the node {node} is not in the node table (any more)")
            link, _ = await open_link(address, self._secret, self._hello(), window, self._nursery)
        except (ConnectionError, AuthenticationError, ProtocolError, ValueError) as error:
            self._dialling.pop(node, None)
            if node not in self._peers:  # it did not dial us meanwhile
                self._peer_lost(node, str(error))
            return
        await self._serve_peer(node, link)

    async def _dial_head(self, task_status: trio.TaskStatus[Welcome] = trio.TASK_STATUS_IGNORED) -> None:
        """The link to the head carries what is for placement and the control store; without it a node cannot go on."""
        link, welcome = await open_link(
            self._head, self._secret, self._hello(), lambda *place: self._window(welcome.node, *place), self._nursery
        )
        self._peers[""] = link
        task_status.started(welcome)
        try:
            await self._serve_peer(welcome.node, link)
        finally:
            del self._peers[""]
            self.head_lost = not self._stopping
            self.stop()

    def _hello(self) -> Hello:
        return Hello("node", os.getpid(), node=self.info.node, info=self.info)

    def _window(self, source: Address, transfer: int, position: int, size: int) -> memoryview | None:
        window = self._windows.get(transfer)
        if window is None or window.source != source or position + size > window.size:
            return None
        begin = window.offset + position
        return self._arena.view[begin : begin + size]

    def _filled(self, frame: tuple[int, int], events: list[AnyEvent]) -> None:
        transfer, size = frame
        window = self._windows.get(transfer)
        if window is not None:
            window.left -= size
            if window.left <= 0:
                del self._windows[transfer]
                events.append(WindowFilled(transfer))
