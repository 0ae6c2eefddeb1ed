"""The rules of the house that a reader could break without noticing: who may import what."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("runtime", "simulate", "experiments", "plots")

PURE = {
    "abc", "bisect", "collections", "dataclasses", "enum", "functools", "hashlib", "heapq", "itertools",
    "math", "operator", "re", "struct", "types", "typing", "zlib",
}  # fmt: skip
"""Standard modules that neither touch the world nor keep state."""

LOADER = "runtime/core/scheduling/policies/loader.py"
"""The one place that imports code it does not know, by name."""

SHELLS = ("transport", "node", "worker", "client", "launch", "cli")


def modules(*folders: str) -> list[Path]:
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Every module that a file imports, wherever in it, and the line; ``from a import b`` gives ``a.b`` too."""
    tree = ast.parse(path.read_text(), str(path))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} imports relatively; write trio_ray.…"
            assert node.module is not None
            yield node.module, node.lineno
            for alias in node.names:
                yield f"{node.module}.{alias.name}", node.lineno


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def where(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def found(path: Path, *forbidden: str) -> list[str]:
    return [f"{where(path, line)} imports {name}" for name, line in imports(path) if within(name, *forbidden)]


@pytest.mark.parametrize("path", modules("runtime/core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_is_pure(path: Path) -> None:
    wrong = []
    allowed = PURE | ({"importlib"} if path == ROOT / LOADER else set())
    for name, line in imports(path):
        if within(name, "trio_ray.runtime.core", "msgspec") or name.partition(".")[0] in allowed:
            continue
        if name in ("random", "random.Random"):
            continue  # the type of what constructors are given; its functions are looked for below
        wrong.append(f"{where(path, line)} imports {name}")
    assert not wrong


@pytest.mark.parametrize("path", modules("runtime/core"), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_core_makes_no_randomness_and_prints_nothing(path: Path) -> None:
    tree = ast.parse(path.read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert "random" not in names, "use the Random that the constructor was given"
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert not called & {"print", "open", "input", "exec", "eval", "hash", "Random", "__import__"}


def test_what_users_write_stands_on_the_core_only() -> None:
    outer = [f"trio_ray.runtime.{shell}" for shell in SHELLS]
    wrong = []
    for path in modules("runtime/api"):
        wrong += found(
            path, *outer, "trio_ray.simulate", "trio_ray.experiments", "trio_ray.plots", "socket", "subprocess",
            "multiprocessing", "simpy",
        )  # fmt: skip
    assert not wrong


def test_the_real_shells_know_nothing_of_simulation() -> None:
    wrong = []
    for shell in SHELLS:
        if shell != "cli":  # the command line starts both
            for path in modules(f"runtime/{shell}"):
                wrong += found(
                    path, "simpy", "trio_ray.simulate", "trio_ray.experiments", "trio_ray.plots", "trio_ray.runtime.cli"
                )
    assert not wrong


def test_simulation_knows_nothing_of_the_real_shells() -> None:
    wrong = []
    for path in modules("simulate"):
        wrong += found(path, *(f"trio_ray.runtime.{shell}" for shell in SHELLS), "socket", "subprocess")
        wrong += found(path, "trio_ray.experiments", "trio_ray.plots")
    assert not wrong


def test_plots_only_read_results() -> None:
    wrong = []
    for path in modules("plots"):
        wrong += found(path, "trio_ray.runtime", "trio_ray.simulate", "trio", "simpy")
    assert not wrong


def test_everything_is_imported_as_trio_ray() -> None:
    """``import runtime`` would load a module a second time under another name, with classes that are not the same."""
    wrong = []
    for path in modules(*FOLDERS, "tests"):
        if "trio_ray" not in path.parts:
            wrong += found(path, *FOLDERS)
    assert not wrong


def test_importing_the_core_loads_nothing_heavy() -> None:
    """What it really loads, as against what its lines say."""
    code = (
        "import sys, trio_ray.runtime.core.node, trio_ray.runtime.core.scheduling.placement, "
        "trio_ray.runtime.core.control.store\n"
        "print(*sorted({'trio', 'simpy', 'numpy', 'matplotlib', 'asyncio', 'importlib.metadata'} "
        "& set(sys.modules)))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True).stdout
    assert loaded.split() == []
