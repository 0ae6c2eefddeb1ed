"""The host alone, with machines that only note what they see: it delivers, in order and once, and decides nothing."""

import os
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import msgspec
import pytest
import trio
import trio.testing

from trio_ray.runtime.core.effects import (
    AnyEffect,
    CancelTimer,
    CloseWindow,
    OpenWindow,
    Send,
    SendBytes,
    SetTimer,
    StartWorker,
)
from trio_ray.runtime.core.machine import (
    AnyEvent,
    BytesSent,
    PeerLost,
    ProcessConnected,
    ProcessLost,
    Received,
    TimerFired,
    WindowFilled,
    WorkerFailed,
)
from trio_ray.runtime.core.messages import (
    Answer,
    AnyMessage,
    Blocked,
    HoldsCounted,
    NodeInfo,
    NodesChanged,
    Query,
    RunTasks,
    TasksDone,
)
from trio_ray.runtime.node.arena import SharedArena
from trio_ray.runtime.node.host import Host
from trio_ray.runtime.transport.eager import EagerReads
from trio_ray.runtime.transport.frames import control_frame
from trio_ray.runtime.transport.handshake import Hello, Welcome
from trio_ray.runtime.transport.links import Link, SocketLink, open_link

SECRET = b"s" * 32
SIZE = 8 << 20
NOW = TimerFired("now")


class Notes:
    """A machine that notes what it sees; the test says what it does."""

    def __init__(self, begin: list[AnyEffect]) -> None:
        self.begin = begin
        self.seen: list[AnyEvent] = []
        self.react: Callable[[AnyEvent], list[AnyEffect]] = lambda event: []
        self.next: list[AnyEffect] = []
        """What to do when NOW comes."""
        self._news = trio.Event()

    def start(self, now: float) -> list[AnyEffect]:
        return self.begin

    def step(self, events: Sequence[AnyEvent], now: float) -> list[AnyEffect]:
        effects = []
        for event in events:
            if event == NOW:
                effects += self.next
            else:
                self.seen.append(event)
                effects += self.react(event)
        self._news.set()
        return effects

    def validate(self) -> None:
        pass

    async def until(self, holds: Callable[[list[AnyEvent]], bool]) -> None:
        while not holds(self.seen):
            await self._news.wait()
            self._news = trio.Event()


class Node:
    """A host around such a machine."""

    def __init__(self, name: str) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        self.info = NodeInfo(f"n:{name}", self.address, (), (), True, SIZE)
        self.machine = Notes([])
        self.arena = SharedArena(SIZE)
        self.template, self.ours = socket.socketpair()
        self.host = Host(
            self.info, lambda head: ({self.info.node: self.machine}, None), secret=SECRET,
            welcome=lambda process, shares: Welcome(process, self.info.node), arena=self.arena, head="",
        )  # fmt: skip

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        ready = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.host.run, [self.listener], None, self.ours, ready.set)
            await ready.wait()
            try:
                yield
            finally:
                self.host.stop()
        self.template.close()

    def do(self, *effects: AnyEffect) -> None:
        """Let the machine decide this now."""
        self.machine.next = list(effects)
        self.host.deliver(self.info.node, [NOW])

    def knows(self, *others: "Node") -> None:
        """The node table has reached it."""
        self.do(Send(self.info.node, NodesChanged([other.info for other in others])))
        self.machine.seen.clear()


def received(seen: list[AnyEvent]) -> list[int]:
    return [
        event.message.number
        for event in seen
        if isinstance(event, Received) and isinstance(event.message, HoldsCounted)
    ]


async def enter(node: Node, nursery: trio.Nursery, hello: Hello) -> tuple[Link, Welcome]:
    return await open_link(node.address, SECRET, hello, lambda *place: None, nursery)


async def test_nodes_that_dial_each_other_at_once_lose_nothing_and_mix_nothing_up() -> None:
    a, b = Node("a"), Node("b")
    with trio.fail_after(10):
        async with a.run(), b.run():
            a.knows(b)
            b.knows(a)
            count = 0
            for _ in range(200):  # some before the links are there, some while both are, some after
                a.do(Send("n:b", HoldsCounted(count)))
                b.do(Send("n:a", HoldsCounted(count)))
                count += 1
                await trio.lowlevel.checkpoint()
            for node in (a, b):
                await node.machine.until(lambda seen: len(received(seen)) == count)
                assert received(node.machine.seen) == list(range(count))
                assert not any(isinstance(event, PeerLost) for event in node.machine.seen)
            assert {event.source for event in a.machine.seen if isinstance(event, Received)} == {"n:b"}
            b.host.stop()
            await a.machine.until(lambda seen: isinstance(seen[-1], PeerLost))
            await trio.testing.wait_all_tasks_blocked()
            assert [event.peer for event in a.machine.seen if isinstance(event, PeerLost)] == ["n:b"]


