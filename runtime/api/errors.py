"""What can go wrong, by Ray's names. Published as ``trio_ray.exceptions``.

An error is a value: a failed task's result is its exception, and whoever reads it raises it. Errors that the system
itself makes travel as their class's name and a sentence, errors of user code as a pickled ``RayTaskError``.
"""

import os
import traceback
from pathlib import Path
from types import GetSetDescriptorType, MemberDescriptorType
from typing import Any

__all__ = [
    "ActorDiedError",
    "ActorUnavailableError",
    "ActorUnschedulableError",
    "AuthenticationError",
    "GetTimeoutError",
    "NodeDiedError",
    "ObjectFetchTimedOutError",
    "ObjectFreedError",
    "ObjectLostError",
    "ObjectReconstructionFailedError",
    "ObjectStoreFullError",
    "OutOfDiskError",
    "OutOfMemoryError",
    "OwnerDiedError",
    "PendingCallsLimitExceeded",
    "RayActorError",
    "RayError",
    "RaySystemError",
    "RayTaskError",
    "ReferenceCountingAssertionError",
    "RuntimeEnvSetupError",
    "TaskCancelledError",
    "TaskUnschedulableError",
    "WorkerCrashedError",
]


class RayError(Exception):
    """Base of all errors of the system."""


class RaySystemError(RayError):
    """The system itself failed: a lost node process, a broken link."""


class AuthenticationError(RayError):
    """The other side of a link does not know the cluster's secret, or speaks another version."""


class TaskCancelledError(RayError):
    """The task was cancelled: by ``cancel``, with its scope, or because its deadline passed."""


class GetTimeoutError(RayError, TimeoutError):
    """The objects were not ready in time."""


class WorkerCrashedError(RayError):
    """The worker process that ran the task ended unexpectedly."""


class RayActorError(RayError):
    """The actor cannot answer."""


class ActorDiedError(RayActorError):
    """The actor is dead and will not come back."""


class ActorUnavailableError(RayActorError):
    """The actor cannot be reached now; it may come back."""


class TaskUnschedulableError(RayError):
    """No node can ever run the task."""


class ActorUnschedulableError(RayError):
    """No node can ever hold the actor."""


class PendingCallsLimitExceeded(RayError):
    """The actor has more unfinished calls than ``max_pending_calls`` allows."""


class ObjectLostError(RayError):
    """All copies of the object are gone, and it cannot be made again."""


class ObjectFetchTimedOutError(ObjectLostError):
    """The object could not be brought here in time."""


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The object was deleted although a reference to it exists."""


class ObjectFreedError(ObjectLostError):
    """The object was freed by hand."""


class OwnerDiedError(ObjectLostError):
    """What the object depended on died with its owner."""


class ObjectReconstructionFailedError(ObjectLostError):
    """The object was lost, and making it again failed."""


class ObjectStoreFullError(RayError):
    """The object store has no room for the object."""


class OutOfDiskError(RayError):
    """The disk has no room to spill objects to."""


class OutOfMemoryError(RayError):
    """The node was about to run out of memory and ended the task."""


class NodeDiedError(RayError):
    """The node died."""


class RuntimeEnvSetupError(RayError):
    """The environment that a task or actor asks for could not be set up."""


class RayTaskError(RayError):
    """A task or actor method raised an exception.

    What is raised where its result is read is also an instance of the exception's own type: ``except ValueError``
    works across processes. ``cause`` is the exception itself; the text is the remote traceback, the user's frames
    first.
    """

    def __init__(self, function_name: str, traceback_str: str, cause: BaseException | None, pid: int = 0) -> None:
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause = cause
        """None if it could not be pickled."""
        self.pid = pid
        # Past the constructors of the cause's type, which want arguments of their own.
        BaseException.__init__(self, function_name, traceback_str, cause, pid)

    def __str__(self) -> str:
        return self.traceback_str

    def __repr__(self) -> str:
        cause = "unknown" if self.cause is None else type(self.cause).__name__
        return f"RayTaskError({cause}, {self.function_name})"

    def __reduce__(self) -> tuple[Any, ...]:
        return (make_task_error, (self.function_name, self.traceback_str, self.cause, self.pid))


_SYSTEM_ERRORS: dict[str, type[RayError]] = {
    name: value for name, value in list(globals().items())
    if isinstance(value, type) and issubclass(value, RayError) and value is not RayTaskError
}  # fmt: skip
_dual_types: dict[type, type[RayTaskError]] = {}


def system_error(kind: str, sentence: str) -> RayError:
    """An error that the system made: the class named ``kind`` (``RaySystemError`` if there is none such)."""
    return _SYSTEM_ERRORS.get(kind, RaySystemError)(sentence)


def make_task_error(function_name: str, traceback_str: str, cause: BaseException | None, pid: int) -> RayTaskError:
    """A ``RayTaskError`` that is also an instance of the cause's type, where Python can make such a class."""
    if cause is None or isinstance(cause, RayTaskError):
        return RayTaskError(function_name, traceback_str, cause, pid)
    kind = type(cause)
    dual = _dual_types.get(kind)
    if dual is None:
        dual = _dual_types[kind] = _make_dual(kind)
    try:
        error = dual.__new__(dual, *_new_arguments(cause))
    except Exception:  # a type of the user's that is made in its own way
        return RayTaskError(function_name, traceback_str, cause, pid)
    RayTaskError.__init__(error, function_name, traceback_str, cause, pid)
    _copy_state(cause, error)
    return error


