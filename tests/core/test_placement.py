"""Global placement: who gets what, what it knows when it decides, and what it says when it cannot."""

from collections import Counter
from collections.abc import Sequence
from random import Random
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.core.harness import Harness
from tests.core.harness import template as harness_template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.effects import AnyEffect, Send, SetTimer
from trio_ray.runtime.core.machine import Received, TimerFired
from trio_ray.runtime.core.messages import (
    Address,
    AnyMessage,
    AssignTasks,
    ControlAnswer,
    ControlQuery,
    Heartbeat,
    Load,
    LocateObjects,
    Location,
    NodeInfo,
    NodesChanged,
    ObjectsLocated,
    PlaceTasks,
    TasksPlaced,
    TasksUnplaceable,
)
from trio_ray.runtime.core.scheduling.placement import PlacementMachine
from trio_ray.runtime.core.scheduling.policies import BottomUp, InputView, NodeView, Policy, TaskView, load
from trio_ray.runtime.core.spec import Kind, Resources, TaskSpec, TaskTemplate, resources

CPU1 = resources({"CPU": 1})
MB = 1_000_000


def template(name: str = "f", shape: Resources = CPU1, policy: str = "") -> TaskTemplate:
    template_id = ids.content_id(f"{name}{shape}{policy}".encode())
    return TaskTemplate(template_id, b"f" * 8, name, Kind.TASK, shape, shape, 1, 0, policy=policy)


F = template()


class Placement:
    """A placement machine whose every step is validated, and what it said."""

    def __init__(self, policy: str | Policy = "bottom-up", nodes: int = 3, cpus: float = 2, **options: Any) -> None:
        chosen = load(policy) if isinstance(policy, str) else policy
        self.machine = PlacementMachine(chosen, shards=options.pop("shards", 1), rng=Random(0), **options)
        self.now = 0.0
        self.effects: list[AnyEffect] = []
        self.count = 0
        assert self.machine.start(0.0) == []
        for index in range(nodes):
            self.join(index, {"CPU": cpus})

    def join(self, index: int, amounts: dict[str, float], alive: bool = True) -> None:
        info = NodeInfo(f"n:{index}", "", resources(amounts), alive=alive)
        self.receive("control/0", NodesChanged([info]))

    def receive(self, source: Address, *messages: AnyMessage) -> None:
        self.effects = self.machine.step([Received(source, message) for message in messages], self.now)
        self.machine.validate()

    def fire(self, key: str, now: float) -> None:
        self.now = now
        self.effects = self.machine.step([TimerFired(key)], now)
        self.machine.validate()

    def beat(
        self, index: int, queued: int = 0, running: int = 0, free: float = 2, assigned: int = 0, mean: float = 0.001
    ) -> None:
        loaded = Load(queued, running, resources({"CPU": free}), mean, assigned=assigned)
        self.receive(f"n:{index}", Heartbeat(loaded))

    def specs(self, count: int, *inputs: bytes, of: TaskTemplate = F) -> list[TaskSpec]:
        self.count += count
        return [
            TaskSpec(b"%016d" % number, of.template_id, b"", inputs, (), b"s", "n:0/1")
            for number in range(self.count - count, self.count)
        ]

    def place(self, count: int, *inputs: bytes, of: TaskTemplate = F, origin: str = "n:0") -> dict[str, int]:
        self.receive(origin, PlaceTasks(self.specs(count, *inputs, of=of), [of]))
        return self.assigned()

    def sent(self, kind: type) -> list[tuple[Address, Any]]:
        return [(e.to, e.message) for e in self.effects if isinstance(e, Send) and isinstance(e.message, kind)]

    def assigned(self) -> dict[str, int]:
        return {to: len(message.specs) for to, message in self.sent(AssignTasks)}

    def timers(self) -> dict[str, float]:
        return {effect.key: effect.at for effect in self.effects if isinstance(effect, SetTimer)}

    def refused(self) -> str:
        ((to, message),) = self.sent(TasksUnplaceable)
        assert to == "n:0"
        return str(message.reason)


