"""From result files to pictures."""

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from trio_ray.experiments.results import RESULTS, Result, ResultError, load

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MODULES = {
    "table4": "trio_ray.plots.table4",
    "fig8b": "trio_ray.plots.fig8b",
    "training": "trio_ray.plots.training",
}


def plot(name: str, folder: Path = RESULTS) -> Path:
    """Draw ``<folder>/<name>.json`` as ``<folder>/<name>.png``, and return that path.

    Raises ``ResultError`` if there is no such experiment, or no usable result of it.
    """
    if name not in MODULES:
        raise ResultError(f"there is no plot {name!r}; choose one of {', '.join(MODULES)}")
    result = load(folder / f"{name}.json")
    draw: Callable[[Result], Figure] = import_module(MODULES[name]).draw
    path = folder / f"{name}.png"
    draw(result).savefig(path, dpi=150)
    return path


def plot_all(folder: Path = RESULTS) -> list[Path]:
    """Draw every result there is. Raises ``ResultError`` if there is none."""
    names = [name for name in MODULES if (folder / f"{name}.json").exists()]
    if not names:
        raise ResultError(
            f"there are no results in {folder} yet; run `trio-ray experiment NAME` first, "
            f"with one of {', '.join(MODULES)}"
        )
    return [plot(name, folder) for name in names]
