"""What the node machines make of other nodes' deaths, and of what was made elsewhere."""

import msgspec
import pytest

from tests.core.harness import Harness, Worker, big, kind_of, ok, template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.effects import Send
from trio_ray.runtime.core.machine import ProcessLost, Received, TimerFired
from trio_ray.runtime.core.messages import (
    AssignTasks,
    Function,
    Functions,
    LocateObjects,
    NodesChanged,
    ObjectsReady,
    Output,
    PlaceTasks,
    References,
    ReturnTasks,
    RunTasks,
    Status,
    SubmitTasks,
    TaskResult,
    TasksDone,
    TasksPlaced,
    WaitObjects,
)
from trio_ray.runtime.core.spec import TaskSpec

NOOP = template("noop")


def test_an_object_that_died_with_its_node_is_an_error_for_those_who_read_it() -> None:
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    far = template("far", resources={"GPU": 1})
    harness.behave = lambda worker, spec: big(harness, worker, spec, 50_000)
    ref = driver.submit(driver.spec(far), templates=[far])[0]
    harness.advance(1.0)
    harness.lose_node("n:1")
    harness.advance(1.0)
    driver.send(WaitObjects([ref]))
    harness.advance(1.0)
    assert kind_of(driver.values[ref].payload) == "ObjectLostError"


def test_a_task_placed_at_a_node_that_has_just_died_is_placed_again() -> None:
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    machine, far = harness.machines["n:0"], template("far", resources={"GPU": 1}, max_retries=1)
    spec = driver.spec(far)
    dead = msgspec.structs.replace(machine.nodes["n:1"], alive=False)
    effects = []
    for source, message in (
        (driver.process, SubmitTasks([spec], [far])),
        ("control/0", NodesChanged([dead])),
        ("placement", TasksPlaced("n:1", [spec.task_id])),
    ):
        effects += machine.step([Received(source, message)], harness.now)
        machine.validate()
    placed = [e.message for e in effects if isinstance(getattr(e, "message", None), PlaceTasks)]
    assert [spec.task_id for message in placed for spec in message.specs] == [spec.task_id] * 2


@pytest.mark.parametrize("far", [False, True])
def test_a_result_that_only_another_node_waits_for_is_kept(far: bool) -> None:
    """A task hands out the reference of a task of its own, and lets go of it, before that one is done."""
    harness = Harness(nodes=3, extra={1: {"GPU": 1}, 2: {"GPU": 1} if far else {}})
    driver, other = harness.driver(), harness.driver(1)
    give = template("give", resources={"GPU": 1})
    child = template("child", resources={"GPU": 1} if far else {})
    giving, made = driver.spec(give), other.spec(child)
    inner = ids.return_id(made.task_id, 0)
    ran: list[str] = []

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult | None:
        if spec.task_id == made.task_id:
            ran.append(worker.process)
            return None if harness.now < 5.0 else ok(spec)
        other.submit(made, templates=[child])
        return ok(spec, b"refs", contained=(inner,))

    harness.behave = behave
    outer = driver.submit(giving, templates=[give])[0]
    harness.advance(1.0)
    driver.send(References([inner], []))
    other.send(References([], [inner]))
    driver.send(References([], [outer]))
    harness.advance(3.0)
    assert ran and inner not in driver.values
    driver.send(WaitObjects([inner], fetch=True))
    harness.advance(3.0)
    assert driver.values[inner].payload == b"\x00N."
    driver.send(References([], [inner]))
    harness.advance(3.0)
    assert [harness.machines[f"n:{i}"].table.entries for i in range(3)] == [{}, {}, {}]


def test_a_task_given_back_is_awaited_from_elsewhere() -> None:
    harness = Harness(nodes=2)
    harness.run()
    machine, driver = harness.machines["n:1"], harness.driver()
    *before, maker = [driver.spec(NOOP) for _ in range(20)]
    result = ids.return_id(maker.task_id, 0)
    reader = driver.spec(NOOP, result)
    specs = [*before, maker, reader]
    function = Functions([Function(NOOP.function_id, "noop", b"f")])
    arrived = [Received("control/0", function), Received("placement", AssignTasks("n:0", specs, [NOOP]))]
    effects = machine.step(arrived, harness.now)
    assert not [e for e in effects if isinstance(getattr(e, "message", None), LocateObjects)], "it is made here"
    for _ in range(2):
        effects = machine.step([TimerFired("stuck")], harness.now)
        machine.validate()
    messages = [e.message for e in effects if isinstance(e, Send)]
    assert maker.task_id in next(m for m in messages if isinstance(m, ReturnTasks)).task_ids
    assert [m.object_ids for m in messages if isinstance(m, LocateObjects)] == [[result]]


