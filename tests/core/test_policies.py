"""Scheduling policies: what each decides, that its two forms agree, and how one is found by name."""

import re
import sys
from importlib import metadata
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_ray.runtime.core.scheduling import policies
from trio_ray.runtime.core.scheduling.policies import BottomUp, InputView, NodeView, Policy, TaskView, load, names
from trio_ray.runtime.core.spec import resources

CPU1 = resources({"CPU": 1})
MB = 1_000_000


def node(
    name: str = "n:0", *, cpus: float = 4, free: float | None = None, position: int = 0, peers: int = 3, **fields: float
) -> NodeView:
    total = dict(resources({"CPU": cpus}))
    available = total if free is None else dict(resources({"CPU": free}))
    values: dict[str, float] = {"queued": 0, "running": 0, **fields}
    return NodeView(name, total, available, position=position, peers=peers, **values)  # type: ignore[arg-type]


def task(mean_s: float = 0.0, **fields: object) -> TaskView:
    return TaskView("f", fields.pop("placement", CPU1), mean_s, **fields)  # type: ignore[arg-type]


def place(policy: Policy, nodes: list[NodeView], inputs: list[InputView] | None = None) -> str:
    choice = policy.place(task(), nodes, inputs or [], Random(1))
    return (choice[0] if isinstance(choice, tuple) else choice).node


# -- keep -------------------------------------------------------------------------------------------------------------


def test_tasks_of_microseconds_are_kept_in_thousands() -> None:
    assert BottomUp().keep_many(task(mean_s=5e-6), 10_000, node(free=0, running=4)) == 10_000


def test_tasks_of_seconds_are_kept_only_as_far_as_cpus_are_free() -> None:
    assert BottomUp().keep_many(task(mean_s=1.0), 10, node(free=3, running=1)) == 3
    assert BottomUp().keep_many(task(mean_s=1.0), 10, node(free=0, running=4)) == 0


def test_tasks_of_unknown_length_are_kept_only_as_far_as_cpus_are_free() -> None:
    """However short the tasks were that the node ran until now."""
    assert BottomUp().keep_many(task(), 10, node(mean_task_s=1e-6)) == 4
    assert BottomUp().keep_many(task(), 10, node(mean_task_s=1e-6, queued=3)) == 1


def test_short_tasks_do_not_queue_behind_long_ones() -> None:
    assert BottomUp().keep_many(task(mean_s=1e-6), 10, node(free=0, running=4, mean_task_s=2.0)) == 0


def test_the_wait_is_counted_in_whole_rounds() -> None:
    """Ten milliseconds each, twenty allowed, four at a time: two rounds, eight tasks."""
    assert BottomUp().keep_many(task(mean_s=0.010), 100, node(free=0, running=4)) == 8
    assert BottomUp().keep_many(task(mean_s=0.010), 100, node(free=0, running=4, queued=5)) == 3


def test_what_a_node_can_never_hold_is_not_kept() -> None:
    gpu = task(placement=resources({"GPU": 1}))
    assert not BottomUp().keep(gpu, node())
    assert not BottomUp().keep(gpu, node(peers=0))


def test_a_node_alone_keeps_everything_it_can_hold() -> None:
    assert BottomUp().keep_many(task(mean_s=100.0), 1000, node(free=0, queued=1000, peers=0)) == 1000


def test_each_actor_takes_a_slot_though_it_holds_no_cpu() -> None:
    assert BottomUp().keep_many(task(is_actor=True), 10, node(actors=3)) == 1
    assert BottomUp().keep_many(task(is_actor=True), 10, node(actors=5)) == 0


def test_locality_keeps_what_has_its_inputs_here() -> None:
    locality = load("locality")
    assert locality.keep(task(inputs=2, inputs_here=2), node())
    assert not locality.keep(task(inputs=2, inputs_here=1), node())


def test_policies_that_only_place_keep_nothing_while_there_are_others() -> None:
    assert not load("random").keep(task(), node())
    assert load("random").keep(task(), node(peers=0))
    assert not load("centralized").keep(task(mean_s=1e-6), node())


