"""Result files: what an experiment found, on which machine, by which command.

An experiment writes ``results/<name>.json``; plots and documents read nothing else. A point carries the median of its
repeats with the smallest and largest, so that every figure is shown with its spread.
"""

import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from os import cpu_count
from pathlib import Path
from statistics import median

import msgspec

RESULTS = Path("results")
"""Where result files go unless told otherwise, relative to the working directory."""

VERSION = 1


class ResultError(ValueError):
    """A result file that cannot be used; the sentence says why and what to do."""


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One point of a series."""

    series: str
    world: str
    """``measured``, ``simulated`` or ``paper``."""
    x: float
    y: float
    """The median of the repeats."""
    low: float | None = None
    """The smallest of the repeats."""
    high: float | None = None
    repeats: int = 1


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What one run of an experiment found."""

    experiment: str
    title: str
    points: list[Point]
    units: dict[str, str] = {}
    """Of ``x`` and ``y``, for axes: ``{"x": "CPUs", "y": "timesteps/s"}``."""
    parameters: dict[str, object] = {}
    """What the run was asked for."""
    figures: dict[str, object] = {}
    """Other findings, by name."""
    notes: list[str] = []
    """What a reader must know to judge the points."""
    command: str = ""
    machine: dict[str, str] = {}
    started_at: str = ""
    """Date and time, ISO 8601."""
    took_s: float = 0.0
    version: int = VERSION
    """Of this format."""

    def series(self, name: str, world: str) -> list[Point]:
        """The points of one series in order of ``x``; empty if it has none."""
        return sorted((p for p in self.points if p.series == name and p.world == world), key=lambda point: point.x)

    def save(self, folder: Path = RESULTS) -> Path:
        """Write ``<folder>/<experiment>.json`` whole or not at all, and return its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.experiment}.json"
        fresh = path.with_suffix(".json.new")
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")
        fresh.replace(path)
        return path


def point(series: str, world: str, x: float, values: Sequence[float]) -> Point:
    """The point of repeated measurements."""
    return Point(
        series=series, world=world, x=x, y=median(values), low=min(values), high=max(values), repeats=len(values)
    )


def load(path: Path) -> Result:
    """Read a result file. Raises ``ResultError`` if it is missing, corrupt or of another version."""
    again = f"run `trio-ray experiment {path.stem}` to write it"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise ResultError(f"there is no result file {path}; {again}") from None
    except OSError as error:
        raise ResultError(f"the result file {path} cannot be read ({error}); {again}") from None
    try:
        result = msgspec.json.decode(content, type=Result)
    except msgspec.MsgspecError as error:
        raise ResultError(f"the result file {path} is corrupt ({error}); {again} again") from None
    if result.version != VERSION:
        raise ResultError(
            f"the result file {path} has version {result.version}, but this trio-ray reads version {VERSION}; "
            f"{again} again"
        )
    return result


def machine_facts() -> dict[str, str]:
    """The machine and the versions that a figure depends on."""
    return {
        "processor": _processor(),
        "cores": str(cpu_count() or 1),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "trio": metadata.version("trio"),
        "trio-ray": metadata.version("trio-ray") if _installed("trio-ray") else "from source",
    }


def command_line() -> str:
    """The command this process was started by, as a person would type it."""
    name = Path(sys.argv[0]).name
    return " ".join(["trio-ray" if name == "main.py" else name, *sys.argv[1:]])


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
