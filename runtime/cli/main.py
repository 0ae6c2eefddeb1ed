"""The ``trio-ray`` command.

Commands import what they need when they run, so that ``trio-ray --help`` and short commands start at once. What a
person can mend ends as a sentence on standard error and a non-zero exit code (``output.Stop``); a traceback is a bug.
"""

import os
import sys
from typing import Annotated

import typer

from trio_ray.runtime.cli import bench, clusters, studies
from trio_ray.runtime.cli.output import Stop

app = typer.Typer(
    name="trio-ray",
    help="Remote functions and actors on a cluster, and the same programs in simulation.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)

CLUSTERS, STUDIES = "Clusters", "Simulation and experiments"
FORWARD = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}
"""What stands after the script's name is the script's."""

app.command(rich_help_panel=CLUSTERS)(clusters.up)
app.command(rich_help_panel=CLUSTERS)(clusters.status)
app.command(rich_help_panel=CLUSTERS)(clusters.down)
app.command(rich_help_panel=CLUSTERS)(clusters.start)
app.command(rich_help_panel=CLUSTERS, context_settings=FORWARD)(clusters.run)
app.command(rich_help_panel=STUDIES)(studies.simulate)
app.command(rich_help_panel=STUDIES)(studies.experiment)
app.command(rich_help_panel=STUDIES)(studies.plot)
app.command(rich_help_panel=STUDIES)(studies.calibrate)
app.command(rich_help_panel=STUDIES)(bench.bench)
app.command(rich_help_panel=STUDIES)(studies.demo)


def _print_version(wanted: bool) -> None:
    if wanted:
        import trio_ray

        typer.echo(f"trio-ray {trio_ray.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Remote functions and actors on a cluster, and the same programs in simulation."""


def _is_interrupt(error: BaseException) -> bool:
    """Whether it was Ctrl-C; Trio wraps it in a group when it met tasks on its way."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(KeyboardInterrupt) is not None
    return isinstance(error, KeyboardInterrupt)


def run() -> None:
    """Entry point of the script."""
    try:
        app()
    except Stop as stop:
        print(f"trio-ray: {stop}", file=sys.stderr)
        sys.exit(stop.code)
    except BrokenPipeError:  # whoever read our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except BaseException as error:
        if not _is_interrupt(error):
            raise
        print("trio-ray: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    run()
