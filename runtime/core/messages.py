"""Everything that processes, nodes, shards and the placement machine say to each other.

Messages are batched by nature: one carries many tasks, one frame carries many messages. They are frozen; in
simulation the same objects travel, unencoded. Addresses:

- ``"n:<hex>"``            the machine of a node
- ``"n:<hex>/<number>"``   a process (driver or worker) attached to that node
- ``"placement"``          the global placement machine
- ``"control/<shard>"``    a shard of the control store
"""

from enum import IntEnum

import msgspec

from trio_ray.runtime.core.spec import Resources, TaskSpec, TaskTemplate

Address = str

PLACEMENT: Address = "placement"


def control_address(shard: int) -> Address:
    """The address of a control-store shard."""
    return f"control/{shard}"


def node_of(address: Address) -> Address:
    """The node that a process belongs to; a node's own address unchanged."""
    return address.partition("/")[0]


class Message(msgspec.Struct, frozen=True, array_like=True, gc=False, tag=True):
    """Base of all messages; on the wire an array whose first item is the class's name."""


class Where(IntEnum):
    """Where an object's bytes are, as told to one process."""

    INLINE = 0
    """In ``payload``."""
    SHARED = 1
    """In the node's arena, at ``offset``; pinned for this process until it says ``Unpin``."""
    ELSEWHERE = 2
    """On another node, or not told: the object exists, its bytes were not asked for."""
    STREAMED = 3
    """About to arrive as data frames of transfer ``offset`` (a process that shares no memory with the node)."""


