"""Actors in a whole cluster of machines: their calls, their ends, what they hold."""

import pytest

from tests.core.harness import Harness, Worker, kind_of, ok, template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.machine import Received
from trio_ray.runtime.core.messages import (
    ActorHandles,
    CancelScope,
    Heartbeat,
    KillActor,
    Load,
    Output,
    References,
    Status,
    SubmitTasks,
    TaskResult,
)
from trio_ray.runtime.core.spec import Kind, TaskSpec, resources

NOOP = template("noop")
CREATE = template("Counter", kind=Kind.ACTOR_CREATION, held=())
CALL = template("Counter.add", kind=Kind.ACTOR_CALL, num_cpus=0)


@pytest.mark.parametrize("remote", [False, True])
def test_actor_calls_run_in_order_wherever_the_actor_is(remote: bool) -> None:
    create = template("Counter", kind=Kind.ACTOR_CREATION, held=(), resources={"GPU": 1} if remote else {})
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    seen: list[tuple[str, bytes]] = []

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult:
        if spec.actor:
            seen.append((worker.process, spec.args))
        return ok(spec)

    harness.behave = behave
    creation = driver.spec(create)
    slow = driver.spec(NOOP)
    calls = [driver.spec(CALL, actor=creation.task_id, args=b"%d" % i) for i in range(20)]
    calls[5] = driver.spec(CALL, ids.return_id(slow.task_id, 0), actor=creation.task_id, args=b"5")
    driver.submit(creation, templates=[create])
    refs = driver.submit(*calls, templates=[CALL])
    driver.submit(slow, templates=[NOOP])
    harness.advance(3.0)
    assert [args for _, args in seen] == [b"%d" % i for i in range(20)]
    assert len({process for process, _ in seen}) == 1
    assert seen[0][0].startswith("n:1" if remote else "n:0")
    assert not any(driver.values[ref].error for ref in refs)
    driver.send(References([], [*refs, ids.return_id(slow.task_id, 0)]))
    driver.send(ActorHandles([], [creation.task_id]))
    harness.advance(3.0)
    assert seen[0][0] not in harness.workers, "the actor outlived its last handle"
    for node in ("n:0", "n:1"):
        assert harness.machines[node].table.entries == {}
        assert harness.machines[node].scheduler.available == dict(harness.machines[node].info.resources)


def test_a_call_that_waits_for_its_input_is_not_overtaken() -> None:
    create = template("Counter", kind=Kind.ACTOR_CREATION, held=())
    harness = Harness()
    driver = harness.driver()
    seen: list[bytes] = []

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult:
        if spec.actor:
            seen.append(spec.args)
        return ok(spec)

    harness.behave = behave
    creation = driver.spec(create)
    driver.submit(creation, templates=[create])
    harness.advance(1.0)  # the actor is there
    slow = driver.spec(NOOP)
    calls = [driver.spec(CALL, actor=creation.task_id, args=b"%d" % i) for i in range(6)]
    calls[2] = driver.spec(CALL, ids.return_id(slow.task_id, 0), actor=creation.task_id, args=b"2")
    driver.submit(*calls, templates=[CALL])
    harness.run()
    assert seen == [b"0", b"1"]
    driver.submit(slow, templates=[NOOP])
    harness.advance(1.0)
    assert seen == [b"%d" % i for i in range(6)]


def test_a_call_repeated_when_its_actor_is_forgotten_leaves_nothing_behind() -> None:
    create = template("Counter", kind=Kind.ACTOR_CREATION, held=())
    harness = Harness()
    driver = harness.driver()
    creation = driver.spec(create)
    call = driver.spec(CALL, actor=creation.task_id)
    driver.submit(creation, templates=[create])
    refs = driver.submit(call, templates=[CALL])
    harness.advance(1.0)
    driver.send(ActorHandles([], [creation.task_id]))
    harness.advance(1.0)
    driver.send(SubmitTasks([call]))
    harness.advance(1.0)
    driver.send(References([], refs))
    harness.advance(1.0)
    assert harness.machines["n:0"].table.entries == {}


@pytest.mark.parametrize("remote", [False, True])
def test_calls_of_a_killed_actor_fail(remote: bool) -> None:
    create = template("Counter", kind=Kind.ACTOR_CREATION, held=(), resources={"GPU": 1} if remote else {})
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    creation = driver.spec(create)
    driver.submit(creation, templates=[create])
    first = driver.submit(driver.spec(CALL, actor=creation.task_id), templates=[CALL])[0]
    harness.advance(1.0)
    assert not driver.values[first].error
    driver.send(KillActor(creation.task_id))
    harness.advance(1.0)
    second = driver.submit(driver.spec(CALL, actor=creation.task_id), templates=[])[0]
    harness.advance(1.0)
    assert kind_of(driver.values[second].payload) == "ActorDiedError"


