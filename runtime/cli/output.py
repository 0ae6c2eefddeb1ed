"""How the command line speaks: tables, progress, and errors that are sentences."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

if TYPE_CHECKING:
    from rich.console import Console

    from trio_ray.experiments.registry import Progress as Tell


class Stop(Exception):
    """Ends the command: a sentence for the person who gave it, and an exit code."""

    def __init__(self, sentence: str, code: int = 1) -> None:
        super().__init__(sentence)
        self.code = code


def stop(sentence: str) -> NoReturn:
    """End the command with this sentence."""
    raise Stop(sentence)


def sentence_of(error: BaseException) -> str:
    """What an error says, in one sentence; its kind, if it says nothing. Of a group the first."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename} cannot be used: {error.strerror}."
    said = str(error).strip() or type(error).__name__
    return said[0].upper() + said[1:] + ("" if said[-1] in ".!?" else ".")


@contextmanager
def stopping_on(*kinds: type[BaseException]) -> Iterator[None]:
    """Errors of these kinds are the user's to mend: they end the command with what they say, without a traceback."""
    try:
        yield
    except kinds as error:
        raise Stop(sentence_of(error)) from error
    except BaseExceptionGroup as group:
        found, rest = group.split(kinds)
        if rest is not None or found is None:
            raise
        raise Stop(sentence_of(found)) from group


def console(stderr: bool = False) -> "Console":
    """Where tables and colours go."""
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def print_json(value: object) -> None:
    """For scripts: JSON alone on standard output."""
    import msgspec

    sys.stdout.write(msgspec.json.format(msgspec.json.encode(value), indent=1).decode() + "\n")


@contextmanager
def progress_bar() -> Iterator["Tell"]:
    """A bar on standard error while something long goes on; yields what tells it ``(done, total, doing)``.

    Where standard error is no terminal, each new thing done is one line.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    out = console(stderr=True)
    if not out.is_terminal:
        yield lambda done, total, doing: out.print(f"[{done}/{total}] {doing}", markup=False)
        return
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
    )  # fmt: skip
    with Progress(*columns, console=out, transient=True) as bar:
        task = bar.add_task("starting", total=None)

        def tell(done: int, total: int, doing: str) -> None:
            bar.update(task, completed=done, total=total, description=doing)

        yield tell
