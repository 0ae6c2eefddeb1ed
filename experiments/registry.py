"""The experiments by name, and what each takes and gives."""

from collections.abc import Callable
from importlib import import_module
from typing import Protocol

import msgspec

from trio_ray.experiments.results import Result


class Progress(Protocol):
    """Is told how far an experiment is."""

    def __call__(self, done: int, total: int, doing: str) -> None:
        """``done`` of ``total`` parts are finished; ``doing`` says what is next, for a person."""


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """What can be asked of every experiment."""

    real: bool = True
    """Run on this machine."""
    simulated: bool = True
    """Run in simulation."""
    quick: bool = False
    """Fewer sizes and repeats: a look, not a figure."""
    seed: int = 0
    policy: str = "bottom-up"
    profile: str | None = None
    """Path of the cost profile that the simulation charges; None: the one that comes with the package."""


class Experiment(msgspec.Struct, frozen=True, kw_only=True):
    """An entry of the registry."""

    name: str
    summary: str
    """One line for lists."""
    module: str

    def load(self) -> Callable[[Options, Progress], Result]:
        """The function that runs it."""
        run: Callable[[Options, Progress], Result] = import_module(self.module).run
        return run


class UnknownExperiment(LookupError):
    """No experiment has this name; the sentence lists those there are."""


EXPERIMENTS = {
    experiment.name: experiment
    for experiment in (
        Experiment(
            name="table4",
            summary="simulation throughput: asynchronous tasks against bulk-synchronous rounds (paper, table 4)",
            module="trio_ray.experiments.table4",
        ),
        Experiment(
            name="fig8b",
            summary="empty tasks per second as nodes are added (paper, figure 8b)",
            module="trio_ray.experiments.fig8b",
        ),
        Experiment(
            name="training",
            summary="the policy training of the paper's figure 3, and how it scales",
            module="trio_ray.experiments.training_scaling",
        ),
    )
}


def find(name: str) -> Experiment:
    """The experiment of this name. Raises ``UnknownExperiment``."""
    if name not in EXPERIMENTS:
        raise UnknownExperiment(f"there is no experiment {name!r}; choose one of {', '.join(EXPERIMENTS)}")
    return EXPERIMENTS[name]
