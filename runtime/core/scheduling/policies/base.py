"""What a scheduling policy is: two decisions, both pure.

A task is born at a node. The node's machine asks the policy whether to *keep* it; what it does not keep goes to the
global placement machine, which asks the policy where to *place* it. The same object decides on a real cluster and in
simulation, so a policy must not read clocks, keep global state or draw random numbers other than from the ``rng`` it
is given. State in ``self`` is allowed (a round-robin position, say): each machine makes its own instance.

The shortest policy is one method::

    class LeastQueued(Policy):
        def place(self, task, nodes, inputs, rng):
            return min(nodes, key=lambda node: node.queued)

Views are frozen and cheap; they show the decider's latest knowledge, which for other nodes is their last heartbeat
corrected by what placement itself has assigned to them since.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from random import Random

import msgspec

from trio_ray.runtime.core.messages import Address
from trio_ray.runtime.core.spec import RESOURCE_UNIT, Resources

CPU = "CPU"


class TaskView(msgspec.Struct, frozen=True, gc=False):
    """What a policy sees of a task. Tasks of one remote function with the same options look alike."""

    name: str
    """The function's (or actor class's) name, for people."""
    placement: Resources
    """What a node must have for it, in units of 1/10,000 (``spec.resources``)."""
    mean_s: float = 0.0
    """Exponential average of this function's durations in seconds; 0 while none has ended, or when not known here."""
    inputs: int = 0
    """How many objects it waits for."""
    inputs_here: int = 0
    """How many of these are at the deciding node, or about to be made there (told to ``keep`` only)."""
    origin: Address = ""
    """The node where it was born."""
    is_actor: bool = False
    """It makes an actor, which stays where it is placed."""


class InputView(msgspec.Struct, frozen=True, gc=False):
    """One input of a task, as far as it is known where the decision is taken."""

    object_id: bytes
    size: int
    """In bytes."""
    nodes: tuple[Address, ...]
    """Those that have a copy."""


class NodeView(msgspec.Struct, frozen=True, gc=False):
    """What a policy sees of a node."""

    node: Address
    total: Mapping[str, int]
    """All its resources, in units of 1/10,000."""
    available: Mapping[str, int]
    """What of them no task holds now."""
    queued: int
    """Tasks assigned to it and not yet running."""
    running: int
    mean_task_s: float = 0.0
    """Exponential average over all tasks that ended there, in seconds; 0 while unknown."""
    bandwidth_bytes_per_s: float = 0.0
    """Exponential average over transfers into it; 0 while unknown."""
    peers: int = 0
    """How many other nodes are alive."""
    labels: Mapping[str, str] = {}
    position: int = 0
    """Counts the nodes in the order in which they joined."""
    actors: int = 0
    """Actors that live there, whatever they hold."""
    held: Mapping[str, int] = {}
    """What of its resources actors hold, for as long as they live."""

    @property
    def cpus(self) -> float:
        """How many CPUs it has in all."""
        return self.total.get(CPU, 0) / RESOURCE_UNIT

    def slots(self, shape: Resources) -> int:
        """How many tasks of this shape run at once when nothing but the actors does; 0 if there is no room for any.

        A task that asks for nothing counts as one that asks for a CPU.
        """
        if not shape:
            return max(1, self.total.get(CPU, 0) // RESOURCE_UNIT)
        held = self.held
        if not held:
            return _slots(self.total, shape)
        return max(0, min((self.total.get(name, 0) - held.get(name, 0)) // units for name, units in shape))

    def free_slots(self, shape: Resources) -> int:
        """How many tasks of this shape could start now; a task that asks for nothing counts as one CPU."""
        return _slots(self.available, shape) if shape else self.available.get(CPU, 0) // RESOURCE_UNIT

    def load(self) -> float:
        """Tasks queued or running, and actors, for each CPU."""
        return (self.queued + self.running + self.actors) * RESOURCE_UNIT / (self.total.get(CPU, 0) or RESOURCE_UNIT)

    def after(self, tasks: int, shape: Resources = ()) -> "NodeView":
        """How the node would look with so many more tasks of this shape assigned to it and not yet begun."""
        available = self.available
        if shape:
            available = dict(available)
            for name, units in shape:
                available[name] = max(0, available.get(name, 0) - tasks * units)
        return NodeView(
            self.node, self.total, available, self.queued + tasks, self.running, self.mean_task_s,
            self.bandwidth_bytes_per_s, self.peers, self.labels, self.position, self.actors, self.held,
        )  # fmt: skip


def _slots(amounts: Mapping[str, int], shape: Resources) -> int:
    return min(amounts.get(name, 0) // units for name, units in shape)


Choice = NodeView | tuple[NodeView, str]
"""The node chosen, and if the policy likes, why, in a few words: shown in ``timeline`` and reports."""


class PolicyError(Exception):
    """A policy that cannot be used, or that failed: a sentence for the owner of the task it was asked about."""


class Policy(ABC):
    """Where tasks run. Named ``module:Class`` on every command line; made by calling the class without arguments."""

    uses_inputs: bool = True
    """Whether ``place`` looks at ``inputs``. If not, tasks are placed without asking where their inputs are."""

    def __init_subclass__(cls) -> None:
        """A class that overrides ``keep`` alone must not inherit a faster ``keep_many`` that says something else."""
        if "keep" in cls.__dict__ and "keep_many" not in cls.__dict__:
            cls.keep_many = Policy.keep_many  # type: ignore[method-assign]

    def keep(self, task: TaskView, node: NodeView) -> bool:
        """Whether the node where a task was born runs it; ``node.queued`` counts the tasks ahead of it.

        Must depend on its arguments only. This default leaves every task to ``place``, except where there is only
        one node.
        """
        return node.peers == 0 and node.slots(task.placement) > 0

    def keep_many(self, task: TaskView, count: int, node: NodeView) -> int:
        """How many of ``count`` tasks that look like ``task`` the node keeps.

        What ``keep`` would say when asked one task after the other; override it only to say the same faster.
        """
        for kept in range(count):
            if not self.keep(task, node.after(kept) if kept else node):
                return kept
        return count

    @abstractmethod
    def place(self, task: TaskView, nodes: Sequence[NodeView], inputs: Sequence[InputView], rng: Random) -> Choice:
        """The node that runs a task, one of ``nodes`` (in joining order, never empty).

        All of ``nodes`` are alive and large enough for the task, though perhaps busy now. ``inputs`` are those whose
        place is known.
        """


class ScoringPolicy(Policy):
    """A policy that places each task at the node with the lowest score; of equals, at the one with the least load.

    To placement this is more than a convenience: it scores a node again only when something about it has changed, so
    that a batch of alike tasks costs a heap operation a task rather than a look at every node.
    """

    inputs_matter_to_holders_only: bool = False
    """Say so if nodes that have none of a task's inputs compare with each other as they would for a task without any.
    Then only those that have some, and the best of the others, are scored for each task with inputs."""

    @abstractmethod
    def score(self, task: TaskView, node: NodeView, inputs: Sequence[InputView]) -> float:
        """How bad it were to run the task there. Must depend on its arguments only."""

    def reason(self, task: TaskView, node: NodeView, score: float) -> str:
        """Why a node was chosen, in a few words; asked once for each batch of alike tasks that goes to a node."""
        return ""

    def place(self, task: TaskView, nodes: Sequence[NodeView], inputs: Sequence[InputView], rng: Random) -> Choice:
        """The node with the lowest score, then the least load, then the one that joined first."""
        score, _, _, best = min((self.score(task, node, inputs), node.load(), node.position, node) for node in nodes)
        return best, self.reason(task, best, score)