views = st.builds(
    node,
    cpus=st.sampled_from([0, 0.5, 1, 4, 64]),
    free=st.sampled_from([0, 0.5, 1, 3]),
    peers=st.integers(0, 2),
    queued=st.integers(0, 30),
    running=st.integers(0, 8),
    actors=st.integers(0, 5),
    mean_task_s=st.sampled_from([0.0, 1e-6, 0.003, 1.0]),
)
tasks = st.builds(
    task,
    mean_s=st.sampled_from([0.0, 1e-6, 0.001, 0.007, 0.02, 1.0]),
    placement=st.sampled_from([(), CPU1, resources({"CPU": 0.5}), resources({"CPU": 2})]),
    inputs=st.integers(0, 2),
    inputs_here=st.integers(0, 2),
    is_actor=st.booleans(),
)


@pytest.mark.parametrize("name", names())
@given(of=tasks, view=views, count=st.integers(1, 40))
def test_keeping_many_is_keeping_one_after_the_other(name: str, of: TaskView, view: NodeView, count: int) -> None:
    policy = load(name)
    one_by_one = 0
    while one_by_one < count and policy.keep_many(of, 1, view.after(one_by_one)):
        one_by_one += 1
    assert policy.keep_many(of, count, view) == one_by_one
    assert policy.keep(of, view) == (one_by_one > 0)


def test_overriding_keep_alone_is_enough() -> None:
    class Few(BottomUp):
        def keep(self, task: TaskView, node: NodeView) -> bool:
            return node.queued < 2

    assert Few().keep_many(task(mean_s=1e-6), 100, node()) == 2


# -- place ------------------------------------------------------------------------------------------------------------


def test_bottom_up_weighs_waiting_against_moving() -> None:
    """Paper, section 4.2.2: queue times mean task time, plus remote input bytes over bandwidth."""
    busy = node("n:busy", cpus=1, free=0, queued=9, running=1, mean_task_s=0.1)
    idle = node("n:idle", cpus=1, bandwidth_bytes_per_s=100 * MB, position=1)
    assert place(BottomUp(), [busy, idle], [InputView(b"x", 50 * MB, ("n:busy",))]) == "n:idle"  # 1 s against 0.5 s
    assert place(BottomUp(), [busy, idle], [InputView(b"x", 500 * MB, ("n:busy",))]) == "n:busy"  # 1 s against 5 s


def test_bottom_up_takes_the_least_loaded_of_idle_nodes() -> None:
    assert place(BottomUp(), [node("n:a", free=1, running=3), node("n:b", free=3, running=1, position=1)]) == "n:b"


def test_bottom_up_counts_a_queue_by_the_cpus_that_serve_it() -> None:
    small = node("n:small", cpus=2, free=0, queued=10, running=2, mean_task_s=0.1)
    large = node("n:large", cpus=64, free=0, queued=20, running=64, mean_task_s=0.1, position=1)
    assert place(BottomUp(), [small, large]) == "n:large"


def test_locality_goes_where_most_bytes_are() -> None:
    inputs = [InputView(b"x", 10 * MB, ("n:a",)), InputView(b"y", MB, ("n:b", "n:c"))]
    nodes = [node("n:c"), node("n:a", queued=100, position=1), node("n:b", position=2)]
    assert place(load("locality"), nodes, inputs) == "n:a"
    assert place(load("locality"), nodes, []) == "n:c"


def test_least_loaded_counts_tasks_for_each_cpu() -> None:
    nodes = [node("n:a", cpus=2, running=2, free=0), node("n:b", cpus=8, running=4, free=4, position=1)]
    assert place(load("least-loaded"), nodes) == "n:b"


def test_spread_counts_tasks_and_pack_fills_up() -> None:
    nodes = [
        node("n:full", free=0, running=4),
        node("n:half", free=2, running=2, position=1),
        node("n:idle", position=2),
    ]
    assert place(load("spread"), nodes) == "n:idle"
    assert place(load("pack"), nodes) == "n:half"
    assert place(load("pack"), nodes[:1]) == "n:full"