def test_a_batch_is_spread_evenly_and_everyone_is_told_once() -> None:
    placement = Placement()
    assert placement.place(30) == {"n:0": 10, "n:1": 10, "n:2": 10}
    told = {message.node: message.task_ids for to, message in placement.sent(TasksPlaced) if to == "n:0"}
    given_out = {to: [spec.task_id for spec in message.specs] for to, message in placement.sent(AssignTasks)}
    assert told == {"n:1": given_out["n:1"], "n:2": given_out["n:2"]}, "the origin knows what it gets itself"
    for _, message in placement.sent(AssignTasks):
        assert message.origin == "n:0" and message.templates == [F]
        assert message.reason.startswith("least estimated wait")
        assert [spec.task_id for spec in message.specs] == sorted(spec.task_id for spec in message.specs)


def test_larger_nodes_get_more() -> None:
    placement = Placement(nodes=0)
    placement.join(0, {"CPU": 2})
    placement.join(1, {"CPU": 6})
    assert placement.place(80) == {"n:0": 20, "n:1": 60}


def test_what_was_sent_counts_until_a_heartbeat_confirms_it() -> None:
    placement = Placement(nodes=2)
    for index in (0, 1):
        placement.beat(index)
    assert placement.place(4) == {"n:0": 2, "n:1": 2}
    placement.beat(0, assigned=0)  # it left before the tasks arrived
    placement.beat(1, assigned=2)  # the tasks arrived and are done
    assert placement.place(2) == {"n:1": 2}
    placement.beat(0, assigned=2)
    assert placement.place(2) == {"n:0": 2}


def test_a_heartbeat_that_counts_nothing_is_believed() -> None:
    placement = Placement(nodes=2)
    placement.place(4)
    placement.beat(0, assigned=-1)
    assert placement.place(2) == {"n:0": 2}


def test_a_node_without_experience_is_taken_for_a_typical_one() -> None:
    placement = Placement(nodes=2)
    placement.beat(0, queued=4, running=2, free=0, mean=1.0)
    assert placement.place(14) == {"n:0": 5, "n:1": 9}, "two CPUs free, then equal waits"


def test_tasks_go_only_where_they_can_ever_run() -> None:
    placement = Placement()
    placement.join(3, {"CPU": 2, "GPU": 1})
    assert placement.place(5, of=template(shape=resources({"CPU": 1, "GPU": 0.5}))) == {"n:3": 5}


def test_what_needs_something_that_is_taken_goes_where_it_is_free() -> None:
    placement = Placement(nodes=0)
    for index in (0, 1):
        placement.join(index, {"CPU": 4, "GPU": 1})
    loaded = Load(0, 1, resources({"CPU": 3}), 1.0, assigned=0)
    placement.receive("n:0", Heartbeat(loaded))
    assert placement.place(1, of=template(shape=resources({"GPU": 1}))) == {"n:1": 1}


def test_a_dead_node_gets_nothing_and_comes_back_as_a_new_one() -> None:
    placement = Placement(nodes=2)
    placement.place(40)
    placement.join(1, {"CPU": 2}, alive=False)
    placement.beat(1)
    assert placement.place(4) == {"n:0": 4}
    placement.join(1, {"CPU": 2})
    assert placement.place(4) == {"n:1": 4}, "what its predecessor had in flight is forgotten"


def test_batches_of_several_templates_and_origins_in_one_step() -> None:
    placement = Placement()
    other = template("g", ())
    f, g = placement.specs(3), placement.specs(3, of=other)
    mixed = [spec for pair in zip(f, g, strict=True) for spec in pair]
    placement.effects = placement.machine.step(
        [Received("n:0", PlaceTasks(mixed, [F, other])), Received("n:1", PlaceTasks(placement.specs(1), [F]))], 0.0
    )
    assert sum(len(m.specs) for _, m in placement.sent(AssignTasks)) == 7
    for _, message in placement.sent(AssignTasks):
        assert {spec.template for spec in message.specs} == {message.templates[0].template_id}
        assert message.origin == ("n:1" if message.specs[0].task_id == b"%016d" % 6 else "n:0")


