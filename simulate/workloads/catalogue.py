"""Workloads by name, and how a name becomes a program.

A workload is a coroutine over a cluster with parameters that have defaults, so it runs on a real cluster just as well.
``load_workload`` finds one by name, or a user's own by ``file.py:main`` or ``module:main``.
"""

import importlib
import inspect
import runpy
import sys
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from trio_ray.runtime.api.cluster import Cluster
from trio_ray.simulate.costs import Cost
from trio_ray.simulate.workloads import programs

Main = Callable[[Cluster], Awaitable[Any]]


class WorkloadError(ValueError):
    """A workload that cannot be loaded; the sentence says why."""


class Workload(msgspec.Struct, frozen=True):
    """A program with parameters."""

    name: str
    summary: str
    """One line for people."""
    main: Callable[..., Awaitable[Any]]
    """Takes the cluster, then parameters by name, each with a default."""
    costs: Callable[..., Mapping[Any, Cost]]
    """The costs of its tasks in simulation, given the parameters."""

    def parameters(self) -> dict[str, Any]:
        """The parameters' names and defaults."""
        found = list(inspect.signature(self.main).parameters.values())[1:]
        return {parameter.name: parameter.default for parameter in found}

    def bind(self, given: Mapping[str, str]) -> tuple[Main, Mapping[Any, Cost]]:
        """The program and its costs, with parameters given as text, as on a command line.

        Raises ``WorkloadError`` for a name or value that cannot be.
        """
        known = self.parameters()
        values = dict(known)
        for name, text in given.items():
            if name not in known:
                choice = ", ".join(f"{key}={value}" for key, value in known.items())
                raise WorkloadError(f"the workload {self.name!r} has no parameter {name!r}; it has {choice}")
            kind = type(known[name])
            try:
                values[name] = kind(float(text)) if kind is int else kind(text)
            except ValueError:
                raise WorkloadError(
                    f"the parameter {name} of the workload {self.name!r} is a number (of type {kind.__name__}), "
                    f"not {text!r}"
                ) from None
        return partial(self.main, **values), self.costs(**values)


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("noop", "empty tasks, all submitted at once", programs.noop, programs.noop_costs),
        Workload("chain", "tasks that each wait for the one before", programs.chain, programs.chain_costs),
        Workload("fan-in", "many tasks, and one that takes all their results", programs.fan_in, programs.fan_in_costs),
        Workload("tree", "tasks that start tasks and wait for them", programs.tree, programs.tree_costs),
        Workload("map-reduce", "maps, a shuffle of objects, reduces", programs.map_reduce, programs.map_reduce_costs),
        Workload("actors", "calls to many actors at once", programs.actors, programs.actors_costs),
        Workload(
            "simulations", "simulations of random length, gathered as they come (the paper's table 4)",
            programs.simulations, programs.simulations_costs,
        ),
        Workload(
            "training", "the paper's figure 3: simulator actors and an update task, in turns", programs.training,
            programs.training_costs,
        ),
    )
}  # fmt: skip


def load_workload(name: str, given: Mapping[str, str] | None = None) -> tuple[Main, Mapping[Any, Cost]]:
    """The program called ``name``, and the costs of its tasks.

    ``name`` is one of ``WORKLOADS``, or ``path/to/file.py:main``, or ``module:main``: a coroutine function that takes
    the cluster. Beside such a ``main``, a mapping called ``costs`` gives its tasks' costs. Raises ``WorkloadError``.
    """
    given = given or {}
    if name in WORKLOADS:
        return WORKLOADS[name].bind(given)
    place, colon, attribute = name.rpartition(":")
    if not colon or not place:
        raise WorkloadError(
            f"there is no workload {name!r}; choose one of {', '.join(WORKLOADS)}, or name a program of your own as "
            "file.py:main or module:main"
        )
    names = _names_of(place)
    main = names.get(attribute)
    if main is None:
        found = ", ".join(sorted(key for key, value in names.items() if inspect.iscoroutinefunction(value)))
        there = f"; its coroutine functions are {found}" if found else ""
        raise WorkloadError(f"{place} has no {attribute!r}{there}")
    if not inspect.iscoroutinefunction(main):
        raise WorkloadError(f"{name} is no coroutine function: write `async def {attribute}(cluster): ...`")
    if given:
        try:
            inspect.signature(main).bind(None, **given)
        except TypeError as error:
            raise WorkloadError(f"{name} does not take the parameters given: {error}") from None
    costs = names.get("costs", {})
    if not isinstance(costs, Mapping):
        raise WorkloadError(f"`costs` in {place} is a {type(costs).__name__}, not a mapping of functions to costs")
    return partial(main, **given), costs


def _names_of(place: str) -> Mapping[str, Any]:
    if place.endswith(".py"):
        path = Path(place)
        if not path.is_file():
            raise WorkloadError(f"there is no file {place}")
        directory = str(path.parent.resolve())
        if directory not in sys.path:
            sys.path.insert(0, directory)
        try:
            return runpy.run_path(str(path), run_name=path.stem)
        except Exception as error:
            raise WorkloadError(f"{place} cannot be run: {type(error).__name__}: {error}") from error
    try:
        return vars(importlib.import_module(place))
    except Exception as error:
        raise WorkloadError(f"the module {place!r} cannot be imported: {type(error).__name__}: {error}") from error
