"""The options of remote functions, actors and methods: checked where they are declared, not where they would fail."""

from collections.abc import Callable, Mapping
from typing import Any

from trio_ray.runtime.core.spec import Resources, resources

Check = Callable[[str, Any], None]
Options = dict[str, Any]


def _number(name: str, value: Any) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a number (or None), not {value!r}")
    if value < 0:
        raise ValueError(f"{name} is zero or more, not {value!r}")
    if round(value * 10_000) != value * 10_000 and round(value * 10_000) == 0:
        raise ValueError(f"{name} counts in ten-thousandths; {value!r} is less than one of them")


def _whole(low: int, meaning: str) -> Check:
    def check(name: str, value: Any) -> None:
        if value is None:
            return
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is a whole number, not {value!r}")
        if value < low:
            raise ValueError(f"{name} is {meaning}, not {value}")

    return check


def _text(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(f"{name} is a string, not {value!r}")
    if value == "":
        raise ValueError(f"{name} may not be empty")


def _custom_resources(name: str, value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, Mapping):
        raise TypeError(f"resources is a dict of names and amounts, not {value!r}")
    for key, amount in value.items():
        if not isinstance(key, str) or not key:
            raise TypeError(f"a resource's name is a string, not {key!r}")
        if key in ("CPU", "GPU", "memory"):
            option = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}[key]
            raise ValueError(f"give {key} as {option}=..., not in resources")
        _number(f"the amount of resource {key!r}", amount)


def _retry_exceptions(name: str, value: Any) -> None:
    if value is None or isinstance(value, bool):
        return
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"retry_exceptions is True, False or a list of exception types, not {value!r}")
    for kind in value:
        if not (isinstance(kind, type) and issubclass(kind, Exception)):
            raise TypeError(f"retry_exceptions lists exception types; {kind!r} is none")


def _num_returns(name: str, value: Any) -> None:
    if isinstance(value, str):
        raise ValueError(f"num_returns is a number; generators ({value!r}) are not available in this version")
    _whole(0, "zero or more")(name, value)


def _flag(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {value!r}")


def _strategy(name: str, value: Any) -> None:
    if value is not None and not isinstance(value, str):
        raise TypeError(
            f"scheduling_strategy is 'DEFAULT', 'SPREAD' or the name of a policy, not {value!r}; strategy objects are "
            "not available in this version"
        )


_COMMON: dict[str, Check] = {
    "num_cpus": _number,
    "num_gpus": _number,
    "memory": _number,
    "resources": _custom_resources,
    "name": _text,
    "scheduling_strategy": _strategy,
}
TASK: dict[str, Check] = {
    **_COMMON,
    "num_returns": _num_returns,
    "max_retries": _whole(-1, "-1 (without end), zero or more"),
    "retry_exceptions": _retry_exceptions,
}
ACTOR: dict[str, Check] = {
    **_COMMON,
    "namespace": _text,
    "get_if_exists": _flag,
    "max_restarts": _whole(-1, "-1 (without end), zero or more"),
    "max_task_retries": _whole(-1, "-1 (without end), zero or more"),
    "max_concurrency": _whole(1, "one or more"),
}
METHOD: dict[str, Check] = {
    "num_returns": _num_returns,
    "name": _text,
    "max_task_retries": _whole(-1, "-1 (without end), zero or more"),
    "retry_exceptions": _retry_exceptions,
}


def check(options: Options, known: dict[str, Check], of: str) -> Options:
    """The options, checked. Raises ValueError or TypeError with a sentence; ``of`` is ``remote functions``, …"""
    for name, value in options.items():
        verify = known.get(name)
        if verify is None:
            raise ValueError(f"{name!r} is no option of {of}; there are {', '.join(sorted(known))}")
        verify(name, value)
    return options


def shape(options: Options, default_cpus: float) -> Resources:
    """The resources that the options ask for."""
    wanted: dict[str, float] = dict(options.get("resources") or {})
    cpus = options.get("num_cpus")
    wanted["CPU"] = default_cpus if cpus is None else cpus
    wanted["GPU"] = options.get("num_gpus") or 0
    wanted["memory"] = options.get("memory") or 0
    return resources(wanted)


def policy(options: Options) -> str:
    """The name of the policy that places it; empty for the cluster's own."""
    strategy = options.get("scheduling_strategy") or "DEFAULT"
    return "" if strategy == "DEFAULT" else str(strategy).lower() if strategy == "SPREAD" else str(strategy)
