"""The synchronous API, by Ray's names."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any, Protocol, overload

import msgspec

from trio_ray.runtime.api import timeline as chrome_trace
from trio_ray.runtime.api.actors import ActorClass, ActorHandle, make_actor_class
from trio_ray.runtime.api.context import current
from trio_ray.runtime.api.errors import GetTimeoutError, RayError
from trio_ray.runtime.api.refs import ObjectRef
from trio_ray.runtime.api.remote import RemoteFunction, make_remote_function
from trio_ray.runtime.api.waiting import check_wait, next_ready, split


class Decorator(Protocol):
    """What ``remote(num_cpus=2)`` returns."""

    @overload
    def __call__(self, target: type, /) -> ActorClass: ...  # type: ignore[overload-overlap]  # classes are callable
    @overload
    def __call__(self, target: Callable[..., Any], /) -> RemoteFunction: ...


@overload
def remote(target: type, /) -> ActorClass: ...  # type: ignore[overload-overlap]  # classes are callable
@overload
def remote(target: Callable[..., Any], /) -> RemoteFunction: ...
@overload
def remote(**options: Any) -> Decorator: ...
def remote(*args: Any, **options: Any) -> Any:
    """Make a remote function of a function, an actor class of a class: ``@remote``, or ``@remote(num_cpus=2)``."""
    if len(args) == 1 and not options and callable(args[0]):
        return _make(args[0], {})
    if args:
        raise TypeError("write @remote, or @remote(num_cpus=2, ...) with options by name")
    if not options:
        raise TypeError("write @remote without parentheses, or with at least one option")
    return lambda target: _make(target, options)


def _make(target: Any, options: dict[str, Any]) -> RemoteFunction | ActorClass:
    if inspect.isclass(target):
        return make_actor_class(target, options)
    if isinstance(target, (RemoteFunction, ActorClass)):
        raise TypeError(f"{target!r} is remote already")
    if inspect.isfunction(target) or inspect.isbuiltin(target):
        return make_remote_function(target, options)
    raise TypeError(f"@remote makes a remote function of a function, or an actor class of a class, not of {target!r}")


@overload
def get(object_refs: ObjectRef, *, timeout: float | None = None, return_exceptions: bool = False) -> Any: ...
@overload
def get(
    object_refs: Sequence[ObjectRef], *, timeout: float | None = None, return_exceptions: bool = False
) -> list[Any]: ...
def get(
    object_refs: ObjectRef | Sequence[ObjectRef], *, timeout: float | None = None, return_exceptions: bool = False
) -> Any:
    """The value of an object, or the values of a list of them; blocks until they are there.

    Raises what a task raised (the first error known, for a list), ``GetTimeoutError`` after ``timeout`` seconds. With
    ``return_exceptions`` errors are returned in their places instead.
    """
    session = current().session
    if type(object_refs) is ObjectRef:
        if not session.core.readable(object_refs) and not session.link.wait(
            (object_refs,), 1, timeout, fetch=True
        ):  # fmt: skip
            raise GetTimeoutError(f"the object {object_refs.hex()} was not ready within {timeout} s")
        value = session.read(object_refs)
        if isinstance(value, RayError) and not return_exceptions and session.is_error(object_refs):
            try:
                raise value
            finally:  # or it and this frame, with the references in it, would keep each other alive
                del value
        return value
    if not isinstance(object_refs, (list, tuple)):
        raise ValueError(f"get() takes an ObjectRef or a list of them, not {object_refs!r}")
    if set(map(type, object_refs)) - {ObjectRef}:
        wrong = next(ref for ref in object_refs if type(ref) is not ObjectRef)
        raise ValueError(f"get() takes an ObjectRef or a list of them; the list holds {wrong!r}")
    if not object_refs:
        return []
    there = session.link.wait(
        object_refs, len(object_refs), timeout, fetch=True, stop_at_error=not return_exceptions
    )  # fmt: skip
    if session.core.some_error and not return_exceptions:
        for ref in object_refs:
            if session.is_error(ref):
                raise session.read(ref)
    if not there:
        values = session.core.values
        missing = sum(1 for ref in object_refs if values.get(ref) is None)
        raise GetTimeoutError(f"{missing} of {len(object_refs)} objects were not ready within {timeout} s")
    return session.read_all(object_refs, return_exceptions=return_exceptions)


def put(value: object) -> ObjectRef:
    """Store a value; a reference to it. Numpy arrays come back read-only and without a copy."""
    context = current()
    return context.session.put(context, value)


def wait(
    ray_waitables: Sequence[ObjectRef], *, num_returns: int = 1, timeout: float | None = None,
    fetch_local: bool = True, return_when: str = "num_returns",
) -> tuple[list[ObjectRef], list[ObjectRef]]:  # fmt: skip
    """Wait until ``num_returns`` of the objects exist (``fetch_local``: are here), or ``timeout`` seconds passed.

    Returns those that are ready, at most ``num_returns``, and the rest, each in the order given. With
    ``return_when="first_error"`` the wait ends as well when one of them is an error.
    """
    if not isinstance(ray_waitables, (list, tuple)):
        raise TypeError(f"wait() takes a list of ObjectRefs, not {ray_waitables!r}")
    session = current().session
    if num_returns == 1 and return_when == "num_returns":
        found = next_ready(session, ray_waitables, fetch=fetch_local)
        if found is not None:
            return found
    check_wait(ray_waitables, num_returns, return_when)
    session.link.wait(
        ray_waitables, num_returns, timeout, fetch=fetch_local, stop_at_error=return_when == "first_error"
    )  # fmt: skip
    return split(session, ray_waitables, num_returns, fetch=fetch_local)


def cancel(ref: ObjectRef, *, force: bool = False, recursive: bool = True) -> None:
    """Cancel the task that makes an object; reading it then raises ``TaskCancelledError``.

    A task that has begun is interrupted (KeyboardInterrupt, or ``trio.Cancelled`` in an async one); ``force`` kills
    its worker. ``recursive`` cancels what it started as well.
    """
    if not isinstance(ref, ObjectRef):
        raise TypeError(f"cancel() takes an ObjectRef, not {ref!r}")
    current().session.cancel(ref, force=force, recursive=recursive)


def kill(actor: ActorHandle, *, no_restart: bool = True) -> None:
    """End an actor now. Its unfinished calls, and all later ones, raise ``ActorDiedError``."""
    if not isinstance(actor, ActorHandle):
        raise ValueError(f"kill() takes an actor's handle, not {actor!r}; cancel() ends tasks")
    current().session.kill_actor(actor._actor_id, no_restart=no_restart)


def nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster."""
    rows = msgspec.msgpack.decode(current().session.link.ask("nodes"), type=list[dict[str, Any]])
    return [
        {
            "NodeID": row["node"].removeprefix("n:"),
            "Alive": row["alive"],
            "NodeManagerAddress": row["host"],
            "Resources": row["resources"],
            "Labels": row["labels"],
            "object_store_memory": row["store_bytes"],
        }
        for row in rows
    ]


def cluster_resources() -> dict[str, float]:
    """The resources of all living nodes together."""
    return msgspec.msgpack.decode(current().session.link.ask("resources"), type=dict[str, float])


def available_resources() -> dict[str, float]:
    """What of the cluster's resources is not in use, as far as the nodes have told."""
    return msgspec.msgpack.decode(current().session.link.ask("available"), type=dict[str, float])


def timeline(filename: str | None = None) -> list[dict[str, Any]] | None:
    """The newest tasks that ran, as the events of a Chrome trace; with ``filename`` they are written there instead."""
    events = chrome_trace.chrome_events(current().session.link.ask(chrome_trace.SUBJECT, chrome_trace.ARGUMENT))
    if filename is None:
        return events
    chrome_trace.save(events, filename)
    return None
