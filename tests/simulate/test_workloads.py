"""Ready-made workloads run; a user's own is found; what cannot be loaded is a sentence."""

from pathlib import Path

import pytest

from trio_ray import simulate
from trio_ray.simulate.workloads import WORKLOADS, WorkloadError, load_workload

SMALL = {
    "noop": {"tasks": "200"},
    "chain": {"tasks": "50"},
    "fan-in": {"tasks": "20", "rounds": "2"},
    "tree": {"depth": "2", "width": "3"},
    "map-reduce": {"maps": "6", "reduces": "3"},
    "actors": {"actors": "3", "calls": "10"},
    "simulations": {"tasks": "60"},
    "training": {"simulators": "4", "iterations": "3"},
}
TASKS = {"noop": 200, "chain": 50, "fan-in": 42, "tree": 13, "map-reduce": 9, "actors": 33, "simulations": 60,
         "training": 19}  # fmt: skip


@pytest.mark.parametrize("name", WORKLOADS)
def test_each_workload_runs(name: str) -> None:
    main, costs = load_workload(name, SMALL[name])
    report = simulate.run(main, nodes=3, cpus=4, costs=costs, seed=1)
    assert report.tasks == TASKS[name] and not report.failed and not report.unused_costs
    assert report.makespan_s > 0


def test_a_shuffle_moves_its_blocks() -> None:
    main, costs = load_workload("map-reduce", {"maps": "8", "reduces": "8", "block_bytes": "1e6"})
    report = simulate.run(main, nodes=4, cpus=4, costs=costs)
    assert 20e6 < report.bytes_moved <= 64e6


def test_a_users_own_program_with_costs(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "import trio_ray\n"
        "@trio_ray.remote\n"
        "def work(x):\n"
        "    return x + 1\n"
        "async def main(cluster, count='3'):\n"
        "    return await cluster.gather([work.remote(i) for i in range(int(count))])\n"
        "costs = {work: 0.5}\n"
    )
    main, costs = load_workload(f"{path}:main", {"count": "4"})
    report = simulate.run(main, cpus=2, costs=costs)
    assert report.result == [1, 2, 3, 4] and report.makespan_s > 1.0


@pytest.mark.parametrize(
    ("name", "given", "said"),
    [
        ("nap", {}, "choose one of noop, chain"),
        ("noop", {"colour": "red"}, "no parameter 'colour'; it has tasks=10000"),
        ("noop", {"tasks": "many"}, "not 'many'"),
        ("nowhere.py:main", {}, "no file nowhere"),
        ("no.such.module:main", {}, "cannot be imported"),
        ("trio_ray.simulate.workloads.programs:absent", {}, "its coroutine functions are actors, chain"),
        ("trio_ray.simulate.workloads.programs:noop_costs", {}, "no coroutine function"),
        ("trio_ray.simulate.workloads.programs:noop", {"colour": "red"}, "colour"),
    ],
)
def test_what_cannot_be_loaded_is_a_sentence(name: str, given: dict[str, str], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        load_workload(name, given)


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import nothing_of_the_kind\n")
    with pytest.raises(WorkloadError, match="ModuleNotFoundError"):
        load_workload(f"{path}:main")
