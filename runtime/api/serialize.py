"""Values to bytes and back.

The first byte of a payload tells its layout:

- ``0x80`` a plain pickle (every pickle of protocol 2 or later begins so: nothing is copied to add or strip a header)
- ``1``    a pickle whose buffers stand beside it, each at a multiple of 64 bytes, so that arrays are read in place
- ``2``    an error of user code: its text, which the core can read, and a pickled ``RayTaskError``
- ``3``    an error of the system: msgpack of its class's name and a sentence
- ``4``    a list of nothing but references: their ids, one after the other

Plain values take the C pickler. What it refuses (lambdas, local classes), and what it would pickle by a name that only
this process's ``__main__`` can resolve, goes to cloudpickle.
"""

import pickle
import sys
import threading
from collections.abc import Sequence
from struct import Struct
from typing import TYPE_CHECKING, Any

import msgspec

from trio_ray.runtime.api import errors, refs
from trio_ray.runtime.api.link import Payload
from trio_ray.runtime.core import failures
from trio_ray.runtime.core.ids import OBJECT_ID_BYTES

if TYPE_CHECKING:
    from pickle import PickleBuffer

PICKLE, BUFFERS, USER_ERROR, SYSTEM_ERROR, REFERENCES = 0x80, 1, 2, 3, 4
ALIGNMENT = 64
_HEADER = Struct("<B3xIQ")
"""Layout, number of buffers, length of the pickle; then the buffers' lengths, the pickle, the buffers."""

_ONLY_REFS = {refs.ObjectRef}
_MANY_IDS = Struct(f"{OBJECT_ID_BYTES}s" * 256)
_dumps, _loads = pickle.dumps, pickle.loads
NONE = _dumps(None, 5)
_PLAIN = frozenset((type(None), bool, int, float, complex, str, bytes, bytearray))
"""Values of these types hold no references, and name no class that would have to be looked for in the pickle."""


class _Found(threading.local):
    """The references that this thread's pickling met."""

    def __init__(self) -> None:
        self.refs: list[bytes] = []


_found = _Found()
refs.collect_with(lambda object_id: _found.refs.append(object_id))


class Packed:
    """A payload in parts, to be written in one go where it belongs."""

    __slots__ = ("parts", "size")

    def __init__(self, parts: list[tuple[int, Payload]], size: int) -> None:
        self.parts = parts
        """``(offset, bytes)``, in order; what lies between is padding."""
        self.size = size
        """In bytes, all in all."""

    def to_bytes(self) -> bytes:
        """The payload in one piece."""
        whole = bytearray(self.size)
        for offset, part in self.parts:
            whole[offset : offset + len(part)] = part
        return bytes(whole)


def serialize(value: object, inline_limit: int) -> tuple[bytes | Packed, tuple[bytes, ...]]:
    """A value's payload, and the ids of the references inside it.

    The payload is ``bytes`` up to ``inline_limit``, ``Packed`` beyond. Raises TypeError, with a sentence, for what
    cannot be pickled.
    """
    if type(value) in _PLAIN:
        data = _dumps(value, 5)
        return (data if len(data) <= inline_limit else Packed([(0, data)], len(data))), ()
    if type(value) is list and value and type(value[0]) is refs.ObjectRef and set(map(type, value)) == _ONLY_REFS:
        return _references(value, inline_limit)
    found = _found.refs
    if found:
        found.clear()
    buffers: list[PickleBuffer] = []
    try:
        data = _dumps(value, 5, buffer_callback=buffers.append)
        if b"__main__" in data or _by_value_modules():
            raise pickle.PicklingError
    except Exception:
        found.clear()
        buffers.clear()
        data = _cloudpickle(value, buffers)
    contained: tuple[bytes, ...] = ()
    if found:
        contained = tuple(dict.fromkeys(found))
        found.clear()
    if buffers:
        packed = _pack(data, buffers)
        return (packed if packed.size > inline_limit else packed.to_bytes()), contained
    if len(data) > inline_limit:
        return Packed([(0, data)], len(data)), contained
    return data, contained


def _references(value: list[refs.ObjectRef], inline_limit: int) -> tuple[bytes | Packed, tuple[bytes, ...]]:
    """Thousands of references in a list are common, and pickling them one by one takes ten times as long."""
    data = bytes((REFERENCES,)) + b"".join(value)
    contained = tuple(dict.fromkeys(_ids(data)))
    return (Packed([(0, data)], len(data)) if len(data) > inline_limit else data), contained


