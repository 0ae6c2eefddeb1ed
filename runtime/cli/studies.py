"""Commands that simulate, run experiments, draw plots and measure this machine."""

import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trio_ray.runtime.cli.output import console, print_json, progress_bar, stop, stopping_on

if TYPE_CHECKING:
    from trio_ray.experiments.results import Result

Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Policy = Annotated[str, typer.Option(help="Scheduling policy: a name, or module:Class for one of your own.")]
Seed = Annotated[int, typer.Option(help="One seed gives one history.")]
ProfilePath = Annotated[
    Path | None,
    typer.Option("--profile", help="Cost profile; by default this machine's, if calibrated.", show_default=False),
]
Results = Annotated[Path, typer.Option(help="Folder of the result files.")]

COST = re.compile(r"(?P<kind>lognormal|exponential|uniform)\((?P<figures>[^)]*)\)")


def simulate(
    program: Annotated[str, typer.Argument(help="A workload's name, or script.py:main; without: list them.")] = "",
    nodes: Annotated[int, typer.Option(help="Simulated nodes.")] = 1,
    cpus: Annotated[float, typer.Option(help="CPUs of each node.")] = 4.0,
    gpus: Annotated[float, typer.Option(help="GPUs of each node.")] = 0.0,
    cluster: Annotated[
        Path | None, typer.Option(help="A TOML or JSON description of the cluster instead.", show_default=False)
    ] = None,
    policy: Policy = "bottom-up",
    seed: Seed = 0,
    network: Annotated[str, typer.Option(help="simple or instant.")] = "simple",
    shards: Annotated[int, typer.Option(help="Control-store shards.")] = 1,
    profile: ProfilePath = None,
    parameter: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="A parameter of the workload.")
    ] = None,
    cost: Annotated[
        list[str] | None,
        typer.Option(metavar="FUNCTION=SECONDS", help="What a function takes; also lognormal(mean,sigma), …"),
    ] = None,
    costs: Annotated[
        Path | None, typer.Option(help="Measured costs: a recorded run, or lists of seconds.", show_default=False)
    ] = None,
    as_json: Json = False,
    trace: Annotated[Path | None, typer.Option(help="Write a Chrome trace here.", show_default=False)] = None,
    plot: Annotated[Path | None, typer.Option(help="Write a picture of the run here.", show_default=False)] = None,
) -> None:
    """Run a program on a modelled cluster, and report how it goes."""
    from trio_ray import exceptions, simulate
    from trio_ray.simulate.workloads import WORKLOADS, WorkloadError, load_workload

    if not program:
        _list("workload", {name: workload.summary for name, workload in WORKLOADS.items()})
        return
    _look_here()
    with stopping_on(WorkloadError, simulate.CostError):
        main, own_costs = load_workload(program, _pairs(parameter, "--set"))
        given = {name: _cost(text) for name, text in _pairs(cost, "--cost").items()}
        recorded = simulate.recorded(costs) if costs is not None else {}
    with (
        stopping_on(ValueError, simulate.SimulationError, exceptions.RayError),
        console(stderr=True).status(f"simulating {program}"),
    ):
        report = simulate.run(
            main, nodes=nodes, cpus=cpus, gpus=gpus, cluster=cluster, policy=policy, seed=seed, network=network,
            shards=shards, profile=_profile(profile), costs={**own_costs, **recorded, **given},
        )  # fmt: skip
    with stopping_on(OSError, ValueError):
        if trace is not None:
            report.chrome_trace(trace)
        if plot is not None:
            report.plot(plot)
    if as_json:
        print_json(report.to_dict())
    else:
        typer.echo(str(report))
        for what, path in (("trace", trace), ("plot", plot)):
            if path is not None:
                typer.echo(f"  {what:<13} {path}")


def experiment(
    name: Annotated[str, typer.Argument(help="Which; without a name: list them.")] = "",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats: a look, not a figure.")] = False,
    real: Annotated[bool, typer.Option("--real/--no-real", help="Run on this machine.")] = True,
    simulated: Annotated[bool, typer.Option("--simulated/--no-simulated", help="Run in simulation.")] = True,
    policy: Policy = "bottom-up",
    seed: Seed = 0,
    profile: ProfilePath = None,
    results: Results = Path("results"),
    as_json: Json = False,
) -> None:
    """Run an experiment in both worlds; write its figures and its plot."""
    from trio_ray.experiments.pendulum import GymnasiumMissing
    from trio_ray.experiments.registry import EXPERIMENTS, Options, UnknownExperiment, find
    from trio_ray.runtime.core.scheduling.policies import load

    if not name:
        _list("experiment", {entry.name: entry.summary for entry in EXPERIMENTS.values()})
        return
    _look_here()
    chosen = _profile(profile)
    with stopping_on(UnknownExperiment, ValueError):
        entry = find(name)
        load(policy)
        _check_profile(chosen)
    options = Options(
        real=real, simulated=simulated, quick=quick, seed=seed, policy=policy,
        profile=str(chosen) if chosen is not None else None,
    )  # fmt: skip
    with stopping_on(GymnasiumMissing), progress_bar() as progress:
        result = entry.load()(options, progress)
    with stopping_on(OSError):
        path = result.save(results)
    from trio_ray.plots.draw import plot as draw

    picture = draw(name, results)
    if as_json:
        import msgspec

        print_json(msgspec.to_builtins(result))
    else:
        _show(result)
        typer.echo(f"figures {path}, plot {picture}")


