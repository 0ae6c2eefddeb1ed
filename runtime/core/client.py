"""What a driver or worker process knows of its node: references, values that are ready, messages to send.

The state sits here; sockets, clocks and user data sit in the shell that owns the core. User code touches the core from
any thread, and references die whenever Python pleases, so everything that user code does is one ``append``, which the
interpreter makes atomic. All else (``take``, ``receive``, ``want``, ``watch``, …) is for one thread at a time.

How references are counted. The process counts its own ``ObjectRef``s; the node is told of the first and the last of
an object. Whoever submits a task or puts an object holds its reference without saying so. One that came out of a
value is logged in ``made`` and told to the node only if it is still alive when something else is told: until then the
container it came from keeps it alive. ``take`` reads the log of drops first, then the log of made ones, then what is
to be sent: a drop that it sees then has its making, and everything that was submitted before it, in the same batch,
and the batch tells the drops last.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import count
from typing import Protocol

from trio_ray.runtime.core.messages import (
    Address,
    Answer,
    AnyMessage,
    CreateFailed,
    CreateObject,
    Function,
    ObjectCreated,
    ObjectsReady,
    PutObjects,
    Query,
    References,
    SubmitTasks,
    TasksDone,
    Unpin,
    Value,
    WaitObjects,
    Where,
)
from trio_ray.runtime.core.spec import TaskSpec, TaskTemplate


class Listener(Protocol):
    """Somebody who waits for many objects."""

    def news(self, object_ids: Sequence[bytes], /) -> None:
        """These became ready (or only exist), or the link is lost."""


Watcher = Callable[[bytes], None]
"""Called with an object's id."""
INLINE = Where.INLINE
CROWD = 10_000
"""References that came and went since they were last counted."""
DROPPED_TOGETHER = 2_000
"""References that are told to be gone in one message, and so in one step of the node: a program that lets go of a
million at once keeps it busy for seconds, and others are to be served meanwhile."""
_GONE = Value(b"")
"""Stands for what was not there."""
Put = tuple[bytes, bytes, tuple[bytes, ...]]
Item = TaskSpec | TaskTemplate | Function | Put | AnyMessage
"""What waits to be sent, in order; ``take`` makes batches of neighbours of one kind."""


def _nothing_owned(value: Value) -> object:
    return None


