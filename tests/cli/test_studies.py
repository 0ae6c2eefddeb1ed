"""``trio-ray simulate``, ``experiment``, ``plot`` and ``calibrate``, as a person types them."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import TrioRay

PROGRAM = """
import trio_ray

@trio_ray.remote
def work(x):
    return x + 1

async def main(cluster):
    async with cluster.open_nursery() as nursery:
        refs = [nursery.start_soon(work, i) for i in range(20)]
    return sum(await cluster.gather(refs))

def plain(cluster):
    return 1
"""


def test_a_program_of_ones_own_is_simulated(trio_ray: TrioRay, folder: Path) -> None:
    (folder / "program.py").write_text(PROGRAM)
    arguments = ("simulate", "program.py:main", "--nodes", "2", "--cpus", "2", "--seed", "1", "--cost", "work=0.5")
    done = trio_ray(*arguments, "--json", "--trace", "trace.json", "--plot", "run.png")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["tasks"] == 20
    assert 2.5 <= report["makespan_s"] < 3.5
    assert len([e for e in json.loads((folder / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]) == 20
    assert (folder / "run.png").read_bytes().startswith(b"\x89PNG")
    text = trio_ray(*arguments)
    assert report["event_log_hash"] in text.stdout
    drawn = trio_ray(*arguments[:-1], "work=lognormal(0.5,1)", "--json")
    assert json.loads(drawn.stdout)["event_log_hash"] != report["event_log_hash"]


def test_lists(trio_ray: TrioRay) -> None:
    assert "map-reduce" in trio_ray("simulate").stdout
    assert "table4" in trio_ray("experiment").stdout
    assert "Usage" in trio_ray().stdout
    assert trio_ray("--version").stdout.startswith("trio-ray 0.")


def test_what_cannot_be_is_a_sentence(refused: Callable[..., str], folder: Path) -> None:
    (folder / "program.py").write_text(PROGRAM)
    (folder / "bad.json").write_text('{"version": 1, "client": {"submit_s": "long"}}')
    assert "choose one of noop" in refused("simulate", "nonsense")
    assert "coroutine" in refused("simulate", "program.py:plain")
    assert "main" in refused("simulate", "program.py:other")
    assert "no file nowhere.py" in refused("simulate", "nowhere.py:main")
    assert "choose one of bottom-up" in refused("simulate", "noop", "--policy", "nonsense")
    assert "corrupt" in refused("simulate", "noop", "--profile", "bad.json")
    assert "trio-ray calibrate" in refused("simulate", "noop", "--profile", "missing.json")
    assert "NAME=VALUE" in refused("simulate", "noop", "--set", "tasks")
    assert "no parameter 'colour'" in refused("simulate", "noop", "--set", "colour=1")
    assert "lognormal(mean,sigma)" in refused("simulate", "noop", "--cost", "empty=long")
    assert "nodes" in refused("simulate", "noop", "--nodes", "0")
    assert "choose one of table4" in refused("experiment", "nonsense")
    assert "corrupt" in refused("experiment", "table4", "--profile", "bad.json")
    assert "choose one of" in refused("experiment", "fig8b", "--policy", "nonsense")
    assert "there is no plot" in refused("plot", "nonsense").lower()
    assert "trio-ray experiment" in refused("plot")


def test_an_experiment_and_its_plot(trio_ray: TrioRay, folder: Path) -> None:
    done = trio_ray("experiment", "fig8b", "--quick", "--no-real", "--json")
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    assert {point["world"] for point in points} == {"simulated", "paper"}
    picture = folder / "results" / "fig8b.png"
    picture.unlink()
    assert trio_ray("plot", "fig8b").returncode == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    (folder / "results" / "fig8b.json").write_text("{")
    broken = trio_ray("plot", "fig8b")
    assert broken.returncode == 1 and "corrupt" in broken.stderr and "trio-ray experiment fig8b" in broken.stderr
