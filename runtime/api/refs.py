"""References to objects.

An ``ObjectRef`` *is* its id: a ``bytes`` with no attributes of its own, so that hashing, comparing and looking up cost
what they cost for bytes. The process counts its references in the logs of the ``ClientCore`` it is bound to: making one
out of a value and dropping one is one ``append``, which is safe in any thread and in the garbage collector.
"""

import gc
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import repeat
from typing import TYPE_CHECKING, Any, Protocol

from trio_ray.runtime.core import ids

if TYPE_CHECKING:
    from concurrent.futures import Future

__all__ = ["ObjectRef", "bind", "restore", "unbind", "wake_with"]


MANY = 100
"""References that are made at once without a pause for the garbage collector."""


def _nowhere(object_id: object) -> None:
    """No core is bound: there is nobody to tell."""


_made: Callable[[bytes], None] = _nowhere
_made_many: Callable[[list[bytes]], None] = _nowhere
_dropped: Callable[[bytes], None] = _nowhere
_dropped_many: Callable[[list[bytes]], None] = _nowhere
_wake: Callable[[], None] | None = None
_collect: Callable[[bytes], None] = _nowhere


class Waiting(Protocol):
    """How a reference is awaited or made a future; the client that waits for objects provides it."""

    def future(self, ref: "ObjectRef") -> "Future[Any]":
        """A future of the object's value."""

    def awaited(self, ref: "ObjectRef") -> Generator[Any, Any, Any]:
        """What ``await ref`` runs."""


waiting: Waiting | None = None


class ObjectRef(bytes):
    """A reference to an object: a task's result or a put value, which may not exist yet.

    The object lives while a reference to it does, anywhere in the cluster. Pass references as arguments (a top-level
    one becomes its value), inside other objects, or read them with ``get`` or ``await``.
    """

    __slots__ = ()

    __iter__ = None  # type: ignore[assignment]  # a reference is no sequence of integers, ``for x in ref`` is a mistake

    def __new__(cls, binary: bytes) -> "ObjectRef":
        """A reference to the object with this id (20 bytes)."""
        if len(binary) != ids.OBJECT_ID_BYTES:
            raise ValueError(f"an object's id has {ids.OBJECT_ID_BYTES} bytes, not {len(binary)}")
        return restore(bytes(binary))

    def __del__(self, _whole: slice = slice(None)) -> None:
        try:
            _dropped(self[_whole])  # the fastest way to a copy that is plain bytes
            if _wake is not None:
                _wake()
        except TypeError:  # the interpreter is ending and has cleared this module
            pass

    def __reduce__(self) -> tuple[Any, ...]:
        object_id = bytes(self)
        _collect(object_id)
        return restore, (object_id,)

    def __copy__(self) -> "ObjectRef":
        return self

    def __deepcopy__(self, memo: object) -> "ObjectRef":
        return self

    def __repr__(self) -> str:
        return f"ObjectRef({self.hex()})"

    __str__ = __repr__

    def binary(self) -> bytes:
        """The id as bytes."""
        return bytes(self)

    def is_nil(self) -> bool:
        """Whether it refers to nothing."""
        return bytes(self) == _NIL

    @classmethod
    def nil(cls) -> "ObjectRef":
        """A reference to nothing."""
        return cls(_NIL)

    @classmethod
    def from_random(cls) -> "ObjectRef":
        """A reference with a random id; no object has it."""
        return cls(os.urandom(ids.OBJECT_ID_BYTES))

    @classmethod
    def size(cls) -> int:
        """The length of an id in bytes."""
        return ids.OBJECT_ID_BYTES

    def task_id(self) -> bytes:
        """The id of the task that makes the object."""
        return ids.task_of(bytes(self))

    def future(self) -> "Future[Any]":
        """A ``concurrent.futures.Future`` of the value."""
        if waiting is None:
            raise RuntimeError("trio_ray is not initialized in this process, so nobody can wait for the object")
        return waiting.future(self)

    def __await__(self) -> Generator[Any, Any, Any]:
        if waiting is None:
            raise RuntimeError("trio_ray is not initialized in this process, so nobody can wait for the object")
        return waiting.awaited(self)


_NIL = b"\xff" * ids.OBJECT_ID_BYTES
_new = bytes.__new__


def owned(object_id: bytes) -> ObjectRef:
    """A reference that the core has counted already: of a task just submitted, an object just put."""
    return _new(ObjectRef, object_id)


def restore(object_id: bytes) -> ObjectRef:
    """One more reference to an object, out of a pickled value or an id."""
    _made(object_id)
    return _new(ObjectRef, object_id)


def restore_list(object_ids: list[bytes]) -> list[ObjectRef]:
    """One more reference to each of these objects, as ``restore`` makes them."""
    # Python's collector counts each of them, and would look through the whole heap several times meanwhile.
    collecting = len(object_ids) > MANY and gc.isenabled()
    references: list[ObjectRef] = []
    try:
        if collecting:
            gc.disable()
        _made_many(object_ids)
        references.extend(map(_new, repeat(ObjectRef), object_ids))
        return references
    except BaseException:
        if not references:  # Ctrl-C, or a cancelled task, between the two: they are counted, and nobody has them
            _dropped_many(object_ids)
        raise
    finally:
        if collecting:
            gc.enable()


class Log(Protocol):
    """Takes in ids, from any thread and in the garbage collector."""

    def append(self, object_id: bytes, /) -> None:
        """One more."""

    def extend(self, object_ids: Iterable[bytes], /) -> None:
        """These more."""


class Counter(Protocol):
    """What counts references: a ``ClientCore``."""

    @property
    def made(self) -> Log:
        """References that came out of values."""

    @property
    def dropped(self) -> Log:
        """References that died."""


def bind(core: Counter) -> None:
    """From now on this process's references are counted in ``core``."""
    global _made, _made_many, _dropped, _dropped_many
    _made, _made_many = core.made.append, core.made.extend
    _dropped, _dropped_many = core.dropped.append, core.dropped.extend


def unbind() -> None:
    """References are counted nowhere: there is no session."""
    global _made, _made_many, _dropped, _dropped_many, _wake, waiting
    _made = _made_many = _dropped = _dropped_many = _nowhere
    _wake = waiting = None


@contextmanager
def bound(core: Counter, by: Waiting) -> Iterator[None]:
    """Within the block references are counted in ``core``, where drops are noticed anyway, and awaited through ``by``;
    afterwards as before."""
    global _made, _made_many, _dropped, _dropped_many, _wake, waiting
    before = _made, _made_many, _dropped, _dropped_many, _wake, waiting
    bind(core)
    _wake, waiting = None, by
    try:
        yield
    finally:
        _made, _made_many, _dropped, _dropped_many, _wake, waiting = before


def wake_with(wake: Callable[[], None] | None) -> None:
    """Call ``wake`` at the next drop (None: drops are noticed anyway). It may run in the garbage collector."""
    global _wake
    _wake = wake


def collect_with(collect: Callable[[bytes], None]) -> None:
    """Call ``collect`` with the id of every reference that is pickled."""
    global _collect
    _collect = collect


def wait_with(by: Waiting | None) -> None:
    """References are awaited through ``by``."""
    global waiting
    waiting = by
