"""Sockets that are read the moment Trio's loop wakes, and callers that look for an answer before they sleep."""

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import closing
from functools import partial

import pytest
import trio
import trio.testing

from trio_ray.runtime.transport.eager import EagerReads
from trio_ray.runtime.transport.frames import ProtocolError, control_frame
from trio_ray.runtime.transport.links import Frame, LinkClosed, SocketLink
from trio_ray.runtime.transport.spinning import MAX_SKIPPED, Spinning


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    left, right = socket.socketpair()
    with left, right:
        yield left, right


def _no_flush() -> bool:
    return False


async def test_what_arrived_together_is_answered_by_one_flush() -> None:
    pairs = [socket.socketpair() for _ in range(3)]
    happened: list[str] = []
    read_all = trio.Event()

    def flush() -> bool:
        happened.append("flush")
        return False

    def read(name: str, sock: socket.socket) -> None:
        happened.append(name + sock.recv(100).decode())
        if len([entry for entry in happened if entry != "flush"]) == 3:
            read_all.set()

    with closing(EagerReads(flush)) as eager:
        for index, (_, there) in enumerate(pairs):
            eager.add(there.fileno(), partial(read, str(index), there))
        for here, _ in pairs:
            here.send(b"!")
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(eager.run)
                await read_all.wait()
                nursery.cancel_scope.cancel()
    first = happened.index("0!")
    assert sorted(happened[first : first + 3]) == ["0!", "1!", "2!"]
    assert happened[first + 3] == "flush"
    for here, there in pairs:
        here.close()
        there.close()


async def test_one_that_is_removed_by_another_is_not_called(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    other, far = socket.socketpair()
    called: list[int] = []
    with other, far, closing(EagerReads(_no_flush)) as eager:
        fds = [there.fileno(), far.fileno()]

        def read(fd: int) -> None:
            called.append(fd)
            for each in fds:
                eager.remove(each)
            nursery.cancel_scope.cancel()

        for fd in fds:
            eager.add(fd, partial(read, fd))
        here.send(b"!")
        other.send(b"!")
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(eager.run)
    assert len(called) == 1
    assert eager.remove(fds[0]) is None  # ignored, also when all is closed


async def test_one_who_rests_may_stay_awake_for_what_arrives(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    rests: list[float] = []
    looks: list[bool] = []
    arrived = trio.Event()

    def rest(seconds: float) -> None:
        rests.append(seconds)
        if looks == [False]:
            here.send(b"!")
        looks.append(eager.look(min(seconds, 0.001)))

    def read() -> None:
        assert there.recv(100) == b"!"
        arrived.set()

    with closing(EagerReads(_no_flush, rest)) as eager:
        eager.add(there.fileno(), read)
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(eager.run)
                await trio.testing.wait_all_tasks_blocked()
                assert looks == [], "the loop had something to do"
                await trio.sleep(0.01)
                await trio.sleep(0.01)
                await arrived.wait()
                nursery.cancel_scope.cancel()
    assert looks[:2] == [False, True] and 0 < rests[0] <= 0.01


async def test_what_a_flush_raises_comes_out_of_the_task_rather_than_being_logged() -> None:
    def flush() -> bool:
        raise ZeroDivisionError("a fault")

    with closing(EagerReads(flush)) as eager, pytest.raises(ZeroDivisionError), trio.fail_after(5):
        await eager.run()


async def test_a_link_hands_over_frames_and_tells_its_end(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    link = SocketLink(there)
    heard: list[bytes] = []

    def arrived(frames: list[Frame]) -> None:
        heard.extend(bytes(frame) for frame in frames if isinstance(frame, memoryview))

    with closing(EagerReads(_no_flush)) as eager, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(eager.run)
            here.send(control_frame(b"one") + control_frame(b"two"))
            here.shutdown(socket.SHUT_WR)
            with pytest.raises(LinkClosed):
                await link.read_forever(arrived, eager)
            nursery.cancel_scope.cancel()
    assert heard == [b"one", b"two"]
    link.close()


async def test_a_link_that_is_closed_from_this_side_ends_its_reader(pair: tuple[socket.socket, socket.socket]) -> None:
    link = SocketLink(pair[1])
    with closing(EagerReads(_no_flush)) as eager, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(eager.run)

            async def close() -> None:
                link.failure = "it was told to"
                link.close()

            nursery.start_soon(close)
            with pytest.raises(LinkClosed, match="it was told to"):
                await link.read_forever(lambda frames: None, eager)
            with pytest.raises(LinkClosed):  # closed before it began
                await link.read_forever(lambda frames: None, eager)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("fault", [ZeroDivisionError, ProtocolError])
async def test_what_the_taker_of_frames_raises_comes_out_of_the_readers_task(
    fault: type[Exception], pair: tuple[socket.socket, socket.socket]
) -> None:
    here, there = pair
    link = SocketLink(there)

    def arrived(frames: list[Frame]) -> None:
        raise fault

    with closing(EagerReads(_no_flush)) as eager, trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(eager.run)
            here.send(control_frame(b"one"))
            with pytest.raises(fault):
                await link.read_forever(arrived, eager)
            nursery.cancel_scope.cancel()
    link.close()


async def test_a_flood_does_not_keep_tasks_from_running(pair: tuple[socket.socket, socket.socket]) -> None:
    here, there = pair
    link = SocketLink(there)
    link.lift_limit()
    total, heard, heard_at_others_turn = 20_000, 0, 20_000
    done = trio.Event()

    def flood() -> None:
        frames = control_frame(bytes(4000)) * 100
        for _ in range(total // 100):
            here.sendall(frames)

    def arrived(frames: list[Frame]) -> None:
        nonlocal heard
        heard += len(frames)
        if heard == total:
            done.set()

    async def read() -> None:
        with pytest.raises(LinkClosed):
            await link.read_forever(arrived, eager)

    thread = threading.Thread(target=flood)
    thread.start()
    with closing(EagerReads(_no_flush)) as eager, trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(eager.run)
            nursery.start_soon(read)
            while not heard:
                await trio.lowlevel.checkpoint()
            heard_at_others_turn = heard
            await done.wait()
            link.close()
            nursery.cancel_scope.cancel()
    thread.join()
    assert heard_at_others_turn < total


def test_spinning_stops_where_it_is_in_vain_and_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    spinning = Spinning()
    skipped = []
    for _ in range(12):
        waits = 0
        while not spinning.worth_it(1):
            waits += 1
        skipped.append(waits)
        spinning.learn(arrived=False)
    assert skipped[:4] == [0, 2, 4, 8]
    assert skipped[-1] == MAX_SKIPPED
    while not spinning.worth_it(1):
        pass
    spinning.learn(arrived=True)
    assert spinning.worth_it(1)


def test_nobody_spins_when_every_core_has_work_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    assert Spinning().worth_it(1)
    assert not Spinning().worth_it(2)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
    assert not Spinning().worth_it(1)