def test_round_robin_takes_turns_also_when_a_node_leaves() -> None:
    policy = load("round-robin")
    nodes = [node(f"n:{i}", position=i) for i in range(3)]
    assert [place(policy, nodes) for _ in range(4)] == ["n:0", "n:1", "n:2", "n:0"]
    del nodes[1]
    assert [place(policy, nodes) for _ in range(3)] == ["n:2", "n:0", "n:2"]


def test_random_reaches_every_node_and_power_of_two_prefers_the_idle() -> None:
    nodes = [node("n:a", running=4), node("n:b", position=1), node("n:c", running=2, position=2)]
    rng = Random(3)
    chosen = {
        name: [load(name).place(task(), nodes, [], rng).node for _ in range(300)]  # type: ignore[union-attr]
        for name in ("random", "power-of-two")
    }
    assert set(chosen["random"]) == {"n:a", "n:b", "n:c"}
    busiest, idlest, middle = (chosen["power-of-two"].count(node.node) for node in nodes)
    assert busiest < middle < idlest


# -- by name ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_each_shipped_policy_loads_anew(name: str) -> None:
    assert load(name) is not load(name)


MINE = """
from trio_ray.runtime.core.scheduling.policies import Policy

class First(Policy):
    def place(self, task, nodes, inputs, rng):
        return nodes[0]

class Needy(First):
    def __init__(self, what):
        pass

class Unfinished(Policy):
    pass

def function():
    pass
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a_policy.py").write_text(MINE)
    (tmp_path / "a_broken_policy.py").write_text("import a_module_nobody_has")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("a_policy", "a_broken_policy"):
        monkeypatch.delitem(sys.modules, name, raising=False)


@pytest.mark.usefixtures("mine")
def test_a_class_of_ones_own_loads_by_module_and_name() -> None:
    assert place(load("a_policy:First"), [node("n:a"), node("n:b", position=1)]) == "n:a"


@pytest.mark.usefixtures("mine")
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("bottom_up", r"no scheduling policy 'bottom_up'; choose one of bottom-up, .*'module:Class'"),
        ("nowhere:First", r"no module 'nowhere'; .*PYTHONPATH"),
        ("a_broken_policy:First", r"importing 'a_broken_policy' failed with ModuleNotFoundError: .*_nobody_has"),
        ("a_policy:Frist", r"'a_policy' has no 'Frist'; the policies in it are First, Needy"),
        ("a_policy:function", r"not a class derived from Policy"),
        ("a_policy:Unfinished", r"not a class derived from Policy .* with a 'place' method"),
        ("a_policy:Needy", r"could not be made by calling Needy\(\) without arguments"),
        (":First", r"not of the form 'module:Class'"),
        ("a_policy:", r"not of the form 'module:Class'"),
    ],
)
def test_what_cannot_be_loaded_is_explained(name: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        load(name)


@pytest.mark.usefixtures("mine")
def test_an_installed_package_can_publish_a_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    published = metadata.EntryPoints([metadata.EntryPoint("firsts", "a_policy:First", "trio_ray.policies")])
    monkeypatch.setattr(metadata, "entry_points", lambda group: published.select(group=group))
    assert place(load("firsts"), [node("n:a")]) == "n:a"
    assert "firsts" in names()
    with pytest.raises(ValueError, match="firsts"):
        load("seconds")


def test_the_example_in_the_documentation_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(policies.__file__).resolve().parents[4] / "docs" / "policies.md").read_text()
    blocks = re.findall(r"```python\n(# (\w+)\.py\n.*?)```", text, re.DOTALL)
    assert blocks
    for source, module in blocks:
        assert len([line for line in source.splitlines() if line.strip()]) <= 16
        (tmp_path / f"{module}.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, module, raising=False)
        (name,) = re.findall(r"^class (\w+)\(", source, re.MULTILINE)
        policy = load(f"{module}:{name}")
        nodes = [node("n:a", running=4, free=0), node("n:b", position=1)]
        assert place(policy, nodes, [InputView(b"x", MB, ("n:a",))]) in ("n:a", "n:b")
        assert 0 <= policy.keep_many(task(), 10, nodes[0]) <= 10
