"""The training program: its reward while it learns, and how it scales."""

from matplotlib.figure import Figure

from trio_ray.experiments.results import Result
from trio_ray.plots.style import COLOURS, FAINT, draw_points, finish, new_figure, plain_log_ticks


def draw(result: Result) -> Figure:
    """Reward per update on the left, simulated timesteps per second against CPUs on the right."""
    figure, (left, right) = new_figure(2, result.title)
    draw_points(left, result.series("reward", "measured"), "mean episode reward", COLOURS[0])
    left.set_xlabel("policy update")
    left.set_ylabel("reward (0 would be upright all the time)")
    scaling = result.series("scaling", "simulated")
    draw_points(right, scaling, "policy training", COLOURS[2])
    draw_points(right, result.series("scaling", "measured"), "policy training", COLOURS[0])
    if scaling:
        first, last = scaling[0], scaling[-1]
        right.plot(
            [first.x, last.x], [first.y, first.y * last.x / first.x],
            color=FAINT, linewidth=1, label="linear", zorder=1,
        )  # fmt: skip
        plain_log_ticks(right, sorted({point.x for point in scaling}))
    right.set_yscale("log")
    right.set_xlabel("CPUs, one simulator each")
    right.set_ylabel("timesteps per second")
    return finish(figure, (left, right), result)