def _new_arguments(cause: BaseException) -> tuple[Any, ...]:
    return (cause.message, cause.exceptions) if isinstance(cause, BaseExceptionGroup) else ()


def _copy_state(cause: BaseException, error: RayTaskError) -> None:
    """What the cause carries (``args``, ``errno``, the user's attributes), so that handlers of its type find it."""
    for kind in type(cause).__mro__:
        for name, member in vars(kind).items():
            if isinstance(member, (MemberDescriptorType, GetSetDescriptorType)) and not name.startswith("__"):
                try:
                    setattr(error, name, getattr(cause, name))
                except (AttributeError, TypeError):
                    pass
    for name, value in vars(cause).items():
        if name not in error.__dict__ and not name.startswith("__"):
            error.__dict__[name] = value


def _make_dual(kind: type[BaseException]) -> type[RayTaskError]:
    if issubclass(RayTaskError, kind) or not issubclass(kind, Exception):
        return RayTaskError  # KeyboardInterrupt and SystemExit mean the process they are raised in
    members: dict[str, Any] = {
        "__module__": RayTaskError.__module__,
        "__init__": RayTaskError.__init__,
        "__str__": RayTaskError.__str__,
        "__reduce__": RayTaskError.__reduce__,
    }
    if issubclass(kind, BaseExceptionGroup):
        members["derive"] = kind.derive
        members["__new__"] = kind.__new__
    try:
        return type(f"RayTaskError({kind.__name__})", (RayTaskError, kind), members)
    except TypeError:  # a final class, or one whose layout does not mix with an exception's
        return RayTaskError


# -- making errors where user code ran ---------------------------------------------------------------------------

_OWN_FILES = str(Path(__file__).parent.parent) + "/"


def describe_failure(function_name: str, error: BaseException, place: str) -> RayTaskError:
    """The error of a task whose function raised ``error``; ``place`` says where it ran.

    An error that came from another task keeps that task's exception as its cause, and its text shows both.
    """
    cause: BaseException | None = error
    head = f"{function_name} failed ({place})\n"
    if isinstance(error, RayTaskError):
        cause = error.cause
        text = f"{error.traceback_str.rstrip()}\n\nwhich {head}{user_frames(error)}"
    else:
        text = head + user_traceback(error)
    return make_task_error(function_name, text.rstrip(), cause, os.getpid())


def user_frames(error: BaseException) -> str:
    """The user's frames of the error's own traceback, outermost first."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not _is_own(frame.filename)]
    return "Traceback (most recent call last):\n" + "".join(traceback.format_list(frames))


def user_traceback(error: BaseException) -> str:
    """The whole traceback text with causes and contexts, without this package's frames."""
    told = traceback.TracebackException.from_exception(error)
    _strip(told, set())
    return "".join(told.format())


def _strip(told: traceback.TracebackException, seen: set[int]) -> None:
    if id(told) in seen:
        return
    seen.add(id(told))
    kept = [frame for frame in told.stack if not _is_own(frame.filename)]
    told.stack = traceback.StackSummary.from_list(kept)
    for other in (told.__cause__, told.__context__, *(getattr(told, "exceptions", None) or ())):
        if other is not None:
            _strip(other, seen)


def _is_own(filename: str) -> bool:
    return filename.startswith(_OWN_FILES)
