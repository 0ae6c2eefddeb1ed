"""Actors: what ``@remote`` makes of a class, handles to its instances, and their methods.

A handle holds a reference to the (empty) result of the actor's creation; the actor lives while that object is referred
to. So handles are counted, passed around and let go like any reference.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from trio_ray.runtime.api import options as opts
from trio_ray.runtime.api.code import Code
from trio_ray.runtime.api.context import current
from trio_ray.runtime.api.refs import ObjectRef, restore
from trio_ray.runtime.api.remote import retry_on
from trio_ray.runtime.api.session import Session, make_template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.spec import Kind, TaskTemplate

ASYNC_CONCURRENCY = 1000
"""``max_concurrency`` of an actor with ``async def`` methods, unless given."""
READY = "__ray_ready__"
"""A method of every actor: answers when the constructor has returned."""
_OPTIONS = "__trio_ray_method__"


class MethodInfo(msgspec.Struct, frozen=True, array_like=True):
    """What a handle knows of a method."""

    num_returns: int = 1
    max_retries: int = 0
    retry_on: bytes = b""
    name: str = ""
    """For people; empty for ``Class.method``."""


def method(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options of one method of an actor: ``@method(num_returns=2)``."""
    opts.check(options, opts.METHOD, "actor methods")

    def mark(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, _OPTIONS, options)
        return function

    return mark


def _info(options: opts.Options, base: MethodInfo) -> MethodInfo:
    returns, retries = options.get("num_returns"), options.get("max_task_retries")
    return MethodInfo(
        base.num_returns if returns is None else returns,
        base.max_retries if retries is None else retries,
        retry_on(options["retry_exceptions"]) if "retry_exceptions" in options else base.retry_on,
        options.get("name") or base.name,
    )


def _methods(cls: type, base: MethodInfo) -> dict[str, MethodInfo]:
    found = {READY: MethodInfo()}
    for name, member in inspect.getmembers(cls, callable):
        if not name.startswith("__") or name == "__call__":
            if name == "__call__" and not inspect.isfunction(member):
                continue
            found[name] = _info(getattr(member, _OPTIONS, {}), base)
    return found