# -- what no node can hold --------------------------------------------------------------------------------------------

GPU2 = template("train", resources({"CPU": 1, "GPU": 2}))


def test_what_no_node_can_hold_waits_a_moment_for_one_to_join() -> None:
    placement = Placement()
    assert placement.place(3, of=GPU2) == {}
    assert placement.timers() == {"infeasible": 1.0}
    placement.now = 0.5
    placement.join(3, {"CPU": 1, "GPU": 2})
    assert placement.assigned() == {"n:3": 3}


def test_what_no_node_can_hold_is_refused_with_a_sentence() -> None:
    placement = Placement()
    placement.place(2, of=GPU2)
    placement.now = 0.7
    placement.place(1, of=GPU2)
    placement.fire("infeasible", 1.0)
    assert len(placement.sent(TasksUnplaceable)[0][1].task_ids) == 2
    assert placement.refused() == (
        "train asks for 1 CPU, 2 GPU, but each of the 3 nodes offers at most 0 GPU; "
        "ask for less, or add a node that has 2 GPU (trio-ray start --address …)"
    )
    assert placement.timers() == {"infeasible": 1.7}
    placement.fire("infeasible", 1.7)
    assert len(placement.sent(TasksUnplaceable)[0][1].task_ids) == 1


def test_the_sentence_says_when_nothing_is_short_but_the_combination() -> None:
    placement = Placement(nodes=1)
    placement.join(1, {"GPU": 4})
    placement.place(1, of=GPU2)
    placement.fire("infeasible", 1.0)
    assert "none of the 2 nodes has all of that at once" in placement.refused()


def test_an_empty_cluster_says_so() -> None:
    placement = Placement(nodes=0)
    placement.place(1)
    placement.fire("infeasible", 1.0)
    assert "no node is alive" in placement.refused()


# -- inputs -----------------------------------------------------------------------------------------------------------


def located(object_id: bytes, *nodes: str, size: int = 100 * MB) -> ObjectsLocated:
    return ObjectsLocated([Location(object_id, size, nodes)])


def test_a_task_goes_to_its_input_once_its_place_is_known() -> None:
    placement = Placement(shards=4)
    x = ids.return_id(b"x" * 16, 0)
    assert placement.place(1, x) == {}
    shard = f"control/{ids.shard_of(x, 4)}"
    assert placement.sent(LocateObjects) == [(shard, LocateObjects([x]))]
    placement.receive(shard, located(x, "n:2"))
    assert placement.assigned() == {"n:2": 1}
    assert placement.place(1, x) == {"n:2": 1} and not placement.sent(LocateObjects), "it is remembered"


def test_an_object_that_does_not_exist_yet_is_waited_for_once_and_briefly() -> None:
    placement = Placement()
    x = ids.return_id(b"x" * 16, 0)
    placement.place(2, x)
    assert placement.timers() == {"locate": 0.005}
    placement.now = 0.003
    assert placement.place(1, x) == {} and not placement.sent(LocateObjects)
    placement.fire("locate", 0.005)
    assert sum(placement.assigned().values()) == 2
    assert placement.timers() == {"locate": 0.008}
    placement.fire("locate", 0.008)
    assert sum(placement.assigned().values()) == 1
    assert sum(placement.place(1, x).values()) == 1, "asked in vain before: not waited for again"
    placement.receive("control/0", located(x, "n:1"))
    assert placement.place(1, x) == {"n:1": 1}


def test_a_task_waits_for_all_of_its_inputs() -> None:
    placement = Placement()
    x, y = ids.return_id(b"x" * 16, 0), ids.return_id(b"y" * 16, 0)
    placement.place(1, x, y)
    placement.receive("control/0", located(x, "n:1", size=MB))
    assert placement.assigned() == {}
    placement.receive("control/0", located(y, "n:2", size=100 * MB))
    assert placement.assigned() == {"n:2": 1}
    placement.fire("locate", 0.005)
    assert placement.assigned() == {}


