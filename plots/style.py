"""One look for all figures: worlds are told apart by marker and line, series by colour."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from trio_ray.experiments.results import Point, Result

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c4554d")
INK = "#37352f"
FAINT = "#b8b5ae"

_LOOK: dict[str, dict[str, Any]] = {
    "measured": {"marker": "o", "linestyle": "-", "markersize": 8, "linewidth": 1.8, "zorder": 4},
    "simulated": {"marker": "s", "linestyle": "--", "markersize": 4.5, "linewidth": 1.4, "zorder": 3},
    "paper": {"marker": "x", "linestyle": ":", "markersize": 7, "linewidth": 1.2, "zorder": 2, "alpha": 0.75},
}


def new_figure(panels: int, title: str) -> tuple[Figure, list[Axes]]:
    """A figure with ``panels`` axes side by side."""
    layout = ConstrainedLayoutEngine(rect=(0, 0.03, 1, 0.97))  # room for the line at the foot
    figure = Figure(figsize=(6.2 * panels, 4.6), layout=layout, facecolor="white")
    figure.suptitle(title, fontsize=13, color=INK)
    axes = [figure.add_subplot(1, panels, number + 1) for number in range(panels)]
    for one in axes:
        one.grid(True, color=FAINT, linewidth=0.5, alpha=0.5)
        one.spines[["top", "right"]].set_visible(False)
        one.spines[["left", "bottom"]].set_color(FAINT)
        one.tick_params(colors=INK, labelsize=9)
    return figure, axes


def draw_points(axes: Axes, points: Sequence[Point], label: str, colour: str, *, scale: float = 1.0) -> None:
    """Draw points of one series and one world, with the spread of the repeats as bars."""
    if not points:
        return
    look = _LOOK[points[0].world]
    xs = [point.x for point in points]
    ys = [point.y * scale for point in points]
    below = [point.y * scale - (point.y if point.low is None else point.low) * scale for point in points]
    above = [(point.y if point.high is None else point.high) * scale - point.y * scale for point in points]
    spread = [below, above] if any(below) or any(above) else None
    axes.errorbar(
        xs, ys, yerr=spread, color=colour, capsize=3, elinewidth=1, label=f"{label} ({points[0].world})", **look
    )  # fmt: skip


def finish(figure: Figure, axes: Sequence[Axes], result: Result) -> Figure:
    """Legends, and a line that says where the figures come from."""
    for one in axes:
        handles, _ = one.get_legend_handles_labels()
        if handles:
            one.legend(fontsize=8, frameon=False, labelcolor=INK)
    machine = result.machine
    figure.text(
        0.995, 0.002,
        f"measured on {machine.get('cores', '?')} cores of {machine.get('processor', '?')}; {result.started_at[:10]}",
        ha="right", va="bottom", fontsize=6.5, color=FAINT,
    )  # fmt: skip
    return figure


def plain_log_ticks(axes: Axes, values: Sequence[float]) -> None:
    """A logarithmic x axis to base 2 that names the values there are."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(values), [f"{value:g}" for value in values])
    axes.minorticks_off()