async def test_an_unknown_node_is_lost_at_once() -> None:
    a = Node("a")
    with trio.fail_after(10):
        async with a.run():
            a.do(Send("n:nobody", HoldsCounted(1)))
            await a.machine.until(bool)
            (lost,) = a.machine.seen
            assert isinstance(lost, PeerLost) and lost.peer == "n:nobody" and "node table" in lost.reason


async def test_a_dead_address_loses_the_peer() -> None:
    a, b = Node("a"), Node("b")
    b.listener.close()
    with trio.fail_after(10):
        async with a.run():
            a.knows(b)
            a.do(Send("n:b", HoldsCounted(1)), Send("n:b", HoldsCounted(2)))
            await a.machine.until(bool)
            (lost,) = a.machine.seen
            assert isinstance(lost, PeerLost) and "no cluster answers" in lost.reason


async def test_bytes_go_from_arena_to_arena() -> None:
    a, b = Node("a"), Node("b")
    content = bytes(range(256)) * (3 * 4096 + 1)
    a.arena.view[64 : 64 + len(content)] = content
    with trio.fail_after(10):
        async with a.run(), b.run():
            b.knows(a)
            b.do(OpenWindow("n:a", 7, 4096, len(content)), Send("n:a", HoldsCounted(1)))
            a.machine.react = lambda event: (
                [SendBytes("n:b", 7, 64, len(content)), SendBytes("n:b", 8, 0, 100), Send("n:b", HoldsCounted(2))]
                if isinstance(event, Received)
                else []
            )
            await a.machine.until(lambda seen: BytesSent(8, "n:b") in seen and BytesSent(7, "n:b") in seen)
            await b.machine.until(lambda seen: WindowFilled(7) in seen)
            assert b.arena.view[4096 : 4096 + len(content)] == content
            assert received(b.machine.seen) == [2]  # and nothing of transfer 8, for which there was no window
            assert b.arena.view[:4096] == bytes(4096)


async def test_a_closed_window_takes_nothing() -> None:
    a, b = Node("a"), Node("b")
    a.arena.view[:1000] = b"x" * 1000
    with trio.fail_after(10):
        async with a.run(), b.run():
            b.knows(a)
            b.do(OpenWindow("n:a", 7, 0, 1000), CloseWindow(7), OpenWindow("n:c", 8, 0, 1000))
            b.do(Send("n:a", HoldsCounted(1)))
            await a.machine.until(lambda seen: received(seen) == [1])
            a.do(SendBytes("n:b", 7, 0, 1000), SendBytes("n:b", 8, 0, 1000), SendBytes("n:gone", 9, 0, 10))
            await a.machine.until(lambda seen: BytesSent(8, "n:b") in seen and BytesSent(9, "n:gone") in seen)
            a.do(Send("n:b", HoldsCounted(2)))
            await b.machine.until(lambda seen: received(seen) == [2])
            assert b.arena.view[:1000] == bytes(1000)
            assert not any(isinstance(event, WindowFilled) for event in b.machine.seen)


async def test_timers_fire_once_in_order_and_can_be_replaced_and_forgotten() -> None:
    a = Node("a")
    with trio.fail_after(10):
        async with a.run():
            now = time.monotonic()
            a.do(
                SetTimer("third", now + 0.03), SetTimer("second", now + 0.02), SetTimer("first", now + 5),
                SetTimer("never", now + 0.01), CancelTimer("never"), SetTimer("first", now + 0.01),
                SetTimer("past", now - 1), CancelTimer("unknown"),
            )  # fmt: skip
            await a.machine.until(lambda seen: TimerFired("third") in seen)
            assert a.machine.seen == [TimerFired(key) for key in ("past", "first", "second", "third")]