def test_the_second_reader_finds_the_copy_that_the_first_one_fetches() -> None:
    placement = Placement("locality", nodes=2)
    x, y = ids.return_id(b"x" * 16, 0), ids.return_id(b"y" * 16, 0)
    placement.receive("control/0", located(x, "n:0", size=1000 * MB), located(y, "n:1", size=MB))
    assert placement.place(1, x, y) == {"n:0": 1}
    assert placement.place(1, y) == {"n:1": 1}
    assert placement.place(1, y) == {"n:0": 1}, "a copy of y is on its way there, and it has less to do"


@pytest.mark.parametrize("policy", ["random", "round-robin", "least-loaded", "spread"])
def test_policies_that_ignore_inputs_do_not_wait_for_them(policy: str) -> None:
    placement = Placement(policy)
    assert sum(placement.place(3, ids.return_id(b"x" * 16, 0)).values()) == 3
    assert not placement.sent(LocateObjects)


def test_lost_objects_are_nowhere() -> None:
    placement = Placement()
    x = ids.return_id(b"x" * 16, 0)
    placement.place(1, x)
    placement.receive("control/0", located(x))
    assert sum(placement.assigned().values()) == 1


# -- policies ---------------------------------------------------------------------------------------------------------


class Failing(Policy):
    """Fails, after a while, in the way it is told."""

    uses_inputs = False

    def __init__(self, how: object = None) -> None:
        self.how = how
        self.calls = 0

    def place(self, task: TaskView, nodes: Sequence[NodeView], inputs: Sequence[InputView], rng: Random) -> Any:
        self.calls += 1
        if self.calls <= 2:
            return nodes[-1], "as told"
        if isinstance(self.how, Exception):
            raise self.how
        return self.how


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (ZeroDivisionError("by zero"), "Failing failed with ZeroDivisionError: by zero"),
        (None, "returned None, which is none of the nodes it was given"),
        (NodeView("n:x", {}, {}, 0, 0), "which is none of the nodes"),
        ((None, "why"), "Failing failed with"),
    ],
)
def test_a_faulty_policy_fails_its_tasks_and_nothing_else(how: object, sentence: str) -> None:
    placement = Placement(Failing(how))
    assert placement.place(5) == {"n:2": 2}
    assert placement.sent(AssignTasks)[0][1].reason == "as told"
    assert sentence in placement.refused() and placement.refused().startswith("f cannot be placed: ")
    assert placement.place(4, of=template(policy="round-robin")) == {"n:0": 2, "n:1": 1, "n:2": 1}


def test_a_faulty_score_fails_its_tasks_and_nothing_else() -> None:
    class Odd(BottomUp):
        def score(self, task: TaskView, node: NodeView, inputs: Sequence[InputView]) -> float:
            return 1.0 / (2 - node.queued)

    placement = Placement(Odd(), nodes=1)
    placement.place(5)
    assert "Odd failed with ZeroDivisionError" in placement.refused()
    assert placement.place(1, of=template(policy="random")) == {"n:0": 1}


def test_a_template_names_its_own_policy() -> None:
    placement = Placement()
    assert placement.place(6, of=template(policy="pack")) == {"n:0": 2, "n:1": 2, "n:2": 2}
    assert placement.place(1, of=template(policy="pock")) == {}
    assert "f cannot be placed: there is no scheduling policy 'pock'; choose one of" in placement.refused()


def test_what_is_available_can_be_asked_for() -> None:
    placement = Placement(nodes=2)
    placement.place(3)
    placement.receive("n:0", ControlQuery("n:0/1", 7, "available"))
    ((to, answer),) = placement.sent(ControlAnswer)
    assert (to, answer.process, answer.number) == ("n:0", "n:0/1", 7)
    assert msgspec.msgpack.decode(answer.body) == {"CPU": 1.0}
    placement.receive("n:0", ControlQuery("n:0/1", 8, "unavailable"))
    assert "'available'" in placement.sent(ControlAnswer)[0][1].error


