"""A command line of its own for each test: clusters, profiles and files of other tests and users are out of sight."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from trio_ray.runtime.cli import main

LIMIT_S = 60.0

TrioRay = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The working directory of the commands."""
    return tmp_path


@pytest.fixture
def trio_ray(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[TrioRay]:
    """Run a command and wait for it; clusters left over end with the test."""
    short = Path(tempfile.mkdtemp(prefix="tr-"))  # Unix sockets have short paths
    root = Path(__file__).resolve().parents[2]
    for variable, value in {
        "XDG_RUNTIME_DIR": str(short), "XDG_CONFIG_HOME": str(short / "config"), "COLUMNS": "200", "NO_COLOR": "1",
        "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]),
    }.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    monkeypatch.delenv("TRIO_RAY_ADDRESS", raising=False)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [sys.executable, "-m", "trio_ray.runtime.cli.main", *arguments],
            cwd=folder, capture_output=True, text=True, timeout=LIMIT_S, stdin=subprocess.DEVNULL,
        )  # fmt: skip

    try:
        yield run
    finally:
        run("down", "--all")
        shutil.rmtree(short, ignore_errors=True)


@pytest.fixture
def refused(
    trio_ray: TrioRay, folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., str]]:
    """Run a command, in this process, that must fail with a sentence and no traceback; the sentence."""
    path = list(sys.path)
    monkeypatch.chdir(folder)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["trio-ray", *arguments])
        with pytest.raises(SystemExit) as ended:
            main.run()
        said = capfd.readouterr()
        assert ended.value.code not in (0, None), said.out
        assert "Traceback" not in said.err + said.out, said.err
        assert said.err.strip(), "it says nothing"
        return said.err

    yield run
    sys.path[:] = path
