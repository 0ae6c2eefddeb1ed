"""``make demo``: the paper's training program on a real cluster, and the question how it would do on 256 CPUs."""

import time
from pathlib import Path

from rich.bar import Bar
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from trio_ray.experiments.registry import Options
from trio_ray.experiments.results import Result
from trio_ray.experiments.training import Plan
from trio_ray.experiments.training_scaling import CPUS, NODES, SIZES, study

WORST, BEST = -1_600.0, -100.0
"""Rewards between which the bars are drawn: a policy that does nothing of use, and about the best there is."""
SHOWN = 12
"""Of the updates, so many get a line on the page."""
PLAN = Plan(iterations=24, simulators=10, candidates=6, episodes=6)


class Page:
    """What is on the screen while the demo runs."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.rewards: list[float] = []
        self.doing = f"starting {NODES} nodes of {CPUS} CPUs each"
        self.began = time.monotonic()

    def on_reward(self, update: int, reward: float) -> None:
        """A policy has been tried out."""
        self.rewards.append(reward)
        self.doing = f"training: update {update} of {self.plan.iterations}"

    def on_progress(self, done: int, total: int, doing: str) -> None:
        """The simulations go on."""
        self.doing = doing

    def __rich__(self) -> Group:
        line = Text(f" {self.doing}  ", style="bold")
        line.append(f"{time.monotonic() - self.began:.0f} s", style="dim")
        return Group(reward_table(self.rewards, self.plan.iterations), Spinner("dots", line))


def reward_table(rewards: list[float], updates: int) -> Table:
    """The mean reward of a choice of the updates so far, as bars."""
    table = Table("update", "mean reward", "", box=None, pad_edge=False, header_style="dim")
    every = max(1, updates // SHOWN)
    for update, reward in enumerate(rewards, start=1):
        if update % every == 0 or update == 1:
            share = min(1.0, max(0.01, (reward - WORST) / (BEST - WORST)))
            table.add_row(f"{update:>6}", f"{reward:>11,.0f}", Bar(1.0, 0.0, share, width=48, color="cyan"))
    return table


def scaling_table(result: Result) -> Table:
    """Simulated throughput by CPUs, as bars of the share that each CPU keeps."""
    table = Table("CPUs", "timesteps/s", "of linear", "", box=None, pad_edge=False, header_style="dim")
    points = result.series("scaling", "simulated")
    for point in points:
        share = point.y / point.x / (points[0].y / points[0].x)
        table.add_row(
            f"{point.x:>4.0f}", f"{point.y:>11,.0f}", f"{share:>9.0%}",
            Bar(1.0, 0.0, min(1.0, share), width=40, color="green"),
        )  # fmt: skip
    return table


def show(folder: Path, profile: str | None = None) -> None:
    """Run the demo, and write its figures and plot into ``folder``."""
    from trio_ray.plots.draw import plot

    console = Console(highlight=False)
    console.print(
        Panel(
            Text.from_markup(
                "[bold]One program, two worlds.[/]\n"
                "The policy training of the Ray paper's figure 3, in small: simulator actors\n"
                "swing up Gymnasium's pendulum, an update task makes the next policy of the\n"
                "best they found."
            ),
            title="trio-ray",
            border_style="cyan",
        )
    )
    page = Page(PLAN)
    options = Options(profile=profile)
    if console.is_terminal:
        with Live(page, console=console, refresh_per_second=8, transient=True):
            result = study(PLAN, SIZES, options, page.on_reward, page.on_progress)
    else:
        console.print(f"starting {NODES} nodes, training, simulating; this takes half a minute\n")
        result = study(PLAN, SIZES, options, page.on_reward, page.on_progress)

    figures = result.figures
    console.print(
        f"[bold cyan]1  On a real cluster[/]   {NODES} node processes here, {PLAN.simulators} simulator actors\n"
    )
    console.print(reward_table(page.rewards, PLAN.iterations))
    console.print(
        f"\n   In [bold]{figures['training_s']:.1f} s[/] the reward rose from [bold]{figures['first reward']:,.0f}[/] "
        f"to [bold]{figures['last reward']:,.0f}[/] (0: always upright).\n"
        f"   {figures['rollouts']:,} rollouts of {figures['timesteps']:,} steps in all, "
        f"{figures['timesteps/s']:,.0f} a second.\n"
    )
    console.print(
        "[bold green]2  In simulation[/]   the same coroutine and scheduler on clusters we do not have:\n"
        "   a simulator for each CPU, whose rollouts take as long as those above\n"
    )
    console.print(scaling_table(result))
    last = result.series("scaling", "simulated")[-1]
    faster = last.y / float(str(figures["timesteps/s"]))
    console.print(
        f"\n   On {last.x:.0f} CPUs it would make [bold]{last.y / 1e6:,.1f} million[/] steps a second, "
        f"{faster:,.0f} times those here.\n"
    )
    result.save(folder)
    picture = plot("training", folder)
    console.print(f"[bold]3  To look at[/]   {picture}")
    console.print("   and to go on    trio-ray experiment table4, trio-ray up --nodes 3, README.md")
    console.print(f"\n[dim]Nothing is left running. It took {time.monotonic() - page.began:.0f} s.[/]")