class Value(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An object that is ready, and how to read it."""

    object_id: bytes
    where: Where = Where.INLINE
    payload: bytes = b""
    offset: int = 0
    size: int = 0
    """In bytes; of the payload when inline."""
    error: bool = False
    """The value is an error: the task that should have made it failed. Always inline."""


class Output(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One value a worker made: inline, or sealed in the arena at ``offset`` (-1: inline)."""

    payload: bytes = b""
    offset: int = -1
    size: int = 0
    contained: tuple[bytes, ...] = ()
    """References inside the value: alive while it is."""


class Status(IntEnum):
    """How a task ended."""

    OK = 0
    ERROR = 1
    """The user's function raised, or its input was an error; each output carries it."""
    RETRYABLE = 2
    """It raised an exception that its options say to try again."""
    CANCELLED = 3


class TaskResult(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What became of one task."""

    task_id: bytes
    status: Status
    outputs: tuple[Output, ...]
    started_at: float = 0.0
    duration_s: float = 0.0
    spawned: bool = False
    """It started tasks outside of nurseries, which may still run in its scope."""


class Function(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """An entry of the function table (paper, figure 5)."""

    function_id: bytes
    name: str
    pickled: bytes


# ---------------------------------------------------------------------------------------------------------------
# process -> node
# ---------------------------------------------------------------------------------------------------------------


class SubmitTasks(Message, frozen=True):
    """Run these. Templates and functions stand here the first time this link needs them."""

    specs: list[TaskSpec]
    templates: list[TaskTemplate] = []
    functions: list[Function] = []


class PutObjects(Message, frozen=True):
    """Small objects, by value."""

    objects: list[tuple[bytes, bytes, tuple[bytes, ...]]]
    """``(object_id, payload, contained references)``."""


class CreateObject(Message, frozen=True):
    """Asks for ``size`` bytes of the arena; answered by ``ObjectCreated`` or ``CreateFailed``."""

    object_id: bytes
    size: int


class SealObjects(Message, frozen=True):
    """These created objects are written and immutable from now on."""

    objects: list[tuple[bytes, tuple[bytes, ...]]]
    """``(object_id, contained references)``."""


class AbortObjects(Message, frozen=True):
    """These created objects will not be written."""

    object_ids: list[bytes]


class WaitObjects(Message, frozen=True):
    """Tell me when these are ready; with ``fetch``, bring them to this node first."""

    object_ids: list[bytes]
    fetch: bool = True


class References(Message, frozen=True):
    """This process now holds its first reference to these, and dropped its last to those (added counts first).

    The submitter of a task, and whoever puts an object, holds a reference from the start without saying so.
    """

    added: list[bytes]
    removed: list[bytes]


class Unpin(Message, frozen=True):
    """This process no longer reads these from the arena (one entry an earlier ``SHARED`` value)."""

    object_ids: list[bytes]


class CancelTasks(Message, frozen=True):
    """Cancel these; ``force`` kills the worker, ``recursive`` cancels what they started too."""

    task_ids: list[bytes]
    force: bool = False
    recursive: bool = True


class CancelScope(Message, frozen=True):
    """Cancel everything in this scope and the scopes within, on every node.

    ``done``: all that its opener started in it has ended well, so that only what these spawned may be left.
    """

    scope: bytes
    done: bool = False


class KillActor(Message, frozen=True):
    """End an actor's process now; ``no_restart`` for good."""

    actor_id: bytes
    no_restart: bool = True


class ActorHandles(Message, frozen=True):
    """This process now holds its first handle of these actors, and dropped its last of those.

    The creator holds one from the start without saying so.
    """

    added: list[bytes]
    removed: list[bytes]


class Query(Message, frozen=True):
    """Ask for a view of the cluster; answered by ``Answer`` with the same number.

    Subjects: ``nodes``, ``resources``, ``actor`` (argument ``namespace/name``), ``actors``, ``tasks``, ``objects``,
    ``node`` (this node's own counters), ``timeline``.
    """

    number: int
    subject: str
    argument: str = ""


# worker -> node


class TasksDone(Message, frozen=True):
    """Results, in the order in which the tasks ended."""

    results: list[TaskResult]


class ReturnTasks(Message, frozen=True):
    """A worker gives back tasks it has not begun: asked to (``TakeBack``), or because it is about to block.

    From a node to the owner of tasks that were placed there: they found no room, and are to be placed anew.
    """

    task_ids: list[bytes]


class Blocked(Message, frozen=True):
    """The running task waits for objects (True): its CPU may be given away; or goes on (False)."""

    blocked: bool


# ---------------------------------------------------------------------------------------------------------------
# node -> process
# ---------------------------------------------------------------------------------------------------------------


class ObjectsReady(Message, frozen=True):
    """Objects this process waits for, or whose tasks it submitted."""

    values: list[Value]


class ObjectCreated(Message, frozen=True):
    """Write at ``offset`` of the arena, then seal; without shared memory, send data frames of ``transfer``."""

    object_id: bytes
    offset: int
    transfer: int = 0


class CreateFailed(Message, frozen=True):
    """No room: a sentence that says why."""

    object_id: bytes
    reason: str


class RunTasks(Message, frozen=True):
    """Run these in order. ``inputs`` holds the value of every input of every spec, once."""

    specs: list[TaskSpec]
    inputs: list[Value] = []
    templates: list[TaskTemplate] = []
    functions: list[Function] = []


class TakeBack(Message, frozen=True):
    """Give back those of these tasks that have not begun (``ReturnTasks`` says which)."""

    task_ids: list[bytes]


class Interrupt(Message, frozen=True):
    """End these running tasks: KeyboardInterrupt in a plain function, ``trio.Cancelled`` in an async one."""

    task_ids: list[bytes]


class Answer(Message, frozen=True):
    """The answer to a ``Query``: a msgpack-encoded plain value, or an error's sentence."""

    number: int
    body: bytes
    error: str = ""


# ---------------------------------------------------------------------------------------------------------------
# node <-> placement
# ---------------------------------------------------------------------------------------------------------------


class NodeInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row of the node table."""

    node: Address
    host: str
    """Where its transport listens (``tcp://host:port``); empty in simulation."""
    resources: Resources
    labels: tuple[tuple[str, str], ...] = ()
    alive: bool = True
    store_bytes: int = 0


class Load(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a heartbeat says of a node (paper, section 4.2.2)."""

    queued: int
    """Tasks assigned to the node and not yet running."""
    running: int
    available: Resources
    mean_task_s: float
    """Exponential average over all tasks; 0 when none has ended yet."""
    bandwidth_bytes_per_s: float = 0.0
    """Exponential average over transfers into the node; 0 when unknown."""
    store_used: int = 0
    actors: int = 0
    """Actors that live here."""
    assigned: int = -1
    """How many tasks placement ever assigned to this node (``AssignTasks`` specs received): tells placement which of
    its decisions this load already shows. -1: not counted."""
    held: Resources = ()
    """What actors hold for as long as they live."""


class Heartbeat(Message, frozen=True):
    """A node's load; sent when it changes, and at least once a period."""

    load: Load


class PlaceTasks(Message, frozen=True):
    """Choose nodes for these. Templates always stand here once a batch."""

    specs: list[TaskSpec]
    templates: list[TaskTemplate]


class TasksPlaced(Message, frozen=True):
    """To the forwarding node: where its tasks went."""

    node: Address
    task_ids: list[bytes]


class TasksUnplaceable(Message, frozen=True):
    """To the forwarding node: no node can ever run these; ``reason`` is a sentence for the user."""

    task_ids: list[bytes]
    reason: str


class AssignTasks(Message, frozen=True):
    """To the chosen node: run these; ``origin`` (the forwarding node) gets ``TasksFinished``."""

    origin: Address
    specs: list[TaskSpec]
    templates: list[TaskTemplate]
    reason: str = ""
    """Why the policy chose the node, for ``TaskEvent.reason``."""


# ---------------------------------------------------------------------------------------------------------------
# node <-> node
# ---------------------------------------------------------------------------------------------------------------


class CallActors(Message, frozen=True):
    """Actor calls for actors that live on the receiving node; as ``AssignTasks`` otherwise."""

    origin: Address
    specs: list[TaskSpec]
    templates: list[TaskTemplate]


class TasksFinished(Message, frozen=True):
    """Results of tasks that ran for another node; outputs larger than inline stay there (``offset`` set)."""

    results: list[TaskResult]


class PullObject(Message, frozen=True):
    """Send me this object as my transfer ``transfer``; answered by data frames, ``PulledInline`` or ``PullFailed``."""

    object_id: bytes
    transfer: int


class PulledInline(Message, frozen=True):
    """The answer to ``PullObject`` for an object small enough to travel by value."""

    transfer: int
    value: Value


class PullFailed(Message, frozen=True):
    """The object is not here (any more)."""

    transfer: int
    object_id: bytes


# ---------------------------------------------------------------------------------------------------------------
# node <-> control store
# ---------------------------------------------------------------------------------------------------------------


class RegisterNode(Message, frozen=True):
    """A node joins; answered by ``NodesChanged`` with all nodes."""

    info: NodeInfo


class NodesChanged(Message, frozen=True):
    """Published to every node and to placement: new or changed rows of the node table."""

    nodes: list[NodeInfo]


class PutFunctions(Message, frozen=True):
    """Rows for the function table; a row that exists stays."""

    functions: list[Function]


class GetFunctions(Message, frozen=True):
    """Asks for rows of the function table; answered by ``Functions``, at once or when they arrive."""

    function_ids: list[bytes]


class Functions(Message, frozen=True):
    """Rows of the function table."""

    functions: list[Function]


class ObjectUpdate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One change of an object-table row."""

    object_id: bytes
    size: int
    """In bytes; -1: this node dropped its copy."""
    contained: tuple[bytes, ...] = ()


class ObjectsChanged(Message, frozen=True):
    """The sending node has (or dropped) copies of these objects."""

    updates: list[ObjectUpdate]


class LocateObjects(Message, frozen=True):
    """Where are these? Answered by ``ObjectsLocated`` now for those that exist, later for the others (the callback
    of the paper's figure 7b), once."""

    object_ids: list[bytes]


class Location(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row of the object table, as told to a node."""

    object_id: bytes
    size: int
    nodes: tuple[Address, ...]
    """Those that have a copy. None: every copy was lost with its node; told to those who ask and to those who hold it,
    and told again with nodes should it be made again."""


class ObjectsLocated(Message, frozen=True):
    """Rows of the object table."""

    locations: list[Location]


class HoldObjects(Message, frozen=True):
    """The sending node holds references to ``added`` and no longer to ``removed``; acknowledged by ``HoldsCounted``
    unless ``number`` is 0.

    ``born``: of the objects that it holds, those that it owns (it is their putter's or their task's submitter's node)
    and tells of for the first time. Until then an object is not freed, however the holds of other nodes come and go on
    faster links.
    """

    number: int
    added: list[bytes]
    removed: list[bytes]
    born: list[bytes] = []


class HoldsCounted(Message, frozen=True):
    """``HoldObjects`` with this number is counted."""

    number: int


class FreeObjects(Message, frozen=True):
    """Nobody refers to these any more: drop every copy."""

    object_ids: list[bytes]


class TaskRecord(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row of the task table: the lineage, and the state."""

    spec: TaskSpec
    node: Address
    status: int
    """-1 while it is not done, then a ``Status``."""


class LogTasks(Message, frozen=True):
    """Rows for the task table; ``templates`` those not yet logged by this node."""

    records: list[TaskRecord]
    templates: list[TaskTemplate]


class ForgetTasks(Message, frozen=True):
    """The lineage of these tasks can no longer be needed."""

    task_ids: list[bytes]


class TaskEvent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One line of the event log: a task's life, times in seconds on the cluster's clock."""

    task_id: bytes
    name: str
    process: Address
    submitted_at: float
    dispatched_at: float
    started_at: float
    ended_at: float
    status: int
    reason: str = ""
    """Why the policy placed it here."""


class PackedEvents(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Events encoded as soon as there are some, for few are ever read: a third of the memory that the objects take."""

    count: int
    rows: bytes

    @classmethod
    def pack(cls, events: list[TaskEvent]) -> "PackedEvents":
        """Encode events, oldest first."""
        return cls(len(events), msgspec.msgpack.encode(events))

    def unpack(self) -> list[TaskEvent]:
        """The events again."""
        return msgspec.msgpack.decode(self.rows, type=list[TaskEvent])


class LogEvents(Message, frozen=True):
    """Rows for the event log, which keeps the newest."""

    batches: list[PackedEvents]


class ActorState(IntEnum):
    """The life of an actor."""

    PENDING = 0
    ALIVE = 1
    RESTARTING = 2
    DEAD = 3


class ActorInfo(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A row of the actor table."""

    actor_id: bytes
    name: str
    """``namespace/name``, or empty."""
    class_name: str
    state: ActorState
    node: Address = ""
    owner: Address = ""
    """The node that forwarded its creation and restarts it."""
    reason: str = ""
    """Why it is dead."""
    creation: TaskSpec | None = None
    template: TaskTemplate | None = None


class UpdateActors(Message, frozen=True):
    """New or changed rows of the actor table."""

    actors: list[ActorInfo]


class WatchActors(Message, frozen=True):
    """Tell me the rows of these, now and whenever they change."""

    actor_ids: list[bytes]


class ActorsChanged(Message, frozen=True):
    """Rows of the actor table, to those who watch them."""

    actors: list[ActorInfo]


class PublishCancel(Message, frozen=True):
    """Published to every node: ``scopes`` and ``task_ids`` are cancelled."""

    scopes: list[bytes]
    task_ids: list[bytes]
    force: bool = False
    recursive: bool = True


class ControlQuery(Message, frozen=True):
    """A ``Query`` passed on by a node for one of its processes."""

    process: Address
    number: int
    subject: str
    argument: str = ""


class ControlAnswer(Message, frozen=True):
    """The answer to a ``ControlQuery``."""

    process: Address
    number: int
    body: bytes
    error: str = ""


AnyMessage = (
    SubmitTasks | PutObjects | CreateObject | SealObjects | AbortObjects | WaitObjects | References | Unpin
    | CancelTasks | CancelScope | KillActor | ActorHandles | Query | TasksDone | ReturnTasks | Blocked | ObjectsReady
    | ObjectCreated | CreateFailed | RunTasks | TakeBack | Interrupt | Answer | Heartbeat | PlaceTasks | TasksPlaced
    | TasksUnplaceable | AssignTasks | CallActors | TasksFinished | PullObject | PulledInline
    | PullFailed | RegisterNode | NodesChanged | PutFunctions | GetFunctions | Functions | ObjectsChanged
    | LocateObjects | ObjectsLocated | HoldObjects | HoldsCounted | FreeObjects | LogTasks | ForgetTasks | LogEvents
    | UpdateActors | WatchActors | ActorsChanged | PublishCancel | ControlQuery
    | ControlAnswer
)  # fmt: skip
"""Every message, for decoders."""

FromProcess = (
    SubmitTasks | PutObjects | CreateObject | SealObjects | AbortObjects | WaitObjects | References | Unpin
    | CancelTasks | CancelScope | KillActor | ActorHandles | Query | TasksDone | ReturnTasks | Blocked
)  # fmt: skip
"""What processes say to their node, which decodes nothing else on their links."""
