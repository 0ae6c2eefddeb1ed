"""The benchmark's arithmetic and its command; how fast anything is, is not a matter for tests."""

import json

import pytest
from typer.testing import CliRunner

from trio_ray.experiments.bench.compare import BENCHMARKS, OURS, Figures, run, run_one
from trio_ray.runtime.cli.main import app


def test_a_ratio_is_the_median_over_neighbouring_runs() -> None:
    figures = Figures("speed", "1/s", True, {OURS: [10.0, 40.0, 30.0], "ray": [5.0, 10.0, 10.0]})
    assert figures.median(OURS) == 30.0
    assert figures.ratio("ray") == 3.0


def test_where_less_is_better_the_ratio_is_turned() -> None:
    figures = Figures("start", "s", False, {OURS: [0.5], "ray": [4.0]})
    assert figures.ratio("ray") == 8.0


def test_a_system_that_failed_has_no_ratio() -> None:
    assert Figures("speed", "1/s", True, {OURS: [1.0]}, {"ray": "boom"}).ratio("ray") is None


def test_a_benchmark_runs_in_a_process_of_its_own() -> None:
    import sys

    figure, error = run_one(sys.executable, "processpool", "single client tasks sync", 0.05)
    assert figure is not None and figure > 0, error


def test_ours_runs_too() -> None:
    import sys

    for name in ("single client tasks async", "control store: object rows written and freed"):
        figure, error = run_one(sys.executable, OURS, name, 0.05)
        assert figure is not None and figure > 0, error


def test_unknown_names_are_refused(tmp_path: object) -> None:
    with pytest.raises(ValueError, match="there is no benchmark 'nothing'"):
        list(run(["nothing"], [OURS], repeats=1, seconds=0.1, cache=tmp_path, announce=print))  # type: ignore[arg-type]


def test_the_command_lists_and_refuses() -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["bench", "--list", "--only", "actor"]).output.splitlines()
    assert len(listed) == sum("actor" in name for name in BENCHMARKS)
    refused = runner.invoke(app, ["bench", "--only", "no such thing"])
    assert refused.exit_code != 0
    assert "o benchmark's name contains" in str(refused.exception)


def test_json_is_for_scripts() -> None:
    result = CliRunner().invoke(
        app, ["bench", "--only", "control store", "--repeats", "1", "--seconds", "0.05", "--json"]
    )
    found = json.loads(result.stdout)
    assert found[0]["unit"] == "rows/s" and found[0]["median"][OURS] > 0
