"""Remote functions: what ``@remote`` makes of a function."""

import inspect
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from trio_ray.runtime.api import options as opts
from trio_ray.runtime.api.code import Code
from trio_ray.runtime.api.context import current
from trio_ray.runtime.api.serialize import pickle_code
from trio_ray.runtime.api.session import Session, make_template
from trio_ray.runtime.core.spec import Kind, TaskTemplate

DEFAULT_MAX_RETRIES = 3
ANY_EXCEPTION = b"*"
"""``TaskTemplate.retry_on`` of a task that is tried again whatever it raised."""


def retry_on(value: bool | list[type] | None) -> bytes:
    """The wire form of ``retry_exceptions``."""
    if not value:
        return b""
    return ANY_EXCEPTION if value is True else pickle_code(tuple(value))


def is_retryable(template: TaskTemplate, error: BaseException) -> bool:
    """Whether the task's options say to try again after this exception."""
    if not template.retry_on or not isinstance(error, Exception):
        return False
    return template.retry_on == ANY_EXCEPTION or isinstance(error, pickle.loads(template.retry_on))


class RemoteFunction:
    """A function whose calls run as tasks of the cluster: ``f.remote(...)`` instead of ``f(...)``."""

    def __init__(self, code: Code, options: opts.Options, facts: Mapping[str, Any] | None = None) -> None:
        self._code = code
        self._options = options
        if facts is None:
            target = code.target
            facts = {
                "__name__": getattr(target, "__name__", code.name),
                "__qualname__": getattr(target, "__qualname__", code.name),
                "__module__": getattr(target, "__module__", None),
                "__doc__": getattr(target, "__doc__", None),
                "is_async": inspect.iscoroutinefunction(target),
            }
        self._facts = facts
        self.__name__ = facts["__name__"]
        self.__qualname__ = facts["__qualname__"]
        self.__module__ = facts["__module__"]
        self.__doc__ = facts["__doc__"]
        self._template: TaskTemplate | None = None
        self._session: Session | None = None
        """The session that knows the template."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(
            f"{self.__name__} is a remote function: {self.__name__}.remote(...) runs it as a task and gives a "
            f"reference to the result; {self.__name__}.function(...) runs it here"
        )

    @property
    def function(self) -> Callable[..., Any]:
        """The plain function."""
        target: Callable[..., Any] = self._code.target
        return target

    @property
    def __wrapped__(self) -> Callable[..., Any]:
        return self.function

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Run it as a task; a reference to its result (a list of them, or None, as ``num_returns`` says)."""
        context = current()
        session = context.session
        template = self._template
        if template is None or self._session is not session:
            template = self.prepare(session)
        found = session.submit(context, template, args, kwargs)
        return found[0] if len(found) == 1 else found or None

    def prepare(self, session: Session) -> TaskTemplate:
        """The template, which the session knows from now on."""
        template = self._template
        if template is None:
            chosen = self._options
            shape = opts.shape(chosen, 1)
            returns, retries = chosen.get("num_returns"), chosen.get("max_retries")
            made = TaskTemplate(
                b"", self._code.export().function_id, chosen.get("name") or self.__qualname__, Kind.TASK, shape,
                shape, 1 if returns is None else returns, DEFAULT_MAX_RETRIES if retries is None else retries,
                is_async=self._facts["is_async"], policy=opts.policy(chosen),
                retry_on=retry_on(chosen.get("retry_exceptions")),
            )  # fmt: skip
            template = self._template = make_template(made)
        session.prepare(template, self._code)
        self._session = session
        return template

    def options(self, **options: Any) -> "RemoteFunction":
        """The same function with other options."""
        opts.check(options, opts.TASK, "remote functions")
        return RemoteFunction(self._code, {**self._options, **options}, self._facts)

    def with_returns(self) -> "RemoteFunction":
        """The same with a return value, if it has none: whoever waits for its end needs one to wait for."""
        return self if self._options.get("num_returns") != 0 else self.options(num_returns=1)

    def __reduce__(self) -> tuple[Any, ...]:
        return RemoteFunction, (self._code, self._options, self._facts)

    def __repr__(self) -> str:
        return f"<remote function {self.__qualname__}>"


def make_remote_function(function: Callable[..., Any], options: opts.Options) -> RemoteFunction:
    """What ``@remote`` makes of a function."""
    opts.check(options, opts.TASK, "remote functions")
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise TypeError(f"{function.__qualname__} is a generator; generator tasks are not available in this version")
    return RemoteFunction(Code(function), options)


def as_remote(function: Any) -> RemoteFunction:
    """A remote function, made of a plain one if need be."""
    if isinstance(function, RemoteFunction):
        return function
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"{function!r} is neither a remote function nor a function")
    made = _plain.get(function)
    if made is None:
        if len(_plain) >= 1000:  # lambdas made in a loop
            _plain.clear()
        made = _plain[function] = make_remote_function(function, {})
    return made


_plain: dict[Callable[..., Any], RemoteFunction] = {}
"""Plain functions that were submitted: each is pickled once."""