def _ids(data: bytes) -> list[bytes]:
    found: list[bytes] = []
    at, whole = 1, len(data) - _MANY_IDS.size
    while at <= whole:
        found += _MANY_IDS.unpack_from(data, at)
        at += _MANY_IDS.size
    found += [data[one : one + OBJECT_ID_BYTES] for one in range(at, len(data), OBJECT_ID_BYTES)]
    return found


def _by_value_modules() -> bool:
    cloudpickle = sys.modules.get("cloudpickle")
    return cloudpickle is not None and bool(cloudpickle.list_registry_pickle_by_value())


def _cloudpickle(value: object, buffers: "list[PickleBuffer]") -> bytes:
    import cloudpickle

    try:
        data: bytes = cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    except Exception as error:
        _found.refs.clear()
        reason = str(error) or type(error).__name__
        raise TypeError(
            f"could not serialize {_short(value)}: {reason}. Values that travel between processes must be picklable: "
            "open files, locks, sockets and the like are not; make them inside the task, or keep them in an actor"
        ) from error
    return data


def _short(value: object) -> str:
    text = repr(value)
    return f"{text[:80]}… (a {type(value).__name__})" if len(text) > 80 else f"{text} (a {type(value).__name__})"


def pickle_code(code: object) -> bytes:
    """A function or class, by value if need be. References inside belong to the function table, not to a caller."""
    import cloudpickle

    outer, _found.refs = _found.refs, []
    try:
        data: bytes = cloudpickle.dumps(code, protocol=5)
    except Exception as error:
        name = getattr(code, "__qualname__", repr(code))
        reason = str(error) or type(error).__name__
        raise TypeError(
            f"could not serialize {name}: {reason}. Something it refers to (a global, a closure's variable, a default) "
            "cannot be pickled; make it inside the function, or pass it as an argument"
        ) from error
    finally:
        _found.refs = outer
    return data


def _pack(data: bytes, buffers: "Sequence[PickleBuffer]") -> Packed:
    raws = [buffer.raw() for buffer in buffers]
    lengths = [raw.nbytes for raw in raws]
    head = _HEADER.pack(BUFFERS, len(raws), len(data)) + Struct(f"<{len(raws)}Q").pack(*lengths)
    parts: list[tuple[int, Payload]] = [(0, head + data)]
    end = len(head) + len(data)
    for raw, length in zip(raws, lengths, strict=True):
        start = -(-end // ALIGNMENT) * ALIGNMENT
        if length:
            parts.append((start, raw))
        end = start + length
    return Packed(parts, end)


def deserialize(payload: Payload) -> Any:
    """The value of a payload; an error's payload gives the exception, not raised.

    Arrays are read-only views of ``payload``, which they keep alive.
    """
    layout = payload[0]
    if layout == PICKLE:
        return _loads(payload)
    if layout == BUFFERS:
        view = memoryview(payload)
        _, number, length = _HEADER.unpack_from(view)
        lengths = Struct(f"<{number}Q").unpack_from(view, _HEADER.size)
        start = _HEADER.size + 8 * number
        end = start + length
        buffers = []
        at = end
        for size in lengths:
            at = -(-at // ALIGNMENT) * ALIGNMENT
            buffers.append(view[at : at + size].toreadonly())
            at += size
        return _loads(view[start:end], buffers=buffers)
    if layout == REFERENCES:
        return refs.restore_list(_ids(bytes(payload)))
    if layout == USER_ERROR:
        return _loads(failures.pickle_of(payload))
    if layout == SYSTEM_ERROR:
        kind, sentence = msgspec.msgpack.decode(memoryview(payload)[1:], type=tuple[str, str])
        return errors.system_error(kind, sentence)
    raise errors.RaySystemError(f"an object's payload begins with {layout:#x}, which is no layout: it is corrupt")


def serialize_error(error: errors.RayTaskError) -> bytes:
    """The payload of a failed task's results. A cause that cannot be pickled is left out; its text stays."""
    try:
        data, _ = serialize(error, sys.maxsize)
        assert isinstance(data, bytes)
        if data[0] != PICKLE:
            raise TypeError("an exception with buffers")
        _loads(data)  # exceptions whose constructor disagrees with their arguments pickle well and unpickle badly
    except Exception:
        bare = errors.RayTaskError(error.function_name, error.traceback_str, None, error.pid)
        data = _dumps(bare, 5)
    return failures.user_error(error.traceback_str, data)
