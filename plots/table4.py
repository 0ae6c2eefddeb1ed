"""Table 4: simulation throughput of asynchronous tasks and of bulk-synchronous rounds."""

from matplotlib.figure import Figure

from trio_ray.experiments.results import Point, Result
from trio_ray.plots.style import COLOURS, draw_points, finish, new_figure, plain_log_ticks

SERIES = {"asynchronous tasks": "Ray asynchronous tasks", "bulk-synchronous rounds": "MPI bulk synchronous"}
"""Ours, and the paper's name for the same."""


def draw(result: Result) -> Figure:
    """Throughput on the left; on the right how much of what one CPU does each CPU still does."""
    figure, (left, right) = new_figure(2, result.title)
    for colour, (ours, papers) in zip(COLOURS, SERIES.items(), strict=False):
        for world, name in (("measured", ours), ("simulated", ours), ("paper", papers)):
            points = result.series(name, world)
            draw_points(left, points, ours if world != "paper" else papers, colour)
            draw_points(right, _efficiency(points), ours if world != "paper" else papers, colour)
    left.set_yscale("log")
    left.set_ylabel("timesteps per second")
    right.set_ylabel("share of one CPU's rate kept by each CPU")
    right.set_ylim(0, 1.15)
    sizes = sorted({point.x for point in result.points})
    for axes in (left, right):
        plain_log_ticks(axes, sizes)
        axes.set_xlabel("CPUs")
    return finish(figure, (left, right), result)


def _efficiency(points: list[Point]) -> list[Point]:
    """Each point over what the first would give at perfect scaling."""
    if not points:
        return []
    each = points[0].y / points[0].x
    return [Point(series=point.series, world=point.world, x=point.x, y=point.y / point.x / each) for point in points]