async def test_processes_come_speak_and_go() -> None:
    a = Node("a")
    with trio.fail_after(10):
        async with a.run(), trio.open_nursery() as nursery:
            link, welcome = await enter(a, nursery, Hello("driver", 77, shares_memory=False))
            process = welcome.process
            assert process == "n:a/1"
            a.machine.react = lambda event: (
                [Send(process, event.message)] if isinstance(event, Received) else []
            )
            body = msgspec.msgpack.encode([Query(1, "x"), Blocked(True)])
            link.send(body)
            frames = await link.receive()
            assert [bytes(frame) for frame in frames if isinstance(frame, memoryview)] == [body]
            link.close()
            await a.machine.until(lambda seen: isinstance(seen[-1], ProcessLost))
            assert a.machine.seen == [
                ProcessConnected(process, "driver", 77, 0, False), Received(process, Query(1, "x")),
                Received(process, Blocked(True)), ProcessLost(process),
            ]  # fmt: skip


async def test_a_node_looks_for_the_next_call_after_an_answer_while_its_workers_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(EagerReads, "look", lambda eager, seconds: looked.append(seconds) or True)
    a = Node("a")
    with trio.fail_after(10):
        async with a.run(), trio.open_nursery() as nursery:
            driver, _ = await enter(a, nursery, Hello("driver", shares_memory=False))
            worker, _ = await enter(a, nursery, Hello("worker", 2**22 + 1, 5))
            answer, work = Send("n:a/1", Answer(1, b"")), Send("n:a/2", RunTasks([], [], [], []))

            async def happens(link: Link, message: AnyMessage, *effects: AnyEffect) -> int:
                """How often the node looked, up to when it has done this about a message."""
                a.machine.react = lambda event: list(effects)
                seen = len(a.machine.seen)
                link.send(msgspec.msgpack.encode([message]))
                await a.machine.until(lambda events: len(events) > seen)
                await trio.testing.wait_all_tasks_blocked(0.005)  # not 0, or Trio's loop never means to sleep
                return len(looked)

            assert await happens(driver, Query(1, "x")) == 0
            assert await happens(driver, Query(1, "x"), answer) == 1
            assert await happens(driver, Query(1, "x"), work, answer) == 1
            assert await happens(driver, Query(1, "x"), answer) == 1
            assert await happens(worker, TasksDone([])) == 1
            assert await happens(driver, Query(1, "x"), answer) == 2
            assert await happens(driver, Query(1, "x"), work) == 2
            worker.close()
            driver.close()


async def test_the_end_of_a_worker_is_told_after_its_last_words() -> None:
    a = Node("a")
    with trio.fail_after(10):
        async with a.run(), trio.open_nursery() as nursery:
            a.do(StartWorker(5), StartWorker(6))
            assert await wait_for(a.template, b"S 5\nS 6\n")
            link, welcome = await enter(a, nursery, Hello("worker", 2**22 + 1, 5))
            await a.machine.until(bool)
            link.send(msgspec.msgpack.encode([Blocked(True)]))
            a.template.sendall(b"X 6 256\nX 5 9\n")  # the link is still open: a child may hold its other end
            await a.machine.until(lambda seen: len(seen) == 4)
            process = welcome.process
            assert a.machine.seen.count(WorkerFailed(6, "exit code 1")) == 1
            assert [event for event in a.machine.seen if not isinstance(event, WorkerFailed)] == [
                ProcessConnected(process, "worker", 2**22 + 1, 5), Received(process, Blocked(True)),
                ProcessLost(process, "killed by SIGKILL"),
            ]  # fmt: skip
            link.close()


async def wait_for(sock: socket.socket, text: bytes) -> bool:
    sock.setblocking(False)
    said = b""
    while len(said) < len(text):
        await trio.lowlevel.wait_readable(sock)
        said += sock.recv(100)
    return said == text


async def test_a_flood_does_not_keep_others_waiting() -> None:
    left, right = socket.socketpair()
    link = SocketLink(right)
    link.lift_limit()
    total, heard = 20_000, 0
    heard_at_others_turn = total

    def flood() -> None:
        frames = control_frame(bytes(4000)) * 100
        for _ in range(total // 100):
            left.sendall(frames)

    async def read() -> None:
        nonlocal heard
        while heard < total:
            heard += len(await link.receive())

    async def other() -> None:
        nonlocal heard_at_others_turn
        while not heard:
            await trio.lowlevel.checkpoint()
        heard_at_others_turn = heard

    thread = threading.Thread(target=flood)
    thread.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        nursery.start_soon(other)
    thread.join()
    assert heard_at_others_turn < total
    link.close()
    left.close()
