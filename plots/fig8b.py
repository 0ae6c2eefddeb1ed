"""Figure 8b: empty tasks per second against the number of nodes."""

from matplotlib.figure import Figure

from trio_ray.experiments.results import Result
from trio_ray.plots.style import COLOURS, FAINT, draw_points, finish, new_figure


def draw(result: Result) -> Figure:
    """All nodes on the left; the few that fit on one machine on the right."""
    figure, (left, right) = new_figure(2, result.title)
    ours, papers = "empty tasks", "Ray"
    simulated = result.series(ours, "simulated")
    millions, thousands = 1e-6, 1e-3
    for axes, scale in ((left, millions), (right, thousands)):
        draw_points(axes, result.series(ours, "measured"), "trio-ray, one machine", COLOURS[0], scale=scale)
        draw_points(axes, simulated, "trio-ray, a machine a node", COLOURS[2], scale=scale)
        draw_points(axes, result.series(papers, "paper"), "the paper's Ray", COLOURS[1], scale=scale)
        axes.set_xlabel("nodes")
    if simulated:
        each = simulated[0].y / simulated[0].x
        last = simulated[-1].x
        left.plot([0, last], [0, each * last * millions], color=FAINT, linewidth=1, label="linear", zorder=1)
    left.set_ylabel("million tasks per second")
    right.set_ylabel("thousand tasks per second")
    few = [point for point in result.points if point.world != "paper" and point.x <= 3]
    if few:
        right.set_xlim(0, max(point.x for point in few) * 1.05)
        right.set_xticks(sorted({point.x for point in few}))
        right.set_ylim(0, max(point.y for point in few) * thousands * 1.15)
    left.set_ylim(bottom=0)
    left.set_xlim(left=0)
    return finish(figure, (left, right), result)