def plot(
    name: Annotated[str, typer.Argument(help="Which experiment's; without a name: all there are.")] = "",
    results: Results = Path("results"),
) -> None:
    """Draw plots from result files."""
    from trio_ray.experiments.results import ResultError
    from trio_ray.plots import draw

    with stopping_on(ResultError, OSError):
        for path in [draw.plot(name, results)] if name else draw.plot_all(results):
            typer.echo(str(path))


def calibrate(
    out: Annotated[
        Path | None, typer.Option(help="Where to write the profile; by default where simulations look for it.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure what the control plane costs on this machine: the profile that simulations charge."""
    import msgspec

    from trio_ray.experiments.calibration import calibrate as measure

    path = out if out is not None else calibrated()
    with stopping_on(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
    with stopping_on(RuntimeError), progress_bar() as progress:
        profile = measure(lambda part: progress(round(100 * part), 100, "measuring this machine"))
    with stopping_on(OSError):
        profile.save(path)
    if as_json:
        print_json(msgspec.to_builtins(profile))
        return
    out_console = console()
    for what, seconds in (
        ("submitting a task", profile.client.submit_s),
        ("reading a result", profile.client.get_s),
        ("running an empty task in a worker", profile.worker.task_s),
        ("starting a worker", profile.worker.start_s),
        ("from a process to its node", profile.link.unix_latency_s),
    ):
        out_console.print(f"  {what:<36} {seconds * 1e6:>9,.1f} µs")
    typer.echo(f"written to {path}")


def demo(results: Results = Path("results")) -> None:
    """Train a policy on a three-node cluster, then see in simulation how the program scales."""
    from trio_ray.experiments.demo import show
    from trio_ray.experiments.pendulum import GymnasiumMissing

    chosen = _profile(None)
    _check_profile(chosen)
    with stopping_on(GymnasiumMissing, OSError):
        show(results, str(chosen) if chosen is not None else None)


def calibrated() -> Path:
    """Where this user's profile of this machine is, once ``trio-ray calibrate`` has written it."""
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "trio-ray" / "profile.json"


def _profile(given: Path | None) -> Path | None:
    """The profile to charge: the one given, else this machine's, else (None) the one that comes with the package."""
    if given is not None:
        return given
    own = calibrated()
    return own if own.exists() else None


def _check_profile(path: Path | None) -> None:
    """Say now, not after minutes of measuring, that a profile cannot be used."""
    if path is not None:
        from trio_ray import simulate

        with stopping_on(simulate.ProfileError):
            simulate.load_profile(path)


def _look_here() -> None:
    """Let policies and modules of the working directory be found, as Python itself would."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)


def _pairs(texts: list[str] | None, option: str) -> dict[str, str]:
    pairs = {}
    for text in texts or []:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            stop(f"{option} {text!r} cannot be read; write NAME=VALUE.")
        pairs[name] = value
    return pairs


def _cost(text: str) -> Any:
    """A cost as written on the command line: seconds, or a distribution with its parameters."""
    from trio_ray import simulate

    found = COST.fullmatch(text)
    try:
        if found is None:
            return float(text)
        make = {"lognormal": simulate.lognormal, "exponential": simulate.exponential, "uniform": simulate.uniform}
        return make[found["kind"]](*(float(figure) for figure in found["figures"].split(",")))  # type: ignore[operator]
    except (TypeError, ValueError):
        stop(
            f"{text!r} is no cost; write seconds, lognormal(mean,sigma), exponential(mean) or uniform(low,high), "
            "all in seconds."
        )


def _list(kind: str, entries: dict[str, str]) -> None:
    from rich.table import Table

    table = Table(kind, "what it is", box=None, pad_edge=False, header_style="bold")
    for name, summary in entries.items():
        table.add_row(name, summary)
    console().print(table)


def _show(result: "Result") -> None:
    """The points as a table."""
    from rich.table import Table

    table = Table(
        "series", "world", result.units.get("x", "x"), result.units.get("y", "y"), "spread", title=result.title,
        title_justify="left", box=None, pad_edge=False, header_style="bold",
    )  # fmt: skip
    for point in result.points:
        spread = f"{point.low:,.0f} to {point.high:,.0f}" if point.repeats > 1 else ""
        table.add_row(point.series, point.world, f"{point.x:g}", f"{point.y:,.0f}", spread)
    out = console()
    out.print(table)
    for note in result.notes:
        out.print(f"  {note}", style="dim")
