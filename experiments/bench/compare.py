"""Runs the benchmark suite, alternating between systems, and reports medians, spread and ratios.

Each repeat is a fresh process in the system's own environment, and the repeats of two systems alternate, so that a
drift of the machine meets both. A ratio is the median of the ratios of neighbouring runs.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from trio_ray.experiments.bench.own import register
from trio_ray.experiments.bench.suite import BENCHMARKS, benchmark

register(benchmark)
__all__ = ["BENCHMARKS", "OURS", "Figures", "run"]

OURS = "trio_ray"
REQUIREMENTS = {"ray": ["ray==2.60.0", "numpy"], "dask": ["dask[distributed]"], "processpool": []}
"""What the environment of each system to compare with needs."""
SUITE = Path(__file__).with_name("suite.py")
RUN_LIMIT_S = 600
"""No single benchmark takes longer; one that does is reported as failed."""


@dataclass
class Figures:
    """What was measured of one benchmark."""

    name: str
    unit: str
    higher: bool
    runs: dict[str, list[float]] = field(default_factory=dict)
    """By system, one figure a repeat."""
    errors: dict[str, str] = field(default_factory=dict)

    def median(self, system: str) -> float | None:
        """The figure to quote."""
        runs = self.runs.get(system)
        return statistics.median(runs) if runs else None

    def ratio(self, system: str) -> float | None:
        """How many times better we are than ``system``: the median over pairs of neighbouring runs."""
        pairs = list(zip(self.runs.get(OURS, []), self.runs.get(system, []), strict=False))
        ratios = [ours / theirs if self.higher else theirs / ours for ours, theirs in pairs if ours and theirs]
        return statistics.median(ratios) if ratios else None

    def to_dict(self) -> dict[str, object]:
        """For ``--json``."""
        others = [system for system in self.runs if system != OURS]
        return {
            "name": self.name,
            "unit": self.unit,
            "runs": self.runs,
            "median": {system: self.median(system) for system in self.runs},
            "ratio": {system: self.ratio(system) for system in others},
            "errors": self.errors,
        }


def interpreter(system: str, cache: Path, announce: Callable[[str], None]) -> str:
    """The Python of a system's own environment, made under ``cache`` the first time.

    Raises RuntimeError if what it needs cannot be installed.
    """
    if system in (OURS, "processpool"):
        return sys.executable
    home = cache / f"bench-{system}"
    python = home / "bin" / "python"
    ready = home / "ready"
    if not ready.exists():
        announce(f"installing {', '.join(REQUIREMENTS[system])} into an environment of its own (once)")
        venv.create(home, with_pip=True, clear=True)
        done = subprocess.run(
            [python, "-m", "pip", "install", "--quiet", *REQUIREMENTS[system]], capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(f"could not install {system} to compare with: {done.stderr.strip().splitlines()[-1:]}")
        ready.touch()
    return str(python)


def run_one(python: str, system: str, name: str, seconds: float) -> tuple[float | None, str]:
    """One figure from a fresh process, or why there is none."""
    command = [python, str(SUITE), system, name, "--seconds", str(seconds)]
    paths = [str(Path(__file__).parents[3])] if system == OURS else []
    paths += [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and system == OURS]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_LIMIT_S, env=environment)
    except subprocess.TimeoutExpired:
        return None, f"it did not end within {RUN_LIMIT_S} s"
    for line in done.stdout.splitlines():
        if line.startswith("FIGURE "):
            told = json.loads(line.removeprefix("FIGURE "))
            return told["figure"], told["error"]
    last = done.stderr.strip().splitlines()[-1:] or ["nothing was printed"]
    return None, f"exit code {done.returncode}: {last[0]}"


def run(
    names: list[str], systems: list[str], *, repeats: int, seconds: float, cache: Path,
    announce: Callable[[int, int, str], None],
) -> Iterator[Figures]:  # fmt: skip
    """Measure benchmarks one after the other; yields each as it is done. Unknown names raise ValueError."""
    for name in names:
        if name not in BENCHMARKS:
            raise ValueError(f"there is no benchmark {name!r}; there are: {', '.join(BENCHMARKS)}")
    pythons = {
        system: interpreter(system, cache, lambda doing: announce(0, len(names), doing)) for system in systems
    }
    for position, name in enumerate(names):
        found = BENCHMARKS[name]
        figures = Figures(name, found.unit, found.higher)
        for repeat in range(repeats):
            for system in systems:
                if system not in found.systems or system in figures.errors:
                    continue
                announce(position, len(names), f"{name}: {system}, run {repeat + 1} of {repeats}")
                figure, error = run_one(pythons[system], system, name, seconds)
                if figure is None:
                    figures.errors[system] = error
                else:
                    figures.runs.setdefault(system, []).append(figure)
        yield figures
