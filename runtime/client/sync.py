"""The connection of a process whose threads block: a driver of the synchronous API, and every worker.

Whoever needs something reads the socket itself: a hop to another thread and back would cost as much again as the hop
to the node. Among several threads that wait, one *leads*: it reads for all, and hands over when it has what it wants.
A background thread, the pump, stands in where no thread of the program does: it sends what nobody flushed, and reads
when nobody waits, so that futures complete, dropped references are told and the node's messages never pile up. It
costs nothing while the program works: it looks in every couple of milliseconds, and when nothing moves it sleeps in
the kernel until something does.

Locks, in the order in which they may be taken: ``_reading`` (who leads), ``_sending`` (frames leave in the order in
which they were taken from the core), ``lock`` (the core itself).
"""

import os
import select
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from trio_ray.runtime.api import refs
from trio_ray.runtime.api.errors import ObjectStoreFullError, RaySystemError
from trio_ray.runtime.api.link import Payload
from trio_ray.runtime.api.serialize import Packed
from trio_ray.runtime.client.memory import SharedMemory
from trio_ray.runtime.client.streams import Streams
from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.messages import Answer, AnyMessage, CreateFailed, ObjectCreated, Value, Where
from trio_ray.runtime.core.split import frames, halves
from trio_ray.runtime.core.waiter import Waiter
from trio_ray.runtime.transport.blocking import BlockingLink
from trio_ray.runtime.transport.frames import CHUNK_BYTES, ProtocolError
from trio_ray.runtime.transport.handshake import Hello
from trio_ray.runtime.transport.spinning import SPIN_S, Spinning

BATCH = 128
"""Submissions that make a frame worth sending at once."""
QUIET_S = 0.0005
"""When nothing was sent for so long, a submission goes out at once: it is one of few."""
TICK_S = 0.002
"""How often the pump looks in while the program is busy."""
QUIET_TICKS = 3
"""When nothing was read for so many ticks, the pump reads."""
INTERRUPTED = (
    "the program was interrupted in the middle of a message to or from its node, so the connection cannot go on; call "
    "trio_ray.shutdown() and trio_ray.init() to connect anew"
)


