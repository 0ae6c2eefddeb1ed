"""How many times faster than another system: one bar a benchmark, from what ``trio-ray bench --compare`` measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trio_ray.plots.style import COLOURS, FAINT, INK, new_figure


def draw(found: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw the ratios (log axis); ValueError if nothing was compared."""
    systems = sorted({system for figures in found for system in figures["ratio"]})
    if not systems:
        raise ValueError("there is nothing to draw: run it with --compare")
    figure, axes = new_figure(1, f"trio-ray compared with {', '.join(systems)}")
    one = axes[0]
    names = [figures["name"] for figures in found if any(figures["ratio"].values())]
    figure.set_size_inches(9, 1.6 + 0.3 * len(names) * len(systems))
    height = 0.8 / len(systems)
    for number, system in enumerate(systems):
        ratios = [
            next(figures["ratio"].get(system) for figures in found if figures["name"] == name) or 0 for name in names
        ]
        places = [index + number * height for index in range(len(names))]
        one.barh(places, ratios, height=height, color=COLOURS[number], label=system)
        for place, ratio in zip(places, ratios, strict=True):
            if ratio:
                one.text(ratio * 1.05, place, f"{ratio:.1f}x", va="center", fontsize=8, color=INK)
    one.set_xscale("log")
    one.axvline(1, color=FAINT, linewidth=1)
    one.set_yticks([index + 0.4 - height / 2 for index in range(len(names))], names, fontsize=8)
    one.invert_yaxis()
    one.set_xlabel("times better (medians of neighbouring runs)", color=INK)
    one.legend(fontsize=8, frameon=False, labelcolor=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
