"""Frames, the handshake and links: what arrives is what was sent, and a bad peer harms nobody else."""

import random
import socket
import threading

import msgspec
import pytest
import trio

from trio_ray.runtime.core.messages import Query, References
from trio_ray.runtime.transport import addresses
from trio_ray.runtime.transport.blocking import BlockingLink
from trio_ray.runtime.transport.frames import (
    MAX_CONTROL_BYTES,
    FrameReader,
    ProtocolError,
    control_frame,
    data_header,
)
from trio_ray.runtime.transport.handshake import (
    AuthenticationError,
    Dialler,
    Hello,
    Listener,
    Welcome,
    last_word,
)
from trio_ray.runtime.transport.links import LinkClosed, SocketLink, receive_hello, shake_hands

SECRET = b"s" * 32


def feed(reader: FrameReader, stream: bytes, sizes: list[int]) -> list[bytes | tuple[int, int]]:
    frames: list[bytes | tuple[int, int]] = []
    position = 0
    while position < len(stream):
        buffer = reader.buffer()
        assert len(buffer) > 0
        count = min(sizes[position % len(sizes)], len(buffer), len(stream) - position)
        buffer[:count] = stream[position : position + count]
        position += count
        for frame in reader.received(count):
            frames.append(bytes(frame) if isinstance(frame, memoryview) else frame)
    return frames


@pytest.mark.parametrize("seed", range(10))
def test_frames_survive_any_fragmentation(seed: int) -> None:
    rng = random.Random(seed)
    arena = bytearray(1 << 20)
    view = memoryview(arena)
    wanted = {1: 0, 2: 500_000}
    reader = FrameReader(
        lambda transfer, position, size: (
            view[wanted[transfer] + position : wanted[transfer] + position + size] if transfer in wanted else None
        ),
        MAX_CONTROL_BYTES,
    )
    stream = b""
    expected: list[bytes | tuple[int, int]] = []
    content = {1: rng.randbytes(400_000), 2: rng.randbytes(300_000), 9: rng.randbytes(1000)}
    position = dict.fromkeys(content, 0)
    for _ in range(60):
        if rng.random() < 0.5:
            body = rng.randbytes(rng.choice([0, 1, 100, 70_000, 600_000]))
            stream += control_frame(body)
            expected.append(body)
        else:
            transfer = rng.choice(list(content))
            begin = position[transfer]
            piece = content[transfer][begin : begin + rng.choice([0, 1, 5000, 100_000])]
            position[transfer] += len(piece)
            stream += data_header(transfer, begin, len(piece)) + piece
            if transfer in wanted:
                expected.append((transfer, len(piece)))
    sizes = [rng.choice([1, 3, 100, 5000, 300_000]) for _ in range(17)]
    if min(sizes) < 100:
        sizes = [max(size, 100) for size in sizes]
    assert feed(reader, stream, sizes) == expected
    for transfer, offset in wanted.items():
        assert arena[offset : offset + position[transfer]] == content[transfer][: position[transfer]]


def test_bytes_that_are_no_frames_are_refused() -> None:
    reader = FrameReader(lambda *_: None)
    with pytest.raises(ProtocolError, match="is the peer a trio-ray process"):
        feed(reader, b"GET / HTTP/1.1\r\n\r\n", [100])
    reader = FrameReader(lambda *_: None, MAX_CONTROL_BYTES)
    with pytest.raises(ProtocolError, match="unknown kind"):
        feed(reader, b"\x05\x00\x00\x00\x07hello", [100])


def test_before_the_handshake_no_data_frames_are_taken() -> None:
    with pytest.raises(ProtocolError):
        feed(FrameReader(lambda *_: None), data_header(1, 0, 5) + b"hello", [100])


def test_a_window_that_closes_within_a_frame_takes_no_more() -> None:
    arena = bytearray(100_000)
    view = memoryview(arena)
    reader = FrameReader(lambda transfer, position, size: view[position : position + size], MAX_CONTROL_BYTES)
    stream = data_header(1, 0, 100_000) + b"x" * 100_000
    assert feed(reader, stream[:50_000], [5000]) == []
    written = arena.count(b"x")
    reader.forget(2)
    reader.forget(1)
    assert feed(reader, stream[50_000:] + control_frame(b"next"), [5000]) == [b"next"]
    assert 0 < written == arena.count(b"x")


def handshake(dialler: Dialler, listener: Listener) -> None:
    to_listener: bytes | None = dialler.first
    while to_listener is not None:
        to_dialler = listener.received(to_listener)
        if to_dialler is None:
            to_dialler = listener.accept(Welcome("n:1/1", "n:1"))
        to_listener = dialler.received(to_dialler)


def test_both_sides_prove_the_secret() -> None:
    dialler, listener = Dialler(SECRET, Hello("driver", 7)), Listener(SECRET)
    handshake(dialler, listener)
    assert dialler.welcome == Welcome("n:1/1", "n:1")
    assert listener.hello == Hello("driver", 7)


def test_a_wrong_secret_is_noticed_by_the_dialler_and_told_to_the_listener() -> None:
    dialler, listener = Dialler(b"wrong", Hello("driver")), Listener(SECRET)
    with pytest.raises(AuthenticationError, match="secret") as caught:
        handshake(dialler, listener)
    with pytest.raises(AuthenticationError, match=r"broke off.*secret"):
        listener.received(last_word(caught.value))


