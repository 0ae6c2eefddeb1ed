"""Cluster descriptions, cost profiles and task costs: what they mean, and what is said when they are wrong."""

import json
from pathlib import Path

import numpy as np
import pytest

from trio_ray.runtime.core.spec import resources
from trio_ray.simulate.cluster import ClusterError, ClusterSpec
from trio_ray.simulate.costs import CostError, Samples, TaskCosts, exponential, lognormal, model, recorded, uniform
from trio_ray.simulate.profile import PROFILE_VERSION, Profile, ProfileError, default_profile, load_profile

DESCRIPTION = """
shards = 4
spread_shards = true

[[groups]]
name = "cpu"
count = 3
cpus = 32
latency_s = 0.001

[[groups]]
name = "gpu"
cpus = 16
gpus = 8
resources = { fast_disk = 0.5 }
labels = { zone = "b" }
"""


def test_a_description_gives_the_nodes_in_order(tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(DESCRIPTION)
    spec = ClusterSpec.load(path)
    assert spec.nodes == 4 and spec.shards == 4
    infos = [info for info, _ in spec.each()]
    assert len({info.node for info in infos}) == 4
    assert infos[0].resources == resources({"CPU": 32})
    assert infos[3].resources == resources({"CPU": 16, "GPU": 8, "fast_disk": 0.5})
    assert infos[3].labels == (("group", "gpu"), ("zone", "b"))


def test_json_and_toml_say_the_same(tmp_path: Path) -> None:
    toml, plain = tmp_path / "c.toml", tmp_path / "c.json"
    toml.write_text("[[groups]]\ncount = 2\ncpus = 4\n")
    plain.write_text(json.dumps({"groups": [{"count": 2, "cpus": 4}]}))
    assert ClusterSpec.load(toml) == ClusterSpec.load(plain)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[groups]\n", "not valid TOML"),
        ("[[groups]]\ncpu = 3\n", "cpu"),
        ("[[groups]]\ncount = 0\n", "at least one"),
        ("[[groups]]\ncpus = -1\n", "cpus = -1"),
        ("[[groups]]\nbandwidth_bytes_per_s = 0\n", "bandwidth"),
        ("[[groups]]\nresources = { x = -2 }\n", "'x'"),
        ("shards = 0\n[[groups]]\n", "shard"),
    ],
)
def test_a_wrong_description_is_named_in_a_sentence(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "cluster.toml"
    path.write_text(text)
    with pytest.raises(ClusterError, match=said):
        ClusterSpec.load(path)


def test_a_missing_description_is_named() -> None:
    with pytest.raises(ClusterError, match=r"nowhere\.toml"):
        ClusterSpec.load("nowhere.toml")


def test_a_profile_survives_the_file(tmp_path: Path) -> None:
    profile = default_profile()
    assert profile.kinds and profile.measured_at and profile.machine
    profile.save(tmp_path / "p.json")
    assert load_profile(tmp_path / "p.json") == profile


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is corrupt: it is not JSON"),
        ("[]", "version None"),
        ('{"version": 99}', "version 99"),
        (json.dumps({"version": PROFILE_VERSION, "step_s": "fast"}), "is corrupt"),
        (json.dumps({"version": PROFILE_VERSION, "step_s": -1}), "step_s is -1"),
        (json.dumps({"version": PROFILE_VERSION, "colour": 1}), "colour"),
        (json.dumps({"version": PROFILE_VERSION, "link": {"stream_bytes_per_s": 0}}), "rate"),
    ],
)
def test_a_bad_profile_is_named_and_says_what_to_do(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "profile.json"
    path.write_text(content)
    with pytest.raises(ProfileError, match=said) as caught:
        load_profile(path)
    assert str(path) in str(caught.value) and "trio-ray calibrate" in str(caught.value)


def test_a_missing_profile_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProfileError, match="cannot be read"):
        load_profile(tmp_path / "none.json")


def test_kinds_that_were_not_measured_have_a_price() -> None:
    assert Profile().kind("Unheard").step_message_s > 0


def square(x: int) -> int:
    return x * x


def test_costs_are_found_by_function_and_by_name() -> None:
    costs = TaskCosts({square: 0.5, "Simulator.rollout": uniform(1, 2), "misspelt": 1.0}, 0.25, seed=1)
    assert costs.of(square, "square").draw(costs.rngs, b"t" * 16) == 0.5
    assert 1 <= costs.of(None, "Simulator.rollout").draw(costs.rngs, b"t" * 16) <= 2
    assert costs.of(len, "len").draw(costs.rngs, b"t" * 16) == 0.25
    assert costs.unused == ["misspelt"]


def test_the_later_of_two_costs_wins() -> None:
    costs = TaskCosts({square: 0.5, "square": 0.25}, 0.0, seed=1)
    assert costs.of(square, "square").fixed_s == 0.25 and not costs.unused
    assert TaskCosts({"square": 0.25, square: 0.5}, 0.0, seed=1).of(square, "square").fixed_s == 0.5


def test_a_draw_depends_on_seed_and_task_only() -> None:
    def draws(seed: int, order: list[int]) -> dict[int, float]:
        costs = TaskCosts({"f": lognormal(mean=1.0, sigma=0.5)}, 0.0, seed=seed)
        cost = costs.of(None, "f")
        return {i: cost.draw(costs.rngs, i.to_bytes(16, "big")) for i in order}

    assert draws(1, [0, 1, 2]) == draws(1, [2, 1, 0])
    assert draws(1, [0]) != draws(2, [0])


def test_distributions_have_the_mean_they_are_given() -> None:
    rng = np.random.default_rng(1)
    for draw in (lognormal(mean=0.5, sigma=1.0), exponential(mean=0.5), uniform(0.0, 1.0), Samples([0.2, 0.8])):
        assert np.mean([draw(rng) for _ in range(20_000)]) == pytest.approx(0.5, rel=0.05)


def test_a_recorded_run_gives_costs_by_name(tmp_path: Path) -> None:
    trace = tmp_path / "timeline.json"
    events = [{"ph": "X", "name": "square", "dur": 2e6}, {"ph": "M", "name": "process_name"}]
    trace.write_text(json.dumps({"traceEvents": events}))
    plain = tmp_path / "plain.json"
    plain.write_text(json.dumps({"square": [2.0]}))
    for path in (trace, plain):
        assert recorded(path)["square"].durations_s.tolist() == [2.0]
    trace.write_text('{"traceEvents": []}')
    with pytest.raises(CostError, match="no tasks"):
        recorded(trace)
    trace.write_text('"hello"')
    with pytest.raises(CostError, match="no recorded run"):
        recorded(trace)


@pytest.mark.parametrize("cost", [-1, "slow", float("nan"), model(-0.1)])
def test_an_impossible_cost_names_its_function(cost: object) -> None:
    with pytest.raises(CostError, match="square"):
        TaskCosts({square: cost}, 0.0, seed=1)  # type: ignore[dict-item]


def test_a_negative_draw_names_its_function() -> None:
    costs = TaskCosts({square: lambda rng: -0.5}, 0.0, seed=1)
    with pytest.raises(CostError, match=r"square is -0\.5"):
        costs.of(square, "square").draw(costs.rngs, b"t" * 16)
