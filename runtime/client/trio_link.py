"""The connection of a driver that sits elsewhere, over any of the transport's Trio links (WebSocket above all).

It shares no memory with its node: large values arrive as data frames. All of it runs in the thread of the Trio
program; with ``BackgroundTrio`` that is a thread of its own, and the program's threads block as on a local connection.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import trio

from trio_ray.runtime.api.context import TaskContext
from trio_ray.runtime.api.errors import ObjectStoreFullError, RaySystemError
from trio_ray.runtime.api.link import Payload
from trio_ray.runtime.api.refs import ObjectRef, owned
from trio_ray.runtime.api.serialize import Packed
from trio_ray.runtime.api.session import Session
from trio_ray.runtime.client.streams import Streams
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.messages import Answer, CreateFailed, ObjectCreated, Value
from trio_ray.runtime.core.split import frames
from trio_ray.runtime.core.waiter import Waiter
from trio_ray.runtime.transport.blocking import message_decoder
from trio_ray.runtime.transport.frames import MAX_CONTROL_BYTES
from trio_ray.runtime.transport.handshake import Hello, Welcome
from trio_ray.runtime.transport.links import Link as TransportLink
from trio_ray.runtime.transport.links import LinkClosed, dial

_encode = msgspec.msgpack.Encoder().encode
BY_VALUE_BYTES = MAX_CONTROL_BYTES - (1 << 20)
"""Values up to so many bytes are put within a message."""


class TrioConnection:
    """A ``Link`` over a Trio transport link; ``read_forever`` is to run in a task."""

    def __init__(self, link: TransportLink, welcome: Welcome) -> None:
        self._link = link
        self._token = trio.lowlevel.current_trio_token()
        self._thread = threading.get_ident()
        self.process = welcome.process
        self.node = welcome.node
        self.inline_limit = welcome.inline_limit
        self.core = ClientCore(welcome.process)
        self.lock = threading.Lock()
        self._clock_offset = welcome.clock - time.monotonic()
        self._scheduled = False
        self._streams = Streams(self.core)
        self._after: list[Callable[[], None]] = []
        link.window = self._streams.window

    def now(self) -> float:
        """See ``Link.now``."""
        return time.monotonic() + self._clock_offset

    # -- sending and reading -------------------------------------------------------------------------------------

    def flush_soon(self) -> None:
        """Send at the end of Trio's round."""
        if not self._scheduled:
            self._scheduled = True
            self.in_trio(self._flush_now)

    def flush(self) -> None:
        """Send now; from another thread, as soon as Trio gets to it."""
        if threading.get_ident() == self._thread:
            self._flush_now()
        else:
            self.flush_soon()
        if self.core.failure:
            raise RaySystemError(self.core.failure)

    def in_trio(self, callback: Callable[[], None]) -> None:
        """Call back in the thread of the connection."""
        _call_in(self._token, callback)

    def _flush_now(self) -> None:
        self._scheduled = False
        with self.lock:
            messages = self.core.take()
        if messages and not self.core.failure:
            for frame in frames(messages):
                self._link.send(_encode(frame))

    async def read_forever(self) -> None:
        """Take in what the node says, until the link is closed."""
        decode = message_decoder().decode
        try:
            while True:
                for frame in await self._link.receive():
                    with self.lock:
                        if isinstance(frame, tuple):
                            self._streams.arrived(*frame)
                        else:
                            self.core.receive(decode(frame))
                if self.core.out:
                    self._flush_now()
                self._call_after()
        except LinkClosed as closed:
            self.lost(f"the connection to the node is lost {closed}".rstrip())

    def lost(self, reason: str) -> None:
        """The link is closed: tell everybody who waits."""
        with self.lock:
            if not self.core.failure:
                self.core.lost(reason)
        self._call_after()

    def _call_after(self) -> None:
        callbacks, self._after = self._after, []
        for callback in callbacks:
            callback()

    # -- what the API asks for -----------------------------------------------------------------------------------

    def call_soon(self, callback: Callable[[], None]) -> Callable[[], None]:
        """See ``Link.call_soon``."""
        if trio.lowlevel.in_trio_run():
            token = trio.lowlevel.current_trio_token()
            if token is not self._token:
                return lambda: _call_in(token, callback)
        return lambda: self._after.append(callback)

    def _answer(self, start: Callable[[Callable[[Any], None]], None]) -> Any:
        """Call ``start`` with a callback, and block this thread until the callback was called; what with."""
        answers: list[Any] = []

        def begin(done: Callable[[], None]) -> bool:
            def answered(answer: Any) -> None:
                answers.append(answer)
                done()

            start(answered)
            return False

        self._block_for(begin, None)
        return answers[0]

    def _block_for(self, start: Callable[[Callable[[], None]], bool], timeout: float | None) -> bool:
        if threading.get_ident() == self._thread:
            raise RuntimeError(
                "a call that blocks (get, wait, …) was made from Trio's own thread, which would then read no answer; "
                "await the reference, or use the methods of the cluster"
            )
        event = threading.Event()
        with self.lock:
            if self.core.failure:
                raise RaySystemError(self.core.failure)
            there = start(event.set)
        if not there:
            self.flush()
            there = event.wait(timeout)
        if self.core.failure:
            raise RaySystemError(self.core.failure)
        return there

    def wait(
        self, object_ids: Sequence[bytes], count: int, timeout: float | None, *, fetch: bool,
        stop_at_error: bool = False,
    ) -> bool:  # fmt: skip
        """See ``Link.wait``."""
        waiters: list[Waiter] = []

        def start(done: Callable[[], None]) -> bool:
            waiters.append(Waiter(self.core, object_ids, count, done, fetch=fetch, stop_at_error=stop_at_error))
            return waiters[0].start()

        try:
            return self._block_for(start, timeout)
        finally:
            if waiters and not waiters[0].done:
                with self.lock:
                    waiters[0].cancel()

    def ask(self, subject: str, argument: str = "") -> bytes:
        """See ``Link.ask``."""
        answer: Answer = self._answer(lambda answered: self.core.ask(subject, argument, answered))
        if answer.error:
            raise LookupError(answer.error)
        return answer.body

    def store(self, object_id: bytes, packed: Packed) -> int:
        """See ``Link.store``: the bytes go as data frames."""
        created: ObjectCreated | CreateFailed = self._answer(
            lambda answered: self.core.create(object_id, packed.size, answered)
        )
        if isinstance(created, CreateFailed):
            raise ObjectStoreFullError(created.reason)
        sent = threading.Event()
        data = memoryview(packed.to_bytes())
        self.in_trio(lambda: self._link.send_bulk(created.transfer, data, sent.set))
        sent.wait()
        return created.offset

    def payload(self, value: Value, owner: object) -> Payload:
        """See ``Link.payload``."""
        return value.payload


