"""Which task is running here, and through which session it talks to the cluster.

A driver is a task too: the root of its job. In a worker every running task has its own context. A thread or Trio task
started by it inherits it where Python's context variables do, until the task has ended; else it has the process's own.
"""

from collections.abc import Callable
from contextvars import ContextVar
from itertools import count
from typing import TYPE_CHECKING

import msgspec

from trio_ray.runtime.core import ids

if TYPE_CHECKING:
    from trio_ray.runtime.api.session import Session


class TaskContext(msgspec.Struct, eq=False):
    """The running task: its ids, the counters from which its children's ids derive, its scope and deadline.

    A struct only because C code fills it in: a worker makes one for every task.
    """

    session: "Session"
    task_id: bytes
    scope: bytes
    """What its children belong to unless they are started in a nursery."""
    name: str = ""
    deadline: float | None = None
    """On the node's clock; its children inherit it."""
    actor_id: bytes = b""
    in_trio: bool = False
    """Trio runs here: a surrounding deadline passes on to children."""
    spawned: bool = False
    """It started tasks outside of nurseries, which may still run when it has ended."""
    nurseries: int = 0
    """How many of its nurseries are open. Counted under the link's lock."""
    ended: bool = False
    children: "count[int]" = msgspec.field(default_factory=count)
    puts: "count[int]" = msgspec.field(default_factory=count)
    scopes: "count[int]" = msgspec.field(default_factory=count)
    known_prefix: bytes = b""
    """``prefix``, once somebody asked for it."""

    @property
    def prefix(self) -> bytes:
        """What its children's ids begin with."""
        if not self.known_prefix:
            self.known_prefix = ids.children_prefix(self.task_id)
        return self.known_prefix


running: ContextVar[TaskContext | None] = ContextVar("trio_ray_task", default=None)
_process: TaskContext | None = None
_initialize: Callable[[], None] | None = None


def current() -> TaskContext:
    """The context of the running task; a process that has none is initialized first, as ``init()`` does."""
    context = running.get()
    if context is not None:
        return context.session.root if context.ended else context
    if _process is None:
        if _initialize is None:
            raise RuntimeError("trio_ray is not initialized in this process: call trio_ray.init() first")
        _initialize()
        assert _process is not None
    return _process


def current_or_none() -> TaskContext | None:
    """The context of the running task, if there is one."""
    return running.get() or _process


def set_process(context: TaskContext | None) -> None:
    """The context of everything in this process that has none of its own."""
    global _process
    _process = context


def initialize_with(initialize: Callable[[], None] | None) -> None:
    """What ``current`` calls in a process without a session."""
    global _initialize
    _initialize = initialize