class SyncConnection:
    """A ``Link`` over a blocking socket. Made by ``connect``, ended by ``close``."""

    def __init__(self, link: BlockingLink) -> None:
        welcome = link.welcome
        self._link = link
        self.process = welcome.process
        self.node = welcome.node
        self.inline_limit = welcome.inline_limit
        self.welcome = welcome
        self.core = ClientCore(welcome.process, self._adopt)
        self.lock = threading.Lock()
        self._reading = threading.Lock()
        self._sending = threading.Lock()
        self._memory: SharedMemory | None = None
        if welcome.arena_path:
            self._memory = SharedMemory(welcome.arena_path, welcome.arena_bytes, self._unpinned)
        self._clock_offset = 0.0 if welcome.arena_path else welcome.clock - time.monotonic()
        self._streams = Streams(self.core)
        self._parked: deque[Any] = deque()
        """Locks of threads that wait while another leads."""
        self._after: deque[Callable[[], None]] = deque()
        """To be called when no lock is held."""
        self._buffered = 0
        self._flushed_at = 0.0
        self._reads = 0
        """Counts what was read, so that the pump sees whether somebody reads."""
        self._half_sent = False
        self._half_read = False
        """A thread is within a send, a read. If it is still set when another begins one, Ctrl-C ended that one in the
        middle, and what the two sides believe of each other may no longer be true."""
        self.closed = False
        self.flush_later: Callable[[], None] | None = None
        """Set while a Trio task reads instead of the pump: arranges for a flush in Trio's next round."""
        self._asleep = False
        """The pump sleeps until it is woken."""
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_read, False)
        os.set_blocking(self._wake_write, False)
        self._ready_poll = select.poll()
        self._ready_poll.register(link.fileno(), select.POLLIN)
        self._spinning = Spinning()
        self._pump: threading.Thread | None = None

    def start_pump(self) -> None:
        """Let the pump work, in a thread of its own."""
        self._pump = threading.Thread(target=self._run_pump, name="trio-ray-pump", daemon=True)
        self._pump.start()
        self.core.patient = True

    # -- the core's view of a worker's extra work: overridden there ------------------------------------------------

    def take(self) -> list[AnyMessage]:
        """What is to be sent; called under ``lock``."""
        return self.core.take()

    def receive(self, messages: list[AnyMessage]) -> None:
        """What arrived; called under ``lock``."""
        self.core.receive(messages)

    @property
    def pending(self) -> bool:
        """Whether a flush has anything to send."""
        return self.core.pending

    # -- sending -------------------------------------------------------------------------------------------------

    def now(self) -> float:
        """The node's clock."""
        return time.monotonic() + self._clock_offset

    def flush_soon(self) -> None:
        """Send when a batch is worth it, or when the node has nothing else to do; else leave it to the pump."""
        self._buffered += 1
        if self.flush_later is not None:
            if self._buffered >= BATCH:
                self.flush()
            else:
                self.flush_later()
        elif self._buffered >= BATCH or (
            self.core.expected <= self._buffered and time.monotonic() - self._flushed_at > QUIET_S
        ):
            self.flush()
        elif self._asleep:
            self._wake_pump()

    def flush(self) -> None:
        """Send what was added, now. Raises ``RaySystemError`` when the link is lost."""
        with self._sending:
            if self._half_sent:
                self._half_sent = False
                self._lost(INTERRUPTED)
            self._half_sent = True
            with self.lock:
                self._buffered = 0
                messages = self.take()
            if messages:
                self._flushed_at = time.monotonic()
                try:
                    for frame in frames(messages):
                        self._send(frame)
                except (ConnectionError, ValueError) as error:
                    self._half_sent = False
                    self._lost(str(error))
            self._half_sent = False
        if self.core.failure:
            raise RaySystemError(self.core.failure)

    def _send(self, messages: list[AnyMessage]) -> None:
        try:
            self._link.send(messages)
        except ProtocolError:  # too much for one frame; nothing of it has been sent
            for half in halves(messages):
                self._send(half)

    # -- reading -------------------------------------------------------------------------------------------------

    def read_now(self) -> None:
        """Take in what has arrived; called by whoever leads (or from Trio), when there is something."""
        if self._half_read:
            self._half_read = False
            self._lost(INTERRUPTED)
            return
        self._half_read = True
        try:
            messages, data = self._link.receive(0)
        except ConnectionError as error:
            self._half_read = False
            self._lost(str(error))
            return
        self._reads += 1
        with self.lock:
            if messages:
                self.receive(messages)
            for transfer, size in data:
                self._streams.arrived(transfer, size)
        self._half_read = False
        if self.core.out:
            self.flush()
        self._call_after()

    def _lost(self, reason: str) -> None:
        with self.lock:
            if not self.core.failure:
                self.core.lost(reason)
        for parked in list(self._parked):
            _release(parked)
        self._call_after()

    def _call_after(self) -> None:
        while self._after:
            self._after.popleft()()

    def lead(self, done: Callable[[], bool], parked: Any, timeout: float | None, *, spin: bool = False) -> bool:
        """Block this thread until ``done()``; ``parked`` is a held lock that is released when it may be so.

        ``spin``: look for a moment before sleeping, if that has paid off lately. False when ``timeout`` (seconds)
        passed before.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not done():
            if self._reading.acquire(blocking=False):
                if self._lead(done, until, spin):
                    return done()
                continue
            self._parked.append(parked)
            try:
                # Only now is it certain that a leader who leaves sees this thread; one may have left just before.
                if self._reading.acquire(blocking=False):
                    if self._lead(done, until, spin):
                        return done()
                    continue
                if self._asleep:
                    self._wake_pump()  # it leads; a thread that waits does that itself, and faster
                left = -1 if until is None else until - time.monotonic()
                if until is not None and left <= 0:
                    return False
                parked.acquire(timeout=left)
            finally:
                self._parked.remove(parked)
        return True

    def _lead(self, done: Callable[[], bool], until: float | None, spin: bool) -> bool:
        """Read, holding ``_reading``, until done; True if the time is up."""
        poll = self._ready_poll.poll
        try:
            if spin and self._spinning.worth_it(self.core.expected):
                self._spin(done, until)
            while not done():
                if until is None:
                    ready = poll()
                else:
                    left = until - time.monotonic()
                    ready = poll(max(left, 0) * 1000)
                    if not ready and left <= 0:
                        return True
                if ready:
                    self.read_now()
            return False
        finally:
            self._reading.release()
            self._hand_over()

    def _spin(self, done: Callable[[], bool], until: float | None) -> None:
        """Read, for a moment only, without sleeping."""
        poll, clock = self._ready_poll.poll, time.monotonic
        end = clock() + SPIN_S
        if until is not None and until < end:
            end = until
        while not done():
            while not poll(0):
                if clock() >= end:
                    self._spinning.learn(arrived=False)
                    return
            self.read_now()
        self._spinning.learn(arrived=True)

    def _hand_over(self) -> None:
        """This thread leads no longer: another that waits is to."""
        if self._parked:
            _release(self._parked[0])
        elif self._asleep and self.flush_later is None:
            self._wake_pump()

    # -- the pump ------------------------------------------------------------------------------------------------

    def flush_some_time(self) -> None:
        """Something waits to be sent: Trio, or the pump, is to see to it."""
        if self.flush_later is not None:
            self.flush_later()
        elif self._asleep:
            self._wake_pump()

    def _wake_pump(self) -> None:
        if not self._asleep:
            return  # somebody has woken it; it takes until it gets the interpreter's lock
        self._asleep = False
        try:
            os.write(self._wake_write, b"w")
        except (BlockingIOError, OSError):
            pass  # it has been woken often enough, or is gone

    def _run_pump(self) -> None:
        wake_only = select.poll()
        wake_only.register(self._wake_read, select.POLLIN)
        either = select.poll()
        either.register(self._wake_read, select.POLLIN)
        either.register(self._link.fileno(), select.POLLIN)
        seen, still, rested = -1, 0, False
        while not self.closed and not self.core.failure:
            if self.flush_later is not None:
                self._sleep(wake_only, lambda: self.flush_later is None)
                continue
            if rested and not self.core.out:  # woken by one reference that died; where there is one there are more
                wake_only.poll(TICK_S * 1000)
            rested = False
            if self.pending:
                try:
                    self.flush()
                except RaySystemError:
                    return
            if self._reads != seen:
                seen, still = self._reads, 0
            else:
                still += 1
            if still < QUIET_TICKS:
                wake_only.poll(TICK_S * 1000)
                self._drain_wakes()
            elif self._reading.acquire(blocking=False):
                rested = True
                try:
                    self._sleep(either, lambda: self.pending or bool(self._parked) or self.flush_later is not None)
                    if self.flush_later is None and self._ready_poll.poll(0):
                        self.read_now()
                except RaySystemError:
                    return
                finally:
                    self._reading.release()
                    if self._parked:
                        _release(self._parked[0])
                        still = 0
            else:  # a thread of the program reads; it wakes the pump when it stops
                self._sleep(wake_only, lambda: self.pending or not self._reading.locked())
                still, rested = 0, True

    def _sleep(self, poll: select.poll, stay_awake: Callable[[], bool]) -> None:
        """Wait for ``poll``, or to be woken; whoever changes what ``stay_awake`` looks at looks at ``_asleep`` then."""
        self._asleep = True
        if self.flush_later is None:
            refs.wake_with(self._wake_pump)
        if not stay_awake() and not self.closed:
            poll.poll()
        self._asleep = False
        if self.flush_later is None:
            refs.wake_with(None)
        self._drain_wakes()

    def _drain_wakes(self) -> None:
        try:
            os.read(self._wake_read, 4096)
        except (BlockingIOError, OSError):
            pass

    # -- under Trio ----------------------------------------------------------------------------------------------

    def fileno(self) -> int:
        """Of the socket, to wait on."""
        return self._link.fileno()

    def hand_to_trio(self, flush_later: Callable[[], None] | None) -> None:
        """From now on a Trio task reads, and ``flush_later`` arranges for a flush (None: the pump does both again)."""
        self.flush_later = flush_later
        self.core.patient = flush_later is None and self._pump is not None
        refs.wake_with(flush_later)
        self._wake_pump()
        with self._reading:
            pass  # the pump has let go, or sees that it is not to begin

    def read_if_free(self) -> None:
        """Take in what has arrived, unless another thread is about to."""
        if self._reading.acquire(blocking=False):
            try:
                self.read_now()
            finally:
                self._reading.release()
                self._hand_over()

    # -- what the API asks for -----------------------------------------------------------------------------------

    def wait(
        self, object_ids: Sequence[bytes], count: int, timeout: float | None, *, fetch: bool,
        stop_at_error: bool = False,
    ) -> bool:  # fmt: skip
        """See ``Link.wait``."""
        if count == 1 and self.core.readable(object_ids[0]):
            return True  # as for most in a loop that waits for one of many
        parked = threading.Lock()
        parked.acquire()
        waiter = Waiter(
            self.core, object_ids, count, lambda: _release(parked), fetch=fetch, stop_at_error=stop_at_error
        )
        with self.lock:
            there = waiter.start()
        if not there:
            try:
                self.wait_begins()
                try:
                    self.flush()
                    there = self.lead(lambda: waiter.done, parked, timeout, spin=True)
                finally:
                    self.wait_ends()
            finally:
                if not waiter.done:
                    with self.lock:
                        waiter.cancel()
        if self.core.failure:
            raise RaySystemError(self.core.failure)
        return there

    def wait_begins(self) -> None:
        """This thread is about to wait for objects."""

    def wait_ends(self) -> None:
        """It goes on."""

    def _block_for(self, start: Callable[[Callable[[Any], None]], None]) -> Any:
        """Call ``start`` with a callback, and block this thread until the callback was called; what with."""
        parked = threading.Lock()
        parked.acquire()
        answers: list[Any] = []

        def answered(answer: Any) -> None:
            answers.append(answer)
            _release(parked)

        with self.lock:
            if self.core.failure:
                raise RaySystemError(self.core.failure)
            start(answered)
        self.flush()
        self.lead(lambda: bool(answers), parked, None)
        return answers[0]

    def ask(self, subject: str, argument: str = "") -> bytes:
        """See ``Link.ask``."""
        answer: Answer = self._block_for(lambda answered: self.core.ask(subject, argument, answered))
        if self.core.failure:
            raise RaySystemError(self.core.failure)
        if answer.error:
            raise LookupError(answer.error)
        return answer.body

    def store(self, object_id: bytes, packed: Packed) -> int:
        """See ``Link.store``."""
        if self.core.dropped:
            self.flush()  # what it frees may make the room, and its pages are warm
        created: ObjectCreated | CreateFailed = self._block_for(
            lambda answered: self.core.create(object_id, packed.size, answered)
        )
        if isinstance(created, CreateFailed):
            if self.core.failure:
                raise RaySystemError(self.core.failure)
            if created.reason:
                raise ObjectStoreFullError(created.reason)
            return 0  # a task that runs again made it before: the first copy stands
        if created.transfer:
            self._stream(created.transfer, packed)
        else:
            assert self._memory is not None
            self._memory.write(created.offset, packed.parts, packed.size)
        return created.offset

    def _stream(self, transfer: int, packed: Packed) -> None:
        with self._sending:
            end = 0
            for place, part in packed.parts:
                if place > end:
                    self._link.send_data(transfer, end, memoryview(bytes(place - end)))
                view = memoryview(part)
                for begin in range(0, len(view), CHUNK_BYTES):
                    self._link.send_data(transfer, place + begin, view[begin : begin + CHUNK_BYTES])
                end = place + len(view)

    def payload(self, value: Value, owner: object) -> Payload:
        """See ``Link.payload``."""
        if value.where == Where.SHARED:
            return SharedMemory.view(owner)
        return value.payload

    def call_soon(self, callback: Callable[[], None]) -> Callable[[], None]:
        """See ``Link.call_soon``."""
        trio = sys.modules.get("trio")
        if trio is None or not trio.lowlevel.in_trio_run():
            return lambda: self._after.append(callback)
        token = trio.lowlevel.current_trio_token()
        thread = threading.get_ident()

        def call() -> None:
            if threading.get_ident() == thread:
                self._after.append(callback)
            else:
                try:
                    token.run_sync_soon(callback)
                except trio.RunFinishedError:
                    pass  # nobody waits any more

        return call

    # -- shared memory and streams ---------------------------------------------------------------------------------

    def _adopt(self, value: Value) -> object:
        assert self._memory is not None
        return self._memory.adopt(value.object_id, value.offset, value.size)

    def _unpinned(self, object_id: bytes) -> None:
        self.core.unpinned.append(object_id)
        self.flush_some_time()

    def window(self, transfer: int, position: int, size: int) -> memoryview:
        """Where the bytes of a streamed value go."""
        return self._streams.window(transfer, position, size)

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Leave the node. Waiting threads get an error; views of shared memory stay valid."""
        if self.closed:
            return
        self.closed = True
        self._link.close()
        self._lost("this process has left the cluster (trio_ray.shutdown)")
        self._wake_pump()
        if self._pump is not None and self._pump is not threading.current_thread():
            self._pump.join()
        os.close(self._wake_read)
        os.close(self._wake_write)
        self.core.owners.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None  # views that are out keep the mapping, not us

    def abandon(self) -> None:
        """In a forked child: forget the parent's connection without ending it."""
        self.closed = True
        self.core.failure = "this process was forked from one that uses trio_ray, and has no connection of its own"


Connection = TypeVar("Connection", bound=SyncConnection)


def connect(kind: type[Connection], address: str, secret: bytes, hello: Hello) -> Connection:
    """Connect to the node at ``address``. Raises ConnectionError and AuthenticationError with a sentence."""
    made: list[Connection] = []
    link = BlockingLink.connect(address, secret, hello, lambda *place: made[0].window(*place))
    try:
        connection = kind(link)
    except FileNotFoundError:
        link.close()
        raise ConnectionError(f"the node at {address} ended while this process entered the cluster") from None
    made.append(connection)
    return connection


def _release(parked: Any) -> None:
    try:
        parked.release()
    except RuntimeError:
        pass  # it was released already