# -- properties -------------------------------------------------------------------------------------------------------

happenings = st.lists(
    st.one_of(
        st.tuples(st.just("place"), st.integers(1, 12), st.sampled_from([CPU1, (), resources({"CPU": 2})])),
        st.tuples(st.just("beat"), st.integers(0, 5), st.integers(0, 3)),
        st.tuples(st.just("join"), st.integers(0, 5), st.sampled_from([1.0, 2.0, 4.0])),
        st.tuples(st.just("die"), st.integers(0, 5), st.none()),
        st.tuples(st.just("inputs"), st.integers(0, 5), st.integers(0, 5)),
    ),
    max_size=25,
)


class Exhaustive(BottomUp):
    """The same decisions, taken by looking at every node for every task."""

    def place(self, task: TaskView, nodes: Sequence[NodeView], inputs: Sequence[InputView], rng: Random) -> Any:
        return super().place(task, nodes, inputs, rng)


@settings(max_examples=60, deadline=None)
@given(happenings)
def test_rankings_choose_as_looking_at_every_node_does(steps: list[tuple[str, Any, Any]]) -> None:
    ranked, exhaustive = Placement(BottomUp(), nodes=3), Placement(Exhaustive(), nodes=3)
    for number, (what, first, second) in enumerate(steps):
        for placement in (ranked, exhaustive):
            if what == "place":
                placement.place(first, of=template(shape=second))
            elif what == "beat":
                placement.beat(first, queued=second, running=2, free=second % 2, assigned=number % 4)
            elif what == "join":
                placement.join(first, {"CPU": second})
            elif what == "die":
                placement.join(first, {"CPU": 1}, alive=False)
            else:
                x = ids.return_id(b"%016d" % number, 0)
                placement.receive("control/0", located(x, f"n:{first}", f"n:{second}"))
                placement.place(2, x)
        assert ranked.assigned() == exhaustive.assigned()
        assert Counter(map(type, ranked.effects)) == Counter(map(type, exhaustive.effects))


@settings(max_examples=20, deadline=None)
@given(happenings, st.sampled_from(["bottom-up", "power-of-two", "random", "locality"]))
def test_the_same_events_give_the_same_effects(steps: list[tuple[str, Any, Any]], policy: str) -> None:
    runs = []
    for _ in range(2):
        placement, effects = Placement(policy), []
        for what, first, second in steps:
            if what == "place":
                placement.place(first, of=template(shape=second))
            elif what == "beat":
                placement.beat(first, queued=second)
            effects.append(msgspec.msgpack.encode(placement.effects))
        runs.append(effects)
    assert runs[0] == runs[1]


class Picky(Policy):
    """Fails where tasks are born."""

    def keep(self, task: TaskView, node: NodeView) -> bool:
        raise RuntimeError("no idea")

    def place(self, task: TaskView, nodes: Sequence[NodeView], inputs: Sequence[InputView], rng: Random) -> NodeView:
        return nodes[0]


@pytest.mark.parametrize(
    ("name", "sentence"),
    [("nobodys", "no scheduling policy 'nobodys'"), (f"{__name__}:Picky", "Picky failed with RuntimeError: no idea")],
)
def test_a_policy_that_fails_where_tasks_are_born_fails_those_tasks_only(name: str, sentence: str) -> None:
    harness = Harness(nodes=2)
    driver = harness.driver()
    bad, good = harness_template("bad", policy=name), harness_template("good")
    refs = driver.submit(*[driver.spec(of) for of in (bad, good, bad)], templates=[bad, good])
    harness.advance(1.0)
    assert [driver.values[ref].error for ref in refs] == [True, False, True]
    kind, told = msgspec.msgpack.decode(driver.values[refs[0]].payload[1:])
    assert kind == "TaskUnschedulableError" and sentence in told
