"""Identifiers, all derived: the same program gives the same ids, wherever and however often it runs.

A task's id is a digest of its parent's id followed by the count of the parent's children; an object's id is its
task's id followed by an index. So a re-executed task re-creates the very objects it made the first time, and the
children it submits again are recognised (DESIGN section 4). Ids are plain ``bytes``: they hash and compare at C speed
and travel unencoded.
"""

from hashlib import blake2b
from zlib import crc32

TASK_ID_BYTES = 16
OBJECT_ID_BYTES = 20
SCOPE_BYTES = 8

_PREFIX_BYTES = 11
_PUT = 0x8000_0000
"""Bit that tells the index of a put from the index of a return value."""


def root_task_id(name: str) -> bytes:
    """The id of a driver's own, implicit task, from any name that is unique in the cluster."""
    return blake2b(name.encode(), digest_size=TASK_ID_BYTES).digest()


def children_prefix(parent: bytes) -> bytes:
    """What the ids of all children of the task ``parent`` begin with; compute it once a parent."""
    return blake2b(parent, digest_size=_PREFIX_BYTES).digest()


def child_task_id(prefix: bytes, count: int) -> bytes:
    """The id of child number ``count`` (from 0) of the task whose ``children_prefix`` is ``prefix``."""
    return prefix + count.to_bytes(5, "big")


def siblings_prefix(task_id: bytes) -> bytes:
    """What the ids of a task's siblings, and its own, begin with: the ``children_prefix`` of its parent."""
    return task_id[:_PREFIX_BYTES]


def return_id(task_id: bytes, index: int) -> bytes:
    """The id of return value number ``index`` (from 0) of a task."""
    return task_id + index.to_bytes(4, "big")


def put_id(task_id: bytes, count: int) -> bytes:
    """The id of object number ``count`` (from 0) that the task ``task_id`` put."""
    return task_id + (_PUT | count).to_bytes(4, "big")


def is_put(object_id: bytes) -> bool:
    """Whether the object came from a put, and so cannot be made again by running a task."""
    return object_id[TASK_ID_BYTES] & 0x80 != 0


def task_of(object_id: bytes) -> bytes:
    """The id of the task that made the object."""
    return object_id[:TASK_ID_BYTES]


def content_id(content: bytes) -> bytes:
    """Eight bytes that name an immutable content: a pickled function, a task template."""
    return blake2b(content, digest_size=8).digest()


def job_scope(job: str) -> bytes:
    """The outermost scope of a driver's tasks."""
    return blake2b(job.encode(), digest_size=SCOPE_BYTES).digest()


def child_scope(parent: bytes, task_id: bytes, count: int) -> bytes:
    """The scope opened as number ``count`` by the task ``task_id`` within ``parent``.

    A scope's id is its parent's id and eight bytes more, so that "is inside" is a prefix test that needs no table.
    """
    return parent + blake2b(task_id + count.to_bytes(8, "big"), digest_size=SCOPE_BYTES).digest()


def in_scope(scope: bytes, outer: bytes) -> bool:
    """Whether ``scope`` is ``outer`` or lies within it."""
    return scope.startswith(outer)


def shard_of(key: bytes, shards: int) -> int:
    """Which control-store shard holds ``key``; all objects of a task share the task's shard."""
    return crc32(key[:TASK_ID_BYTES]) % shards if shards > 1 else 0
