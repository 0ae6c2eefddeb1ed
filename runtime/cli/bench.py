"""``trio-ray bench``: micro-benchmarks, alone or side by side with another system in the same run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from trio_ray.runtime.cli.output import console, print_json, progress_bar, stopping_on

if TYPE_CHECKING:
    from rich.table import Table

    from trio_ray.experiments.bench.compare import Figures

SYSTEMS = ("ray", "dask", "processpool")


def bench(
    only: Annotated[
        list[str] | None, typer.Option(help="Benchmarks whose name contains this; may be given several times.")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help=f"Also run it on: {', '.join(SYSTEMS)}; may be given several times.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Fresh processes for each system; they alternate.")] = 3,
    seconds: Annotated[float, typer.Option(min=0.05, help="How long each repeat measures, after a warm-up.")] = 1.0,
    listing: Annotated[bool, typer.Option("--list", help="Name the benchmarks and end.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the ratios here.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For scripts: JSON on standard output.")] = False,
) -> None:
    """Measure this machine: medians, spread, and ratios to another system measured in the same run."""
    from trio_ray.experiments.bench import compare as benchmarks

    names = [name for name in benchmarks.BENCHMARKS if not only or any(part in name for part in only)]
    if listing:
        for name in names:
            console().print(f"{name} [{benchmarks.BENCHMARKS[name].unit}]", markup=False)
        return
    with stopping_on(ValueError):
        if not names:
            raise ValueError(f"no benchmark's name contains {' or '.join(map(repr, only or []))}; --list names them")
        for system in compare or []:
            if system not in SYSTEMS:
                raise ValueError(f"there is no comparison with {system!r}; there are: {', '.join(SYSTEMS)}")
    found: list[Figures] = []
    with stopping_on(RuntimeError, OSError), progress_bar() as progress:
        found += benchmarks.run(
            names, [benchmarks.OURS, *(compare or [])], repeats=repeats, seconds=seconds, cache=cache(),
            announce=progress,
        )  # fmt: skip
    if plot is not None:
        from trio_ray.plots.bench import draw

        with stopping_on(OSError, ValueError):
            draw([figures.to_dict() for figures in found], plot)
    if as_json:
        print_json([figures.to_dict() for figures in found])
    else:
        console().print(_table(found, compare or []))


def cache() -> Path:
    """Where environments of systems to compare with are kept."""
    import os

    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "trio-ray"


def _table(found: "list[Figures]", others: list[str]) -> "Table":
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for name in ("benchmark", "median", "min - max", "unit"):
        table.add_column(name, justify="left" if name in ("benchmark", "unit") else "right")
    for system in others:
        table.add_column(system, justify="right")
        table.add_column("ratio", justify="right")
    for figures in found:
        table.add_row(*_row(figures, others))
    return table


def _row(figures: "Figures", others: list[str]) -> list[str]:
    from trio_ray.experiments.bench.compare import OURS

    ours = figures.runs.get(OURS, [])
    median = figures.median(OURS)
    row = [
        figures.name,
        _number(median) if median is not None else f"failed: {figures.errors.get(OURS, '')}",
        f"{_number(min(ours))} - {_number(max(ours))}" if ours else "",
        figures.unit,
    ]
    for system in others:
        theirs, ratio = figures.median(system), figures.ratio(system)
        row.append(_number(theirs) if theirs is not None else "failed" if system in figures.errors else "-")
        row.append(f"{ratio:.1f}x" if ratio is not None else "")
    return row


def _number(figure: float | None) -> str:
    if figure is None:
        return ""
    return f"{figure:,.0f}" if abs(figure) >= 100 else f"{figure:.3g}"