def test_an_actor_with_restarts_left_survives_its_worker() -> None:
    create = template("Counter", kind=Kind.ACTOR_CREATION, held=(), max_retries=1)
    harness = Harness()
    driver = harness.driver()
    creation = driver.spec(create)
    driver.submit(creation, templates=[create])
    for survives in (True, False):
        first = driver.submit(driver.spec(CALL, actor=creation.task_id), templates=[CALL])[0]
        harness.advance(0.1)
        assert not driver.values[first].error
        worker = harness.machines["n:0"].tasks.actors.local[creation.task_id].worker.process
        harness.hold = True
        running = driver.submit(driver.spec(CALL, actor=creation.task_id), templates=[])[0]
        harness.run()
        harness.kill(worker, "killed by SIGKILL")
        harness.run()
        harness.hold = False
        harness.advance(1.0)
        assert kind_of(driver.values[running].payload) == ("ActorUnavailableError" if survives else "ActorDiedError")
    last = driver.submit(driver.spec(CALL, actor=creation.task_id), templates=[])[0]
    harness.advance(1.0)
    assert kind_of(driver.values[last].payload) == "ActorDiedError"


@pytest.mark.parametrize("restarts", [0, 1])
def test_an_actor_whose_node_dies_restarts_elsewhere_or_is_dead(restarts: int) -> None:
    create = template("Far", kind=Kind.ACTOR_CREATION, held=(), resources={"GPU": 1}, max_retries=restarts)
    harness = Harness(nodes=3, extra={1: {"GPU": 1}, 2: {"GPU": 1}})
    driver = harness.driver()
    creation = driver.spec(create)
    driver.submit(creation, templates=[create])
    driver.submit(driver.spec(CALL, actor=creation.task_id), templates=[CALL])
    harness.advance(1.0)
    home = harness.machines["n:0"].tasks.actors.views[creation.task_id].node
    harness.lose_node(home)
    harness.advance(1.0)
    call = driver.submit(driver.spec(CALL, actor=creation.task_id), templates=[])[0]
    harness.advance(1.0)
    if restarts:
        assert not driver.values[call].error
    else:
        assert kind_of(driver.values[call].payload) == "ActorDiedError"


def test_a_failing_constructor_fails_the_calls() -> None:
    harness = Harness()
    driver = harness.driver()
    harness.behave = lambda worker, spec: TaskResult(spec.task_id, Status.ERROR, (Output(b"\x02no"),), 1.0, 1.0)
    creation = driver.spec(CREATE)
    driver.submit(creation, templates=[CREATE])
    ref = driver.submit(driver.spec(CALL, actor=creation.task_id), templates=[CALL])[0]
    harness.advance(1.0)
    assert driver.values[ref].error
    assert harness.machines["n:0"].scheduler.available == {"CPU": 20_000}


def test_the_second_actor_of_a_name_is_ended_and_its_calls_say_why() -> None:
    harness = Harness(nodes=2, shards=3)
    first, second = harness.driver(0), harness.driver(1)
    results = []
    for driver in (first, second):
        creation = driver.spec(CREATE, actor_name="ns/joe")
        driver.submit(creation, templates=[CREATE])
        harness.advance(0.5)
        results.append(driver.submit(driver.spec(CALL, actor=creation.task_id), templates=[CALL])[0])
        harness.advance(0.5)
    assert not first.values[results[0]].error
    assert b"an actor named 'joe' exists already" in second.values[results[1]].payload
    assert [len(harness.machines[node].tasks.actors.local) for node in ("n:0", "n:1")] == [1, 0]


def test_what_waits_behind_an_actor_moves_to_a_node_that_has_room() -> None:
    """Placement goes by loads that are old when they arrive: an actor may be sent where another has all, for life."""
    harness = Harness(nodes=3, extra={1: {"GPU": 1}, 2: {"GPU": 1}})
    driver = harness.driver()
    create = template("Renderer", kind=Kind.ACTOR_CREATION, resources={"GPU": 1})
    busy = Load(9, 2, resources({"CPU": 0}), 1.0, assigned=0)
    harness.deliver("placement", Received("n:2", Heartbeat(busy)))
    harness.step()
    creations = [driver.spec(create) for _ in range(2)]
    driver.submit(*creations, templates=[create])
    calls = driver.submit(*[driver.spec(CALL, actor=spec.task_id) for spec in creations], templates=[CALL])
    harness.run()
    assert len(harness.machines["n:1"].tasks.actors.local) == 1 and calls[1] not in driver.values
    harness.advance(1.0)
    assert [len(harness.machines[f"n:{i}"].tasks.actors.local) for i in range(3)] == [0, 1, 1]
    assert not any(driver.values[call].error for call in calls)