@pytest.mark.parametrize("origin", ["n:0", "n:1"], ids=["its own", "another node's"])
def test_a_child_under_way_is_the_new_parents_too(origin: str) -> None:
    """Its first parent died, with the process or the whole node that submitted it; the parent runs again here."""
    harness = Harness(nodes=2)
    harness.run()
    machine, first, second = harness.machines["n:0"], harness.driver(), harness.driver()
    spec = first.spec(NOOP, scope=ids.job_scope("n:1/1"))
    submission = SubmitTasks([spec], [NOOP], [Function(NOOP.function_id, "noop", b"f")])
    if origin == "n:0":
        events = [Received(first.process, submission)]
    else:
        events = [
            Received("control/0", Functions(submission.functions)),
            Received("placement", AssignTasks("n:1", [spec], [NOOP])),
        ]
    effects = machine.step(events, harness.now)
    (worker,) = (e.to for e in effects if isinstance(e, Send) and isinstance(e.message, RunTasks))
    machine.step([ProcessLost(first.process)], harness.now)
    machine.step([Received(second.process, submission)], harness.now)
    machine.validate()
    result = TaskResult(spec.task_id, Status.OK, (Output(b"\x00N.", -1, 3),))
    effects = machine.step([Received(worker, TasksDone([result]))], harness.now)
    machine.validate()
    told = [e for e in effects if isinstance(e, Send) and isinstance(e.message, ObjectsReady)]
    assert [(e.to, [value.payload for value in e.message.values]) for e in told] == [(second.process, [b"\x00N."])]


@pytest.mark.parametrize("waits", [False, True])
def test_what_a_dead_node_was_to_make_is_lost(waits: bool) -> None:
    """It had handed out a reference to the result of a task of its own, and died before that one was done."""
    harness = Harness(nodes=3, extra={1: {"GPU": 1}, 2: {"TPU": 1}})
    driver, other = harness.driver(), harness.driver(1)
    give, child = template("give", resources={"GPU": 1}), template("child", resources={"TPU": 1})
    giving, made = driver.spec(give), other.spec(child)
    inner = ids.return_id(made.task_id, 0)

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult | None:
        if spec.task_id == made.task_id:
            return None
        other.submit(made, templates=[child])
        return ok(spec, b"refs", contained=(inner,))

    harness.behave = behave
    driver.submit(giving, templates=[give])
    harness.advance(1.0)
    driver.send(References([inner], []))
    if waits:
        driver.send(WaitObjects([inner], fetch=True))
    harness.advance(1.0)
    assert inner not in driver.values
    harness.lose_node("n:1")
    harness.advance(1.0)
    if not waits:
        driver.send(WaitObjects([inner], fetch=True))
        harness.advance(1.0)
    assert kind_of(driver.values[inner].payload) == "ObjectLostError"
    driver.send(References([], [inner, ids.return_id(giving.task_id, 0)]))
    harness.advance(20.0)
    assert harness.machines["n:0"].table.entries == {}
    assert harness.machines["control/0"].objects.rows == {}


def test_what_was_freed_and_is_made_again_elsewhere_goes_with_its_last_reference() -> None:
    """A parent's node dies with its children; the parent runs again elsewhere, and so do they, under the same ids."""
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver, first = harness.driver(), harness.driver(1)
    give, child = template("give", num_returns=1), template("child")
    made = first.spec(child)
    inner = ids.return_id(made.task_id, 0)
    harness.behave = lambda worker, spec: ok(spec)
    first.submit(made, templates=[child])
    harness.advance(1.0)
    harness.machines["n:1"].table.export(harness.machines["n:1"].table.entries[inner])
    first.send(References([], []))
    harness.advance(1.0)
    assert harness.machines["control/0"].objects.rows[inner].born
    harness.lose_node("n:1")
    harness.advance(1.0)
    assert inner not in harness.machines["control/0"].objects.rows, "freed with the only node that held it"

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult:
        if spec.template == give.template_id:
            driver.submit(made, templates=[child])
            return ok(spec, b"refs", contained=(inner,))
        return ok(spec)

    harness.behave = behave
    giving = driver.spec(give)
    driver.submit(giving, templates=[give])
    harness.advance(1.0)
    node = harness.machines["n:0"]
    node.table.export(node.table.entries[ids.return_id(giving.task_id, 0)])
    driver.send(References([], []))
    harness.advance(1.0)
    driver.send(References([], [inner, ids.return_id(giving.task_id, 0)]))
    harness.advance(20.0)
    assert node.table.entries == {}
    assert harness.machines["control/0"].objects.rows == {}
