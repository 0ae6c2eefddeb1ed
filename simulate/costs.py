"""What tasks cost in simulation: how long each one keeps its worker busy, and what it returns.

``simulate.run(costs={function: cost})`` takes, for each remote function or actor method, one of

- seconds, ``0.005``;
- a callable of a ``numpy.random.Generator`` that draws seconds, such as ``lognormal(mean=0.005, sigma=1.0)``;
- ``Samples`` of a real run, such as ``recorded("timeline.json")["square"]``;
- ``model(...)``, which replaces the function: it is not run, and its result has a declared value and size.

A key is the function itself (decorated or not), or its name as reports show it: ``"square"``, ``"Simulator.rollout"``
for a method, ``"Simulator"`` for a constructor. Functions without an entry cost ``default_cost`` seconds (0 unless
given); the worker's own overhead comes on top, from the profile. Except with ``model``, functions run for real, so
that their values can steer the program; the real time that takes does not count.

A draw depends on the seed and the task's id only, so that two policies are compared on the very same work.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from math import log
from pathlib import Path
from typing import Any

import numpy as np

from trio_ray.runtime.api.actors import ActorClass
from trio_ray.runtime.api.remote import RemoteFunction

Draw = Callable[[np.random.Generator], float]
"""Draws a duration in seconds."""


class CostError(ValueError):
    """A cost that cannot be; the sentence says which and why."""


class Samples:
    """Durations measured on a real run; each task draws one of them."""

    def __init__(self, durations_s: Sequence[float]) -> None:
        if not len(durations_s):
            raise CostError("a measured cost needs at least one duration")
        self.durations_s = np.sort(np.asarray(durations_s, dtype=float))

    def __call__(self, rng: np.random.Generator) -> float:
        """One of the measured durations, each as likely."""
        return float(self.durations_s[rng.integers(len(self.durations_s))])

    def __repr__(self) -> str:
        return f"Samples({len(self.durations_s)} durations, mean {self.durations_s.mean():.4g} s)"


class Model:
    """Replaces a function; made by ``model``."""

    def __init__(
        self, duration: float | Draw, result: object, function: Callable[..., object] | None, size: int | None
    ) -> None:  # fmt: skip
        self.duration = duration
        self.result = result
        self.function = function
        self.size_bytes = size


Cost = float | int | Draw | Model
"""What ``costs`` may hold."""


def model(
    duration: float | Draw = 0.0, *, result: object = None, function: Callable[..., object] | None = None,
    size_bytes: int | None = None,
) -> Model:  # fmt: skip
    """Replace a function by a model: it takes ``duration`` and returns ``result``, or what ``function`` returns for
    the same arguments. Each value returned counts as ``size_bytes`` bytes wherever it is stored or moved, whatever it
    is in truth (None: its real size).

    >>> rollout = model(lognormal(mean=0.05, sigma=0.5), size_bytes=800_000)
    """
    if size_bytes is not None and size_bytes < 0:
        raise CostError(f"a result cannot have {size_bytes} bytes")
    return Model(duration, result, function, size_bytes)


def lognormal(mean: float, sigma: float) -> Draw:
    """Log-normal durations with this ``mean`` in seconds; ``sigma`` is the logarithm's deviation (1: heavy tail)."""
    if mean <= 0:
        raise CostError(f"a log-normal cost needs a mean above 0, not {mean}")
    mu = log(mean) - sigma * sigma / 2
    return lambda rng: float(rng.lognormal(mu, sigma))


def exponential(mean: float) -> Draw:
    """Exponential durations with this ``mean`` in seconds."""
    return lambda rng: float(rng.exponential(mean))


def uniform(low: float, high: float) -> Draw:
    """Durations between ``low`` and ``high`` seconds."""
    return lambda rng: float(rng.uniform(low, high))