def test_tasks_do_not_wait_for_what_an_actor_holds() -> None:
    harness = Harness(nodes=2)
    driver = harness.driver()
    driver.submit(*[driver.spec(NOOP) for _ in range(4)], templates=[NOOP])  # known to be short, so rather kept
    harness.run()
    create = template("Hog", kind=Kind.ACTOR_CREATION, num_cpus=2)
    driver.submit(driver.spec(create), templates=[create])
    harness.run()
    assert harness.machines["n:0"].scheduler.held == {"CPU": 20_000}
    refs = driver.submit(*[driver.spec(NOOP) for _ in range(50)], templates=[])
    harness.run()
    assert all(ref in driver.values for ref in refs), "at once"


def test_a_creation_does_not_share_its_worker_with_tasks_before_it() -> None:
    create = template("Counter", kind=Kind.ACTOR_CREATION)  # it needs what tasks need, and so waits in their queue
    harness = Harness()
    driver = harness.driver()
    node = harness.machines["n:0"]
    first = driver.spec(create)  # the constructor is known to be quick
    driver.submit(first, templates=[create])
    harness.advance(0.1)
    driver.send(ActorHandles([], [first.task_id]))
    harness.advance(0.1)
    driver.submit(*[driver.spec(NOOP) for _ in range(3)], templates=[NOOP])
    harness.advance(0.1)
    harness.hold = True
    creation = driver.spec(create)
    driver.submit(*[driver.spec(NOOP) for _ in range(8)], creation, templates=[NOOP, create])
    harness.run()
    for worker in node.scheduler.workers.values():
        assert worker.actor is None or list(worker.running) == [worker.actor]
    harness.hold = False
    harness.advance(1.0)
    driver.send(ActorHandles([], [creation.task_id]))
    harness.advance(3.0)
    assert not node.tasks.actors.local and node.scheduler.available == dict(node.info.resources)


def test_an_actor_without_handles_ends_when_its_last_call_fails_before_it_ran() -> None:
    harness = Harness()
    driver = harness.driver()
    harness.behave = lambda worker, spec: (
        TaskResult(spec.task_id, Status.ERROR, (Output(b"\x02boom"),)) if spec.args == b"fail" else ok(spec)
    )
    harness.hold = True
    [ref] = driver.submit(driver.spec(NOOP, args=b"fail"), templates=[NOOP])
    creation = driver.spec(CREATE)
    call = driver.spec(CALL, ref, actor=creation.task_id)
    driver.submit(creation, call, templates=[CREATE, CALL])
    driver.send(ActorHandles([], [creation.task_id]))
    harness.advance(0.2)
    harness.hold = False
    harness.advance(1.0)
    assert driver.values[ids.return_id(call.task_id, 0)].payload == b"\x02boom"
    assert not harness.machines["n:0"].tasks.actors.local


def test_calls_of_one_batch_that_fail_at_once_each_hold_the_handle() -> None:
    harness = Harness()
    driver, other = harness.driver(), harness.driver()
    creation = driver.spec(CREATE)
    driver.submit(creation, templates=[CREATE])
    harness.advance(0.2)
    driver.send(KillActor(creation.task_id))
    driver.send(ActorHandles([], [creation.task_id]))
    harness.advance(0.2)
    for _ in range(2):  # the first time the node does not know yet that the actor is dead
        refs = other.submit(*[other.spec(CALL, actor=creation.task_id) for _ in range(3)], templates=[CALL])
        harness.advance(0.2)
        assert all(kind_of(other.values[ref].payload) == "ActorDiedError" for ref in refs)
        other.send(References([], refs))
        harness.advance(2.0)
    assert not harness.machines["n:0"].table.entries


def test_calls_of_one_batch_in_a_cancelled_scope_each_hold_the_handle() -> None:
    harness = Harness()
    driver = harness.driver()
    creation = driver.spec(CREATE)
    driver.submit(creation, templates=[CREATE])
    harness.advance(0.2)
    scope = driver.scope + b"x" * ids.SCOPE_BYTES
    driver.send(CancelScope(scope))
    harness.run()
    unknown = bytes(ids.TASK_ID_BYTES)
    refs = driver.submit(*[driver.spec(CALL, actor=unknown, scope=scope) for _ in range(2)], templates=[CALL])
    harness.run()
    assert all(kind_of(driver.values[ref].payload) == "TaskCancelledError" for ref in refs)
