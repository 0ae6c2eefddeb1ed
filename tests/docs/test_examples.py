"""Every Python block of the README and the guides is a program that runs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("README.md", "docs/api.md", "docs/getting-started.md", "docs/simulation.md")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROGRAM = re.compile(r"^import trio_ray|^from trio_ray", re.MULTILINE)
"""Blocks that do not import trio_ray are fragments that lean on the one before."""

EXAMPLES = [
    pytest.param(block, id=f"{page}-{number}")
    for page in PAGES
    for number, block in enumerate(BLOCK.findall((ROOT / page).read_text(encoding="utf-8")), start=1)
    if PROGRAM.search(block)
]


@pytest.mark.parametrize("program", EXAMPLES)
def test_example(program: str, tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(program)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(path)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [*(path.name for path in (ROOT / "docs").glob("*.md")), "../README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / "docs" / page
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), f"{page} links to {target}"


@pytest.mark.parametrize("page", sorted(path.name for path in (ROOT / "docs").glob("*.md")))
def test_named_code_exists(page: str) -> None:
    """Files that documents name as `runtime/….py` are there, and define what is named after the colons."""
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    for file, name in re.findall(r"`((?:runtime|simulate|experiments|plots|tests)/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / file).is_file(), f"{page} names {file}"
        if name:
            assert re.search(rf"\b{name}\b", (ROOT / file).read_text()), f"{page} names {name} in {file}"