class ActorMethod:
    """A method of an actor: ``handle.method.remote(...)`` calls it."""

    __slots__ = ("_class_name", "_info", "_name", "_prepared", "_ref", "_template")

    def __init__(self, ref: ObjectRef, class_name: str, name: str, info: MethodInfo) -> None:
        self._ref = ref
        self._class_name = class_name
        self._name = name
        self._info = info
        self._template: TaskTemplate | None = None
        self._prepared: Session | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{self._class_name}.{self._name} is the method of an actor, which lives in another process: call "
            f"{self._name}.remote(...)"
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Call it; a reference to its result (a list of them, or None, as ``num_returns`` says)."""
        context = current()
        session = context.session
        template = self._template
        if template is None or self._prepared is not session:
            template = self.prepare(session)
        found = session.submit(context, template, args, kwargs, ids.task_of(self._ref))
        return found[0] if len(found) == 1 else found or None

    def prepare(self, session: Session) -> TaskTemplate:
        """The template, which the session knows from now on."""
        template = self._template
        if template is None:
            info = self._info
            made = TaskTemplate(
                b"", b"", info.name or f"{self._class_name}.{self._name}", Kind.ACTOR_CALL, (), (),
                info.num_returns, info.max_retries, method=self._name, retry_on=info.retry_on,
            )  # fmt: skip
            template = self._template = make_template(made)
        session.prepare(template, None)
        self._prepared = session
        return template

    def options(self, **options: Any) -> "ActorMethod":
        """The same method with other options."""
        opts.check(options, opts.METHOD, "actor methods")
        return ActorMethod(self._ref, self._class_name, self._name, _info(options, self._info))

    def with_returns(self) -> "ActorMethod":
        """The same with a return value, if it has none: whoever waits for its end needs one to wait for."""
        return self if self._info.num_returns else self.options(num_returns=1)

    @property
    def actor_id(self) -> bytes:
        """Of the actor it belongs to."""
        return ids.task_of(self._ref)

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorMethod, (self._ref, self._class_name, self._name, self._info)

    def __repr__(self) -> str:
        return f"<method {self._name} of {self._class_name} actor {self.actor_id.hex()}>"


class ActorHandle:
    """An actor, from anywhere in the cluster. It can be passed to tasks and other actors, and ends with its last
    handle."""

    def __init__(self, ref: ObjectRef, class_name: str, methods: Mapping[str, MethodInfo] | None) -> None:
        self._ref = ref
        self._class_name = class_name
        self._methods = methods
        """None: not known here, so any name goes."""

    def __getattr__(self, name: str) -> ActorMethod:
        if self._methods is not None:
            info = self._methods.get(name)
        else:
            info = None if name.startswith("__") and name != READY else MethodInfo()
        if info is None:
            public = ", ".join(sorted(known for known in self._methods or () if known[0] != "_")) or "no methods"
            raise AttributeError(f"{self._class_name} actors have no method {name!r}; there are {public}")
        found = ActorMethod(self._ref, self._class_name, name, info)
        self.__dict__[name] = found  # it refers to the actor, not to this handle: no cycle
        return found

    @property
    def _actor_id(self) -> bytes:
        return ids.task_of(self._ref)

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorHandle, (self._ref, self._class_name, self._methods)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other._ref == self._ref

    def __hash__(self) -> int:
        return hash(self._ref)

    def __repr__(self) -> str:
        return f"Actor({self._class_name}, {self._actor_id.hex()})"


class ActorClass:
    """A class whose instances are actors: ``C.remote(...)`` instead of ``C(...)``."""

    def __init__(self, code: Code, options: opts.Options, facts: Mapping[str, Any] | None = None) -> None:
        self._code = code
        self._options = options
        if facts is None:
            cls = code.target
            is_async = any(
                inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
                for _, member in inspect.getmembers(cls, callable)
            )
            facts = {"name": cls.__name__, "module": cls.__module__, "doc": cls.__doc__, "is_async": is_async,
                     "methods": _methods(cls, MethodInfo())}  # fmt: skip
        self._facts = facts
        self.__name__ = self.__qualname__ = facts["name"]
        self.__module__ = facts["module"]
        self.__doc__ = facts["doc"]
        self._template: TaskTemplate | None = None
        self._session: Session | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{self.__name__} is an actor class: {self.__name__}.remote(...) makes an actor; {self.__name__}.cls(...) "
            "makes a plain object here"
        )

    @property
    def cls(self) -> Any:
        """The plain class."""
        return self._code.target

    @property
    def __wrapped__(self) -> Any:
        return self.cls

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        """Create an actor; its handle, at once. An error of the constructor shows in its methods' results."""
        context = current()
        return self.create(context.session, args, kwargs)

    def create(
        self, session: Session, args: tuple[Any, ...], kwargs: Mapping[str, Any], scope: bytes = b""
    ) -> ActorHandle:
        """Create an actor through a session, in a scope of its own if one is given."""
        context = current()
        name = self._options.get("name") or ""
        if name:
            name = f"{self._options.get('namespace') or session.namespace}/{name}"
            existing = find_actor(session, name)
            if existing is not None:
                if self._options.get("get_if_exists"):
                    return existing
                raise ValueError(
                    f"there is an actor named {name!r} already; use get_actor, get_if_exists=True, or another name"
                )
        template = self._template
        if template is None or self._session is not session:
            template = self.prepare(session)
        (ref,) = session.submit(context, template, args, kwargs, b"", name, scope)
        handle = ActorHandle(ref, self.__name__, self._methods())
        if name:
            session.named_actors[name] = handle
        return handle

    def _methods(self) -> Mapping[str, MethodInfo]:
        retries = self._options.get("max_task_retries")
        methods: Mapping[str, MethodInfo] = self._facts["methods"]
        if not retries:
            return methods
        return {
            name: msgspec.structs.replace(info, max_retries=info.max_retries or retries)
            for name, info in methods.items()
        }

    def prepare(self, session: Session) -> TaskTemplate:
        """The template, which the session knows from now on."""
        template = self._template
        if template is None:
            chosen = self._options
            concurrency = chosen.get("max_concurrency")
            if concurrency is None:
                concurrency = ASYNC_CONCURRENCY if self._facts["is_async"] else 1
            made = TaskTemplate(
                b"", self._code.export().function_id, self.__name__, Kind.ACTOR_CREATION, opts.shape(chosen, 0),
                opts.shape(chosen, 1), 1, chosen.get("max_restarts") or 0, max_concurrency=concurrency,
                is_async=self._facts["is_async"], policy=opts.policy(chosen),
            )  # fmt: skip
            template = self._template = make_template(made)
        session.prepare(template, self._code)
        self._session = session
        return template

    def options(self, **options: Any) -> "ActorClass":
        """The same class with other options."""
        opts.check(options, opts.ACTOR, "actor classes")
        return ActorClass(self._code, {**self._options, **options}, self._facts)

    def __reduce__(self) -> tuple[Any, ...]:
        return ActorClass, (self._code, self._options, self._facts)

    def __repr__(self) -> str:
        return f"<actor class {self.__name__}>"


def make_actor_class(cls: type, options: opts.Options) -> ActorClass:
    """What ``@remote`` makes of a class."""
    opts.check(options, opts.ACTOR, "actor classes")
    return ActorClass(Code(cls), options)


def find_actor(session: Session, name: str) -> ActorHandle | None:
    """The living actor of this ``namespace/name``, if there is one. One that this process did not create itself is
    found once its constructor has returned, and takes any method name."""
    own = session.named_actors.get(name)
    if own is not None:
        return own if session.read_if_ready(own._ref) is None else None
    try:
        row = msgspec.msgpack.decode(session.link.ask("actor", name), type=dict[str, Any])
    except LookupError:
        return None
    return ActorHandle(restore(ids.return_id(bytes.fromhex(row["actor_id"]), 0)), row["class_name"], None)


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """The living actor of this name. Raises ValueError if there is none."""
    session = current().session
    full = f"{namespace or session.namespace}/{name}"
    found = find_actor(session, full)
    if found is None:
        raise ValueError(
            f"there is no actor named {name!r} in the namespace {namespace or session.namespace!r}: it was not created "
            "yet, has another name, or has died"
        )
    return found
