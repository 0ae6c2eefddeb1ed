"""From a policy's name to the policy. The one place in the core that imports code it does not know."""

from importlib import import_module

from trio_ray.runtime.core.scheduling.policies.base import Policy

ENTRY_POINTS = "trio_ray.policies"

BUILT_IN = {
    "bottom-up": "bottom_up:BottomUp",
    "centralized": "centralized:Centralized",
    "least-loaded": "least_loaded:LeastLoaded",
    "locality": "locality:Locality",
    "pack": "pack:Pack",
    "power-of-two": "power_of_two:PowerOfTwo",
    "random": "random:RandomNode",
    "round-robin": "round_robin:RoundRobin",
    "spread": "spread:Spread",
}
"""Where in this package each shipped policy is; imported when asked for."""


def load(name: str) -> Policy:
    """A new instance of the policy called ``name``.

    ``name`` is that of a shipped policy, ``module:Class`` for one of your own, or the name under which an installed
    package publishes one in the entry-point group ``trio_ray.policies``.

    Raises ValueError, with a sentence that says what to do, if there is none or it cannot be used.
    """
    if name in BUILT_IN:
        module, _, attribute = BUILT_IN[name].partition(":")
        return _make(f"{__package__}.{module}", attribute, name)
    if ":" in name:
        module, _, attribute = name.partition(":")
        return _make(module, attribute, name)
    published = _published()
    if name in published:
        module, _, attribute = published[name].partition(":")
        return _make(module, attribute, name)
    raise ValueError(
        f"there is no scheduling policy {name!r}; choose one of {', '.join(names())}, "
        f"or name a class of your own as 'module:Class'"
    )


def names() -> list[str]:
    """All names that need no ``module:Class``: those shipped and those that installed packages publish, sorted."""
    return sorted({*BUILT_IN, *_published()})


def _published() -> dict[str, str]:
    from importlib.metadata import entry_points  # slow to import, and rarely needed

    return {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}


def _make(module_name: str, attribute: str, name: str) -> Policy:
    if not module_name or not attribute:
        raise ValueError(f"the scheduling policy {name!r} is not of the form 'module:Class'")
    try:
        found: object = import_module(module_name)
    except Exception as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name in (module_name, module_name.partition(".")[0])
        if missing:
            raise ValueError(
                f"the scheduling policy {name!r} cannot be loaded: there is no module {module_name!r}; run from the "
                f"folder that holds it, or put that folder on PYTHONPATH, for the nodes of the cluster too"
            ) from error
        raise ValueError(
            f"the scheduling policy {name!r} cannot be loaded: importing {module_name!r} failed with "
            f"{type(error).__name__}: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(found, part):
            classes = [key for key, value in vars(found).items() if _is_policy(value)]
            there = f"the policies in it are {', '.join(classes)}" if classes else "there is no policy in it"
            raise ValueError(
                f"the scheduling policy {name!r} cannot be loaded: {module_name!r} has no {part!r}; {there}"
            )
        found = getattr(found, part)
    if not _is_policy(found):
        raise ValueError(
            f"the scheduling policy {name!r} is not a class derived from Policy (import it from {__package__}) "
            f"with a 'place' method"
        )
    assert isinstance(found, type)
    try:
        policy = found()
    except Exception as error:
        raise ValueError(
            f"the scheduling policy {name!r} could not be made by calling {attribute}() without arguments: "
            f"{type(error).__name__}: {error}"
        ) from error
    assert isinstance(policy, Policy)
    return policy


def _is_policy(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Policy) and not value.__abstractmethods__