class RemoteSession(Session):
    """The session of a driver elsewhere: what fits into a message is put by value, which never blocks."""

    def _store(self, context: TaskContext, payload: bytes | Packed, contained: tuple[bytes, ...]) -> ObjectRef:
        size = payload.size if isinstance(payload, Packed) else len(payload)
        if size > BY_VALUE_BYTES:
            return super()._store(context, payload, contained)
        object_id = ids.put_id(context.task_id, next(context.puts))
        self.core.put(object_id, payload.to_bytes() if isinstance(payload, Packed) else payload, contained)
        self.link.flush_soon()
        return owned(object_id)


class BackgroundTrio:
    """Trio in a thread of its own, with one connection: for plain programs. Ended by ``close``."""

    def __init__(self, address: str, secret: bytes, hello: Hello) -> None:
        """Connect. Raises ConnectionError and AuthenticationError with a sentence."""
        self._connected = threading.Event()
        self._errors: list[BaseException] = []
        self._cancel = trio.CancelScope()
        self.connection: TrioConnection
        self._thread = threading.Thread(
            target=self._run, args=(address, secret, hello), name="trio-ray-remote", daemon=True
        )
        self._thread.start()
        self._connected.wait()
        if self._errors:
            self._thread.join()
            raise self._errors[0]

    def _run(self, address: str, secret: bytes, hello: Hello) -> None:
        try:
            trio.run(self._serve, address, secret, hello)
        except BaseException as raised:
            error = raised
            while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
                error = error.exceptions[0]
            self._errors.append(error)
        finally:
            self._connected.set()

    async def _serve(self, address: str, secret: bytes, hello: Hello) -> None:
        with self._cancel:
            async with dial(address, secret, hello) as (link, welcome):
                connection = self.connection = TrioConnection(link, welcome)
                self._connected.set()
                await connection.read_forever()

    def start_pump(self) -> None:
        """Nothing to do: the thread is one."""

    def abandon(self) -> None:
        """In a forked child, which has no such thread."""
        self.connection.core.failure = "this process was forked from one that uses trio_ray"

    def close(self) -> None:
        """Leave the node and end the thread."""
        self.connection.lost("this process has left the cluster (trio_ray.shutdown)")
        self.connection.in_trio(self._cancel.cancel)
        self._thread.join()


def _call_in(token: trio.lowlevel.TrioToken, callback: Callable[[], None]) -> None:
    try:
        token.run_sync_soon(callback)
    except trio.RunFinishedError:
        pass  # that Trio run is over, and whoever waited in it with it