def test_a_proof_cannot_be_reflected_or_forged() -> None:
    from trio_ray.runtime.transport.handshake import Challenge, Response

    listener = Listener(SECRET)
    dialler = Dialler(b"wrong", Hello("driver"))
    challenge = msgspec.msgpack.decode(listener.received(dialler.first) or b"", type=Challenge)
    with pytest.raises(AuthenticationError, match="secret"):
        listener.received(msgspec.msgpack.encode(Response(challenge.proof, Hello("driver"))))
    assert listener.hello is None


def test_what_is_no_handshake_is_refused() -> None:
    for body in (b"", b"\xc1", msgspec.msgpack.encode({"type": "Greeting"}), b"\x80" * 100):
        with pytest.raises(AuthenticationError):
            Listener(SECRET).received(body)


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("tcp://head:1234", ("tcp", "head", 1234)),
        ("head:1234", ("tcp", "head", 1234)),
        ("head", ("tcp", "head", 6380)),
        ("ws://[::1]:80/", ("ws", "::1", 80)),
        ("unix:/run/x.sock", ("unix", "/run/x.sock", 0)),
    ],
)
def test_addresses(text: str, meant: tuple[str, str, int]) -> None:
    assert tuple(addresses.parse(text)) == meant


@pytest.mark.parametrize("text", ["ftp://head:1", "tcp://:1", "tcp://head:x", "head:99999"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="write"):
        addresses.parse(text)


async def serve_one(listener: socket.socket, secret: bytes, outcome: list[object]) -> None:
    with trio.socket.from_stdlib_socket(listener) as accepting:
        connection, _ = await accepting.accept()
    link = SocketLink(socket.socket(fileno=connection.detach()))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.write_forever)
        try:
            side = Listener(secret)
            outcome.append(await receive_hello(link, side))
            link.send(side.accept(Welcome("n:1/1", "n:1")))
            while True:
                for frame in await link.receive():
                    assert isinstance(frame, memoryview)
                    link.send(bytes(frame))  # echo
        except (AuthenticationError, LinkClosed, ProtocolError) as error:
            outcome.append(error)
        finally:
            link.close()
            nursery.cancel_scope.cancel()


async def test_the_blocking_link_talks_to_a_trio_link() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    outcome: list[object] = []

    def dial() -> None:
        link = BlockingLink.connect(f"tcp://127.0.0.1:{port}", SECRET, Hello("driver", 3))
        assert link.welcome.process == "n:1/1"
        large = [References([bytes(20)] * 100_000, []), Query(1, "nodes")]
        link.send([Query(2, "x")])
        assert link.receive() == ([Query(2, "x")], [])
        sender = threading.Thread(target=link.send, args=(large,))
        sender.start()
        assert link.receive()[0] == large
        sender.join()
        assert link.receive(0.001) == ([], [])
        link.close()

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_one, listener, SECRET, outcome)
            await trio.to_thread.run_sync(dial)
    assert outcome[0] == Hello("driver", 3)


async def test_a_wrong_secret_is_a_clear_error_on_both_sides() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    outcome: list[object] = []

    def dial() -> None:
        with pytest.raises(AuthenticationError, match="secret"):
            BlockingLink.connect(f"tcp://127.0.0.1:{port}", b"wrong", Hello("driver"))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve_one, listener, SECRET, outcome)
            await trio.to_thread.run_sync(dial)
    assert isinstance(outcome[0], AuthenticationError)


async def test_a_dead_address_is_a_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionError, match=r"no cluster answers at tcp://127\.0\.0\.1"):
        BlockingLink.connect(f"tcp://127.0.0.1:{port}", SECRET, Hello("driver"))


async def test_bulk_lets_control_frames_pass() -> None:
    a, b = socket.socketpair()
    left, right = SocketLink(a), SocketLink(b)
    data = random.Random(1).randbytes(8 << 20)
    arena = bytearray(len(data))
    right.window = lambda transfer, position, size: memoryview(arena)[position : position + size]
    for link in (left, right):
        link.lift_limit()
    order: list[str] = []
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.write_forever)
            left.send_bulk(1, memoryview(data), lambda: order.append("gone"))
            left.send(b"urgent")
            arrived = 0
            while arrived < len(data):
                for frame in await right.receive():
                    if isinstance(frame, tuple):
                        arrived += frame[1]
                    else:
                        order.append(bytes(frame).decode())
                        assert arrived < len(data)
            nursery.cancel_scope.cancel()
    assert order == ["urgent", "gone"]
    assert arena == data
    left.close()
    right.close()


async def test_trio_links_shake_hands() -> None:
    a, b = socket.socketpair()
    left, right = SocketLink(a), SocketLink(b)
    hellos: list[Hello] = []

    async def listen() -> None:
        side = Listener(SECRET)
        hellos.append(await receive_hello(right, side))
        right.send(side.accept(Welcome("n:1/2", "n:1")))

    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(left.write_forever)
            nursery.start_soon(right.write_forever)
            nursery.start_soon(listen)
            assert (await shake_hands(left, Dialler(SECRET, Hello("node")))).process == "n:1/2"
            nursery.cancel_scope.cancel()
    assert hellos == [Hello("node")]
    left.close()
    right.close()