class ClientCore:
    """The client side of the link between a process and its node."""

    def __init__(self, process: Address, adopt: Callable[[Value], object] = _nothing_owned) -> None:
        self.process = process
        self._adopt = adopt
        """Makes the owner of a ``SHARED`` value's read pin, as soon as the value arrives: when the owner dies, the
        shell appends the object's id to ``unpinned``."""
        self.counts: dict[bytes, int] = {}
        """How many ``ObjectRef``s this process has, as of the last ``take``."""
        self.values: dict[bytes, Value | None] = {}
        """Objects that are ready; None for those of which the node will tell without being asked (again)."""
        self.owners: dict[bytes, object] = {}
        """What ``adopt`` made for the values in ``values``."""
        self.made: list[bytes] = []
        self.dropped: list[bytes] = []
        self.unpinned: list[bytes] = []
        self.out: list[Item] = []
        self.stored: set[bytes] = set()
        """Large objects that this process put, and that are in its node's store: they are here, though not read."""
        self.streams: dict[int, Value] = {}
        """Values whose bytes are arriving, by transfer."""
        self.listeners: dict[Listener, None] = {}
        """Told of each batch of news: those who wait for many objects."""
        self.error_watchers: dict[Watcher, None] = {}
        """Called with the id of every object that turns out to be an error."""
        self.expected = 0
        """Objects the node is to tell of. Threads may miscount it: it is for judging how busy the node is, no more."""
        self.heard = 0
        """How often objects became ready, or known to exist, together."""
        self.some_elsewhere = False
        """Some object was told to exist without its bytes."""
        self.some_error = False
        """Some object turned out to be an error."""
        self.failure = ""
        """Why the link is closed; empty while it is open."""
        self.patient = False
        """Whoever calls ``take`` calls again soon while something is ``pending``."""
        self._untold: dict[bytes, None] = {}
        """References of which the node has not been told, in order."""
        self._uncounted: set[bytes] = set()
        """Objects that were asked for before their references were counted."""
        self._fetching: set[bytes] = set()
        """Objects whose bytes were asked for after they were told to exist."""
        self._watchers: dict[bytes, list[Watcher]] = {}
        self._creating: dict[bytes, Callable[[ObjectCreated | CreateFailed], None]] = {}
        self._asking: dict[int, Callable[[Answer], None]] = {}
        self._numbers = count(1)

    # -- what any thread may do, at any time ---------------------------------------------------------------------

    def submit(self, spec: TaskSpec, returns: Iterable[bytes]) -> None:
        """Run a task whose return values are ``returns``; this process holds one reference to each."""
        for object_id in returns:
            self.counts[object_id] = self.counts.get(object_id, 0) + 1
            if object_id not in self.values:
                self.values[object_id] = None
                self.expected += 1
        self.out.append(spec)

    def put(self, object_id: bytes, payload: bytes, contained: tuple[bytes, ...]) -> None:
        """Store a small object; this process holds one reference to it, and its value already."""
        self.own(object_id, Value(object_id, Where.INLINE, payload, 0, len(payload)))
        self.out.append((object_id, payload, contained))

    def own(self, object_id: bytes, value: Value) -> None:
        """This process put an object and holds one reference, which the node knows of."""
        self.counts[object_id] = self.counts.get(object_id, 0) + 1
        self.values[object_id] = value
        if value.where == Where.ELSEWHERE:
            self.some_elsewhere = True
            self.stored.add(object_id)

    def send(self, item: Item) -> None:
        """Anything else, after what was sent before; a template or function goes before its first task."""
        self.out.append(item)

    def readable(self, object_id: bytes) -> bool:
        """Whether the object's bytes (or its error) are here."""
        value = self.values.get(object_id)
        return value is not None and value.where != Where.ELSEWHERE

    @property
    def pending(self) -> bool:
        """Whether ``take`` has anything to do."""
        return bool(self.out or self.dropped or self.made or self.unpinned or self._untold)

    @property
    def crowded(self) -> bool:
        """Whether to flush before more references are made: counting many that came and went is cheaper while they are
        in the processor's caches."""
        return len(self.made) + len(self.dropped) > CROWD

    # -- what one thread at a time may do ------------------------------------------------------------------------

    def want(self, object_ids: Iterable[bytes], *, fetch: bool) -> None:
        """Ask for those objects that the node will not tell of by itself; with ``fetch``, for their bytes too."""
        values = self.values
        # Copies: a reference in our tables would keep itself alive.
        ask = [bytes(object_id) for object_id in object_ids if object_id not in values]
        if ask:
            self._uncounted.update(object_id for object_id in ask if object_id not in self.counts)
            fresh: dict[bytes, Value | None] = dict.fromkeys(ask)
            values.update(fresh)
            self.expected += len(fresh)
            ask = list(fresh)
        if fetch and self.some_elsewhere:
            for wanted in object_ids:
                value = values.get(wanted)
                if value is not None and value.where == Where.ELSEWHERE and wanted not in self._fetching:
                    object_id = bytes(wanted)
                    self._fetching.add(object_id)
                    ask.append(object_id)
        if ask:
            self.out.append(WaitObjects(ask, fetch))

    def watch(self, object_id: bytes, callback: Watcher) -> None:
        """Call back (from ``receive``, ``streamed`` or ``lost``) with its id at the next news of the object."""
        self._watchers.setdefault(object_id, []).append(callback)

    def unwatch(self, object_id: bytes, callback: Watcher) -> None:
        """Take back a ``watch``; one that was called is ignored."""
        callbacks = self._watchers.get(object_id)
        if callbacks and callback in callbacks:
            callbacks.remove(callback)
            if not callbacks:
                self._watchers.pop(object_id, None)

    def create(self, object_id: bytes, size: int, callback: Callable[[ObjectCreated | CreateFailed], None]) -> None:
        """Ask for ``size`` bytes of the arena."""
        self._creating[object_id] = callback
        self.out.append(CreateObject(object_id, size))

    def ask(self, subject: str, argument: str, callback: Callable[[Answer], None]) -> None:
        """Ask for a view of the cluster."""
        number = next(self._numbers)
        self._asking[number] = callback
        self.out.append(Query(number, subject, argument))

    def take(self, done: TasksDone | None = None) -> list[AnyMessage]:
        """What is to be sent now, in ``split.frames``. A worker's results stand after the references they may carry are
        held, and before those it dropped are let go.

        If the shell is ``patient``, new references alone are no reason for a frame: what they came from is held. They
        go with the next, or when the logs have come to rest.
        """
        dropped = self._drain(self.dropped)
        made = self._drain(self.made)
        messages: list[AnyMessage] = []
        if self.out:
            self._batch(messages)
        removed: list[bytes] = []
        if made or dropped:
            removed = self._count(made, dropped)
        unpinned = self._drain(self.unpinned) if self.unpinned else None
        added: list[bytes] = []
        if self._untold and (not (self.patient and made) or done is not None or messages or removed or unpinned):
            added, self._untold = list(self._untold), {}
        if done is not None:
            if added:
                messages.append(References(added, []))
                added = []
            messages.append(done)
        if unpinned is not None:
            messages.append(Unpin(unpinned))
        if added or removed:
            messages.append(References(added, removed[:DROPPED_TOGETHER]))
            for start in range(DROPPED_TOGETHER, len(removed), DROPPED_TOGETHER):
                messages.append(References([], removed[start : start + DROPPED_TOGETHER]))
        return messages

    @staticmethod
    def _drain(log: list[bytes]) -> list[bytes]:
        entries = log[:]
        del log[: len(entries)]  # what came meanwhile stays
        return entries

    def _batch(self, messages: list[AnyMessage]) -> None:
        items = self.out[:]
        del self.out[: len(items)]
        specs: list[TaskSpec] = []
        templates: list[TaskTemplate] = []
        functions: list[Function] = []
        puts: list[Put] = []
        for item in items:
            kind = type(item)
            if kind is TaskSpec:
                specs.append(item)  # type: ignore[arg-type]
            elif kind is tuple:
                # A put may come before tasks that were submitted earlier, unless it holds references to their results.
                if item[2] and specs:  # type: ignore[index]
                    self._close(messages, puts, specs, templates, functions)
                    specs, templates, functions, puts = [], [], [], []
                puts.append(item)  # type: ignore[arg-type]
            elif kind is TaskTemplate:
                templates.append(item)  # type: ignore[arg-type]
            elif kind is Function:
                functions.append(item)  # type: ignore[arg-type]
            else:
                if specs or puts:
                    self._close(messages, puts, specs, templates, functions)
                    specs, templates, functions, puts = [], [], [], []
                messages.append(item)  # type: ignore[arg-type]
        if specs or puts or templates or functions:
            self._close(messages, puts, specs, templates, functions)

    @staticmethod
    def _close(
        messages: list[AnyMessage], puts: list[Put], specs: list[TaskSpec], templates: list[TaskTemplate],
        functions: list[Function],
    ) -> None:  # fmt: skip
        if puts:
            messages.append(PutObjects(puts))
        if specs or templates or functions:
            messages.append(SubmitTasks(specs, templates, functions))

    def _count(self, made: list[bytes], dropped: list[bytes]) -> list[bytes]:
        """Count references; those of which the node knows and this process had its last."""
        counts, untold = self.counts, self._untold
        # Programs read lists of thousands of references and let go of them: most cancel out before they are counted.
        left: dict[bytes, int] = Counter(made)
        gone = dropped
        if left:
            gone, pop = [], left.pop
            for object_id in dropped:
                more = pop(object_id, 0)
                if more > 1:
                    left[object_id] = more - 1
                elif not more:
                    gone.append(object_id)
        for object_id, more in left.items():
            have = counts.get(object_id)
            if have is None:
                counts[object_id] = more
                untold[object_id] = None
            else:
                counts[object_id] = have + more
        removed: list[bytes] = []
        for object_id in gone:
            have = counts.get(object_id)
            if have is None:
                continue
            if have > 1:
                counts[object_id] = have - 1
                continue
            del counts[object_id]
            if object_id in untold:
                del untold[object_id]
            else:
                removed.append(object_id)
            self._forget(object_id)
        if self._uncounted:
            for object_id in self._uncounted.intersection(made):
                if object_id not in counts:  # it came and went within this batch
                    self._forget(object_id)
            self._uncounted.clear()
        return removed

    def _forget(self, object_id: bytes) -> None:
        """Its last reference is gone: what is known of it is known no more."""
        if self.values.pop(object_id, _GONE) is None:
            self.expected -= 1
        if self.owners:
            self.owners.pop(object_id, None)
        if self.stored:
            self.stored.discard(object_id)
        if self._fetching:
            self._fetching.discard(object_id)

    def receive(self, messages: Iterable[AnyMessage]) -> list[AnyMessage]:
        """Take in what the node says; answers with those messages that are for a worker."""
        others: list[AnyMessage] = []
        for message in messages:
            kind = type(message)
            if kind is ObjectsReady:
                self._ready(message.values)  # type: ignore[union-attr]
            elif kind is ObjectCreated or kind is CreateFailed:
                create = self._creating.pop(message.object_id, None)  # type: ignore[union-attr]
                if create is not None:
                    create(message)  # type: ignore[arg-type]
            elif kind is Answer:
                asked = self._asking.pop(message.number, None)  # type: ignore[union-attr]
                if asked is not None:
                    asked(message)  # type: ignore[arg-type]
            else:
                others.append(message)
        return others

    def _ready(self, news: list[Value]) -> None:
        values, told = self.values, []
        for value in news:
            object_id, where = value.object_id, value.where
            if where is not INLINE:
                if where is Where.STREAMED:
                    self.streams[value.offset] = value
                    continue
                if where is Where.SHARED:
                    owner = self._adopt(value)  # before anything else: the pin must end even if nobody wants the value
                    if object_id in values:
                        self.owners[object_id] = owner
                else:
                    self.some_elsewhere = True
            before = values.get(object_id, _GONE)
            if before is _GONE:
                continue  # its last reference was dropped meanwhile
            if before is None:
                self.expected -= 1
            values[object_id] = value
            told.append(object_id)
            if value.error:
                self.some_error = True
            if self._fetching and where is not Where.ELSEWHERE:
                self._fetching.discard(object_id)
        self.heard += 1
        if told:
            self._tell(told)

    def _tell(self, told: list[bytes]) -> None:
        watchers = self._watchers
        if watchers:
            for object_id in told:
                callbacks = watchers.pop(object_id, None)
                if callbacks:
                    for callback in callbacks:
                        callback(object_id)
        for listener in list(self.listeners):
            listener.news(told)
        if self.error_watchers:
            for object_id in told:
                value = self.values.get(object_id)
                if value is not None and value.error:
                    for on_error in list(self.error_watchers):
                        on_error(object_id)

    def streamed(self, transfer: int, payload: bytes) -> None:
        """All bytes of a ``STREAMED`` value have arrived."""
        told = self.streams.pop(transfer)
        self._ready([Value(told.object_id, Where.INLINE, payload, 0, told.size, told.error)])

    def lost(self, reason: str) -> None:
        """The link is closed: everybody who waits is told to look."""
        self.failure = reason
        creating, self._creating = self._creating, {}
        for object_id, create in creating.items():
            create(CreateFailed(object_id, reason))
        asking, self._asking = self._asking, {}
        for number, asked in asking.items():
            asked(Answer(number, b"", reason))
        watchers, self._watchers = self._watchers, {}
        for object_id, callbacks in watchers.items():
            for callback in callbacks:
                callback(object_id)
        for listener in list(self.listeners):
            listener.news(())