def recorded(path: str | Path) -> dict[str, Samples]:
    """The durations of a real run by function name, ready to be passed as ``costs``.

    Reads what ``trio_ray.timeline(path)`` writes (a Chrome trace: its complete events are the tasks), or a plain JSON
    table of lists of seconds by function name. Raises ``CostError`` for anything else.
    """
    path = Path(path)
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CostError(f"the recorded run {path} cannot be read: {error}") from None
    durations: dict[str, list[float]] = {}
    try:
        if isinstance(plain, dict) and "traceEvents" not in plain:
            durations = {str(name): [float(value) for value in values] for name, values in plain.items()}
        else:
            for event in plain["traceEvents"] if isinstance(plain, dict) else plain:
                if event.get("ph") == "X":
                    durations.setdefault(str(event["name"]), []).append(float(event["dur"]) / 1e6)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CostError(
            f"{path} is no recorded run: it should hold a Chrome trace as `trio_ray.timeline` writes it, or lists of "
            f"seconds by function name ({type(error).__name__}: {error})"
        ) from None
    if not durations:
        raise CostError(f"the recorded run {path} holds no tasks")
    return {name: Samples(values) for name, values in durations.items()}


class TaskCost:
    """The cost of one function's tasks, as the simulated workers ask for it."""

    __slots__ = ("_draw", "fixed_s", "model", "name")

    def __init__(self, name: str, cost: Cost) -> None:
        self.name = name
        self.model = cost if isinstance(cost, Model) else None
        duration = cost.duration if isinstance(cost, Model) else cost
        self._draw = duration if callable(duration) else None
        self.fixed_s = 0.0 if callable(duration) else self._checked(duration)

    def _checked(self, duration: object) -> float:
        try:
            seconds = float(duration)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            seconds = -1.0
        if not 0.0 <= seconds < float("inf"):
            raise CostError(
                f"the cost of {self.name} is {duration!r}; a cost is a number of seconds, 0 or more, a callable of a "
                "numpy.random.Generator that draws one, or simulate.model(…)"
            )
        return seconds

    def draw(self, rngs: "TaskRandom", task_id: bytes) -> float:
        """Seconds for one task."""
        if self._draw is None:
            return self.fixed_s
        return self._checked(self._draw(rngs.of(task_id)))


class TaskRandom:
    """A random generator for each task, from the seed and the task's id.

    One generator is set back to a place of its own in a counter-based stream (Philox) for each task, which is six
    times faster than making a generator.
    """

    def __init__(self, seed: int) -> None:
        key = np.frombuffer(blake2b(f"task costs {seed}".encode(), digest_size=16).digest(), dtype="<u8")
        self._bits = np.random.Philox(key=key.astype(np.uint64))
        self._generator = np.random.Generator(self._bits)
        self._state: Any = self._bits.state

    def of(self, task_id: bytes) -> np.random.Generator:
        """The generator, at the task's place; valid until the next call."""
        state = self._state
        state["state"]["counter"][2:] = np.frombuffer(task_id[:16], dtype="<u8")
        self._bits.state = state
        return self._generator


class TaskCosts:
    """The ``costs`` of a simulation, found by function or name."""

    def __init__(self, costs: Mapping[Any, Cost], default_cost: Cost, seed: int) -> None:
        self.rngs = TaskRandom(seed)
        self._default = default_cost
        TaskCost("a function without an entry (default_cost)", default_cost)
        self._by_name: dict[str, tuple[int, TaskCost]] = {}
        """The later entry of ``costs`` wins where a function has two, hence their positions."""
        self._by_function: dict[int, tuple[int, TaskCost]] = {}
        """By identity."""
        self._alive = list(costs)
        self._unused: dict[str, None] = {}
        for position, (key, cost) in enumerate(costs.items()):
            function = undecorated(key)
            name = key if isinstance(key, str) else str(getattr(function, "__qualname__", key))
            entry = TaskCost(name, cost)
            self._unused[name] = None
            if isinstance(key, str):
                self._by_name[key] = position, entry
            elif callable(function):
                self._by_function[id(function)] = position, entry
            else:
                raise CostError(f"a cost is given for {key!r}, which is neither a function nor a function's name")

    def of(self, function: object, name: str) -> TaskCost:
        """The cost of a function's tasks; ``name`` is the one in its task template."""
        found = [self._by_function.get(id(undecorated(function))), self._by_name.get(name)]
        entries = sorted((entry for entry in found if entry is not None), key=lambda entry: entry[0])
        for _, entry in entries:
            self._unused.pop(entry.name, None)
        return entries[-1][1] if entries else TaskCost(name, self._default)

    @property
    def unused(self) -> list[str]:
        """Names in ``costs`` that no task had: a misspelt name, most likely."""
        return list(self._unused)


def undecorated(function: object) -> object:
    """The plain function or class behind ``@remote``; anything else unchanged."""
    return function.__wrapped__ if isinstance(function, RemoteFunction | ActorClass) else function
