"""Result files, the paper's points, and the registry."""

from pathlib import Path

import pytest

from trio_ray.experiments.paper import published
from trio_ray.experiments.registry import EXPERIMENTS, UnknownExperiment, find
from trio_ray.experiments.results import Point, Result, ResultError, load, machine_facts, point
from trio_ray.plots.draw import MODULES, plot, plot_all


def test_a_result_survives_its_file(tmp_path: Path) -> None:
    result = Result(
        experiment="table4", title="t", points=[point("s", "measured", 2, [3.0, 1.0, 2.0])], machine=machine_facts()
    )
    assert load(result.save(tmp_path)) == result
    assert result.points[0] == Point(series="s", world="measured", x=2, y=2.0, low=1.0, high=3.0, repeats=3)
    assert list(tmp_path.iterdir()) == [tmp_path / "table4.json"]


def test_series_are_in_order() -> None:
    points = [Point(series="s", world=world, x=x, y=1) for x, world in ((2, "paper"), (1, "paper"), (3, "measured"))]
    result = Result(experiment="e", title="t", points=points)
    assert [p.x for p in result.series("s", "paper")] == [1, 2]


@pytest.mark.parametrize(
    ("content", "says"), [(None, "no result file"), ("{", "corrupt"), ('{"version": 9}', "corrupt")]
)
def test_a_bad_file_is_a_sentence(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "fig8b.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ResultError, match=f"{says}.*trio-ray experiment fig8b"):
        load(path)


def test_another_version_is_a_sentence(tmp_path: Path) -> None:
    path = Result(experiment="fig8b", title="t", points=[], version=9).save(tmp_path)
    with pytest.raises(ResultError, match="has version 9"):
        load(path)


def test_the_papers_points() -> None:
    assert [p.y for p in published("fig8b", scale=1e6)][-1] == pytest.approx(1.825e6)
    assert {p.series for p in published("table4")} == {"MPI bulk synchronous", "Ray asynchronous tasks"}


def test_every_experiment_has_a_plot_and_runs() -> None:
    assert set(EXPERIMENTS) == set(MODULES)
    for experiment in EXPERIMENTS.values():
        assert callable(experiment.load())
    with pytest.raises(UnknownExperiment, match="choose one of table4"):
        find("table5")


@pytest.mark.parametrize("name", MODULES)
def test_every_plot_draws_any_part_of_its_points(tmp_path: Path, name: str) -> None:
    series = {"table4": "asynchronous tasks", "fig8b": "empty tasks", "training": "scaling"}[name]
    full = [
        *(Point(series=series, world=world, x=x, y=x * 1e4, low=x * 9e3, high=x * 1.1e4) for world in
          ("measured", "simulated") for x in (1, 2, 16)),
        *(published(name) if name != "training" else [Point(series="reward", world="measured", x=1, y=-900.0)]),
    ]  # fmt: skip
    for points in ([], full[:3], full):
        Result(experiment=name, title="t", points=points).save(tmp_path)
        assert plot(name, tmp_path).read_bytes().startswith(b"\x89PNG")
    assert plot_all(tmp_path) == [tmp_path / f"{name}.png"]


def test_no_results_to_plot(tmp_path: Path) -> None:
    with pytest.raises(ResultError, match="no results"):
        plot_all(tmp_path)
    with pytest.raises(ResultError, match="no plot"):
        plot("fig99", tmp_path)
