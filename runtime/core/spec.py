"""What a task is: the part that all calls of one remote function share, and the part that is each call's own."""

from enum import IntEnum

import msgspec

RESOURCE_UNIT = 10_000
"""Resources are counted in ten-thousandths, so that fractions add up exactly."""

Resources = tuple[tuple[str, int], ...]
"""Resource amounts in units of 1/10,000, sorted by name, none zero: hashable, and one shape is one key."""


def resources(amounts: dict[str, float]) -> Resources:
    """``{"CPU": 0.5}`` as a shape; zero amounts drop out. Raises ValueError for a negative amount."""
    for name, amount in amounts.items():
        if amount < 0:
            raise ValueError(f"resource {name!r} has the negative amount {amount}; amounts are zero or more")
    return tuple(sorted((name, round(amount * RESOURCE_UNIT)) for name, amount in amounts.items() if amount))


def amounts(shape: Resources) -> dict[str, float]:
    """The inverse of ``resources``."""
    return {name: units / RESOURCE_UNIT for name, units in shape}


class Kind(IntEnum):
    """What running a task means."""

    TASK = 0
    ACTOR_CREATION = 1
    ACTOR_CALL = 2


class TaskTemplate(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What all calls of one remote function (or actor class, or method) with the same options share.

    It crosses each link once; specs name it by ``template_id``, the digest of the rest.
    """

    template_id: bytes
    function_id: bytes
    """Names the pickled function or class in the function table; empty for actor calls."""
    name: str
    """For people: in errors, events, ``status``. For an actor call ``Class.method``."""
    kind: Kind
    resources: Resources
    """Held while the task runs, or while the actor lives."""
    placement: Resources
    """Needed to be placed; differs from ``resources`` only for actors (1 CPU to be placed, 0 to run)."""
    num_returns: int
    max_retries: int
    """How often to run again after a worker or node died (and after an exception, if the worker calls it retryable);
    -1 without end. For an actor creation: how often to restart."""
    method: str = ""
    max_concurrency: int = 1
    is_async: bool = False
    policy: str = ""
    """The name of the policy that places it; empty for the cluster's own."""
    retry_on: bytes = b""
    """For the worker: which exceptions count as ``Status.RETRYABLE``; pickled types, or empty for none."""


class TaskSpec(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One call. Its ``args`` are opaque here: user data never enters the core."""

    task_id: bytes
    template: bytes
    """``TaskTemplate.template_id``."""
    args: bytes
    """The serialized arguments; empty with ``packed_args`` when they are an object of their own, the first input."""
    inputs: tuple[bytes, ...]
    """Objects that must be local before the task runs: the top-level ``ObjectRef`` arguments, in order, each once."""
    borrowed: tuple[bytes, ...]
    """Objects whose references are nested in the arguments: kept alive until the task is done, never fetched."""
    scope: bytes
    submitter: str
    """Address of the process that submitted it and waits for its results."""
    actor: bytes = b""
    """For calls: the actor's id (which is the task id of its creation)."""
    deadline: float | None = None
    """When to give up, on the cluster's clock of the submitting node."""
    packed_args: bool = False
    actor_name: str = ""
    """For creations of named actors: ``namespace/name``."""
