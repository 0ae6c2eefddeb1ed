"""Measuring the machines: every kind of message that programs make gets a price, and the fit finds what it should."""

from pathlib import Path

import pytest

from trio_ray.runtime.api.cluster import Cluster
from trio_ray.simulate import calibrate, run
from trio_ray.simulate.profile import load_profile


def test_every_kind_of_message_gets_a_price(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(calibrate, "REPEATS", 2)
    monkeypatch.setattr(calibrate, "BATCHES", (1, 4, 16))
    told: list[float] = []
    profile = calibrate.measure_machines(told.append)
    assert told == [0.5, 1.0]
    for kind in ("SubmitTasks", "RunTasks", "TasksDone", "ObjectsReady", "PlaceTasks", "AssignTasks", "TasksFinished",
                 "PutObjects", "LocateObjects", "ObjectsLocated", "PullObject", "LogTasks"):  # fmt: skip
        cost = profile.kinds[kind]
        assert cost.encode_message_s + cost.encode_item_s > 0
        assert cost.message_bytes + cost.item_bytes > 0
    assert profile.kinds["SubmitTasks"].step_item_s > 0 and profile.step_s > 0
    assert profile.measured_at and profile.machine["python"] and profile.spread
    profile.save(tmp_path / "profile.json")

    async def main(cluster: Cluster) -> int:
        return int(await cluster.submit(abs, -3))

    assert run(main, profile=tmp_path / "profile.json").result == 3
    assert load_profile(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(("fixed", "item"), [(1e-5, 2e-6), (0.0, 3e-6), (4e-6, 0.0)])
def test_the_fit_finds_a_straight_line(fixed: float, item: float) -> None:
    rows = [(1, items, fixed + item * items) for items in (1, 4, 64, 1024)]
    rows += [(3, items, 3 * fixed + item * items) for items in (3, 300)]
    assert calibrate._fit(rows) == pytest.approx((fixed, item), abs=1e-12)


def test_a_fit_is_never_negative() -> None:
    assert min(calibrate._fit([(1, 1, 5.0), (1, 100, 1.0)])) >= 0
    assert calibrate._fit([]) == (0.0, 0.0)
