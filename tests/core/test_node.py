"""The node machine in a whole cluster of machines: events in, effects out, ``validate`` after each step."""

import msgspec
import pytest

from tests.core.harness import Harness, Worker, ok, template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.effects import Send
from trio_ray.runtime.core.machine import ProcessLost, Received, TimerFired
from trio_ray.runtime.core.messages import (
    ActorHandles,
    Answer,
    AssignTasks,
    Blocked,
    CancelScope,
    CancelTasks,
    CreateObject,
    Function,
    Functions,
    Heartbeat,
    KillActor,
    Load,
    LocateObjects,
    NodesChanged,
    ObjectCreated,
    ObjectsReady,
    Output,
    PlaceTasks,
    Query,
    References,
    ReturnTasks,
    RunTasks,
    SealObjects,
    Status,
    SubmitTasks,
    TakeBack,
    TaskResult,
    TasksDone,
    TasksPlaced,
    Unpin,
    WaitObjects,
    Where,
)
from trio_ray.runtime.core.spec import Kind, TaskSpec, resources

NOOP = template("noop")


def kind_of(payload: bytes) -> str:
    assert payload[:1] == b"\x03"
    return str(msgspec.msgpack.decode(payload[1:])[0])


def sent(harness: Harness, kind: type) -> list[object]:
    return [effect.message for _, effect in harness.log if isinstance(getattr(effect, "message", None), kind)]


def test_tasks_run_and_their_results_are_pushed_to_the_submitter() -> None:
    harness = Harness()
    driver = harness.driver()
    refs = driver.submit(*[driver.spec(NOOP) for _ in range(100)], templates=[NOOP])
    harness.run()
    assert [driver.values[ref].payload for ref in refs] == [b"\x00N."] * 100


def test_dropped_results_leave_nothing_behind() -> None:
    harness = Harness()
    driver = harness.driver()
    refs = driver.submit(*[driver.spec(NOOP) for _ in range(10)], templates=[NOOP])
    harness.advance(1.0)
    driver.send(References([], refs))
    harness.advance(1.0)
    assert harness.machines["n:0"].table.entries == {}
    assert harness.machines["n:0"].tasks.entries == {}


def test_a_reference_dropped_before_the_task_is_done_discards_the_result() -> None:
    harness = Harness()
    driver = harness.driver()
    harness.hold = True
    refs = driver.submit(driver.spec(NOOP), templates=[NOOP])
    harness.run()
    driver.send(References([], refs))
    harness.run()
    harness.hold = False
    harness.run()
    assert refs[0] not in driver.values
    assert harness.machines["n:0"].table.entries == {}


def test_a_chain_of_tasks_runs_in_order() -> None:
    harness = Harness()
    driver = harness.driver()
    seen: list[tuple[bytes, ...]] = []

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult:
        seen.append(spec.inputs)
        return ok(spec)

    harness.behave = behave
    specs = [driver.spec(NOOP)]
    for _ in range(20):
        specs.append(driver.spec(NOOP, ids.return_id(specs[-1].task_id, 0)))
    driver.submit(*specs, templates=[NOOP])
    harness.run()
    assert seen == [spec.inputs for spec in specs]


def test_a_failed_input_fails_the_task_at_once_with_the_same_error() -> None:
    harness = Harness()
    driver = harness.driver()
    harness.behave = lambda worker, spec: (
        TaskResult(spec.task_id, Status.ERROR, (Output(b"\x02boom"),), 1.0, 0.1) if spec.args == b"bad" else None
    )
    slow, bad = driver.spec(NOOP), driver.spec(NOOP, args=b"bad")
    needs = driver.spec(NOOP, ids.return_id(slow.task_id, 0), ids.return_id(bad.task_id, 0))
    driver.submit(slow, bad, needs, templates=[NOOP])
    harness.run()
    value = driver.values[ids.return_id(needs.task_id, 0)]
    assert value.error and value.payload == b"\x02boom"


def test_a_crashed_worker_costs_a_retry_then_an_error() -> None:
    harness = Harness()
    driver = harness.driver()
    of = template("crash", max_retries=2)
    runs = 0

    def behave(worker: Worker, spec: TaskSpec) -> None:
        nonlocal runs
        runs += 1
        harness.kill(worker.process, "killed by SIGSEGV")

    harness.behave = behave
    ref = driver.submit(driver.spec(of), templates=[of])[0]
    harness.run()
    assert runs == 3
    assert kind_of(driver.values[ref].payload) == "WorkerCrashedError"
    assert b"SIGSEGV" in driver.values[ref].payload


def test_what_waited_behind_a_crash_is_not_charged_for_it() -> None:
    harness = Harness(cpus=1)
    driver = harness.driver()
    driver.submit(*[driver.spec(NOOP) for _ in range(4)], templates=[NOOP])
    harness.run()  # the mean is known now: tasks are dispatched ahead
    crashed = False

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult | None:
        nonlocal crashed
        if spec.args == b"crash" and not crashed:
            crashed = True
            harness.kill(worker.process, "exit code 1")
            return None
        return ok(spec)

    harness.behave = behave
    refs = driver.submit(driver.spec(NOOP, args=b"crash"), *[driver.spec(NOOP) for _ in range(9)], templates=[])
    harness.run()
    errors = [driver.values[ref].error for ref in refs]
    assert errors == [True] + [False] * 9


def test_what_no_node_can_ever_run_fails_with_a_sentence() -> None:
    harness = Harness(nodes=2)
    driver = harness.driver()
    of = template("gpu", resources={"GPU": 1})
    ref = driver.submit(driver.spec(of), templates=[of])[0]
    harness.advance(10.0)
    assert kind_of(driver.values[ref].payload) == "TaskUnschedulableError"
    assert b"GPU" in driver.values[ref].payload


def test_a_task_goes_where_its_resources_are() -> None:
    harness = Harness(nodes=3, extra={2: {"GPU": 1}})
    driver = harness.driver()
    of = template("gpu", resources={"GPU": 0.5})
    ran: list[str] = []
    harness.behave = lambda worker, spec: ran.append(worker.process) or ok(spec)  # type: ignore[func-returns-value]
    refs = driver.submit(driver.spec(of), driver.spec(of), templates=[of])
    harness.advance(1.0)
    assert [process.split("/")[0] for process in ran] == ["n:2", "n:2"]
    assert not any(driver.values[ref].error for ref in refs)


def big(harness: Harness, worker: Worker, spec: TaskSpec, size: int) -> TaskResult:
    """The worker writes a large result into its node's arena."""
    node = worker.process.split("/")[0]
    object_id = ids.return_id(spec.task_id, 0)

    machine = harness.machines[node]
    effects = machine.step([Received(worker.process, CreateObject(object_id, size))], harness.now)
    offset = next(e.message.offset for e in effects if isinstance(getattr(e, "message", None), ObjectCreated))
    harness.carry_out(node, [e for e in effects if not isinstance(getattr(e, "message", None), ObjectCreated)])
    return TaskResult(spec.task_id, Status.OK, (Output(b"", offset, size),), 1.0, 1.0)


def test_large_results_cross_nodes_and_are_freed_everywhere() -> None:
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    far = template("far", resources={"GPU": 1})
    harness.behave = lambda worker, spec: (
        big(harness, worker, spec, 50_000) if spec.template == far.template_id else ok(spec)
    )
    ref = driver.submit(driver.spec(far), templates=[far])[0]
    harness.advance(0.1)
    assert driver.values[ref].where == Where.ELSEWHERE
    driver.send(WaitObjects([ref]))
    harness.advance(0.1)
    assert driver.values[ref].where == Where.SHARED and driver.values[ref].size == 50_000
    near = driver.spec(NOOP, ref)
    done = driver.submit(near, templates=[NOOP])[0]
    harness.advance(0.5)
    assert not driver.values[done].error
    for worker in harness.workers.values():
        if ref in worker.inputs:
            harness.machines["n:0"].step([], harness.now)
    driver.send(Unpin([ref]))
    for worker in list(harness.workers.values()):
        if ref in worker.inputs:
            harness.deliver("n:0", Received(worker.process, Unpin([ref])))
    driver.send(References([], [ref, done]))
    harness.advance(1.0)
    for node in ("n:0", "n:1"):
        assert harness.machines[node].table.entries == {}, node
        assert harness.machines[node].table.arena.used == 0


def test_puts_are_sealed_shared_and_counted() -> None:
    harness = Harness()
    driver = harness.driver()
    object_id = ids.put_id(driver.task_id, 0)
    driver.send(CreateObject(object_id, 1000))
    harness.run()
    assert isinstance(driver.inbox[-1], ObjectCreated)
    driver.send(SealObjects([(object_id, ())]))
    driver.send(WaitObjects([object_id]))
    harness.run()
    assert driver.values[object_id].where == Where.SHARED
    driver.send(References([], [object_id]))
    harness.run()
    assert harness.machines["n:0"].table.arena.used > 0, "still read"
    driver.send(Unpin([object_id]))
    harness.run()
    assert harness.machines["n:0"].table.arena.used == 0


def test_a_full_store_says_so_and_loses_nothing() -> None:
    harness = Harness(store_bytes=4096)
    driver = harness.driver()
    first, second = ids.put_id(driver.task_id, 0), ids.put_id(driver.task_id, 1)
    driver.send(CreateObject(first, 4000))
    driver.send(SealObjects([(first, ())]))
    driver.send(CreateObject(second, 4000))
    harness.run()
    assert "no room for 4,000 bytes" in driver.inbox[-1].reason  # type: ignore[union-attr]
    driver.send(WaitObjects([first]))
    harness.run()
    assert driver.values[first].where == Where.SHARED


def test_a_dead_driver_leaves_no_tasks_and_no_objects() -> None:
    harness = Harness()
    driver = harness.driver()
    harness.hold = True
    driver.submit(*[driver.spec(NOOP) for _ in range(10)], templates=[NOOP])
    object_id = ids.put_id(driver.task_id, 0)
    driver.send(CreateObject(object_id, 1000))
    harness.run()
    harness.kill(driver.process, "killed by SIGKILL")
    harness.hold = False
    harness.advance(5.0)
    node = harness.machines["n:0"]
    assert node.tasks.entries == {} and node.table.entries == {} and node.table.arena.used == 0


def test_a_blocked_worker_lends_its_cpu() -> None:
    harness = Harness(cpus=1)
    driver = harness.driver()
    harness.hold = True
    driver.submit(driver.spec(NOOP), driver.spec(NOOP), templates=[NOOP])
    harness.run()
    blocked = next(worker for worker in harness.workers.values() if worker.queue)

    harness.deliver("n:0", Received(blocked.process, Blocked(True)))
    harness.run()
    assert sum(bool(worker.queue) for worker in harness.workers.values()) == 2
    harness.deliver("n:0", Received(blocked.process, Blocked(False)))
    harness.run()
    harness.hold = False
    harness.run()
    assert harness.machines["n:0"].scheduler.available == {"CPU": 10_000}


def test_a_worker_that_goes_on_is_not_one_too_many_for_long() -> None:
    harness = Harness(cpus=1)
    driver = harness.driver()
    harness.hold = True
    driver.submit(*[driver.spec(NOOP) for _ in range(4)], templates=[NOOP])
    harness.run()
    waits = next(worker for worker in harness.workers.values() if worker.queue)
    harness.deliver("n:0", Received(waits.process, Blocked(True)))
    harness.run()
    other = next(worker for worker in harness.workers.values() if worker.queue and worker is not waits)
    harness.deliver("n:0", Received(waits.process, Blocked(False)))
    harness.run()
    spec = other.queue.popleft()
    harness.deliver("n:0", Received(other.process, TasksDone([ok(spec)])))
    harness.run()
    assert not other.queue, "it was given another task while the CPU is in use"
    harness.hold = False
    harness.run()
    assert len(driver.values) == 4


def test_unstarted_tasks_are_taken_back_from_a_stalled_worker() -> None:
    harness = Harness(cpus=2)
    driver = harness.driver()
    driver.submit(*[driver.spec(NOOP) for _ in range(20)], templates=[NOOP])
    harness.run()

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult | None:
        return None if spec.args == b"slow" else ok(spec)

    harness.behave = behave
    refs = driver.submit(driver.spec(NOOP, args=b"slow"), *[driver.spec(NOOP) for _ in range(19)], templates=[])
    harness.advance(0.1)
    assert sent(harness, TakeBack), "nothing was taken back"
    assert sum(ref in driver.values for ref in refs) == 19


def test_cancelling_a_scope_ends_what_is_queued_running_and_yet_to_come() -> None:
    harness = Harness(nodes=2, cpus=1)
    driver = harness.driver()
    scope = ids.child_scope(driver.scope, driver.task_id, 0)
    harness.hold = True
    inside = [driver.spec(NOOP, scope=scope) for _ in range(6)]
    outside = driver.spec(NOOP)
    refs = driver.submit(*inside, outside, templates=[NOOP])
    harness.run()
    driver.send(CancelScope(scope))
    harness.run()
    harness.hold = False
    late = driver.spec(NOOP, scope=ids.child_scope(scope, b"x" * 16, 1))
    late_ref = driver.submit(late, templates=[])[0]
    harness.advance(5.0)
    for ref in [*refs[:-1], late_ref]:
        assert kind_of(driver.values[ref].payload) == "TaskCancelledError"
    assert not driver.values[refs[-1]].error


def test_cancelling_a_task_reaches_its_children() -> None:
    harness = Harness(cpus=1)
    driver = harness.driver()
    harness.hold = True
    parent = driver.spec(NOOP)
    ref = driver.submit(parent, templates=[NOOP])[0]
    harness.run()
    worker = next(worker for worker in harness.workers.values() if worker.queue)
    child = msgspec.structs.replace(
        driver.spec(NOOP), task_id=ids.child_task_id(ids.children_prefix(parent.task_id), 0), submitter=worker.process
    )
    harness.deliver("n:0", Received(worker.process, SubmitTasks([child])))
    harness.run()
    driver.send(CancelTasks([parent.task_id]))
    harness.run()
    assert harness.machines["n:0"].tasks.entries == {}
    assert kind_of(driver.values[ref].payload) == "TaskCancelledError"


def test_a_task_that_does_not_end_when_cancelled_is_killed_and_counts_as_cancelled() -> None:
    harness = Harness(cpus=1)
    driver = harness.driver()
    harness.hold = True
    ref = driver.submit(driver.spec(NOOP), templates=[NOOP])[0]
    harness.run()
    worker = next(worker for worker in harness.workers.values() if worker.queue)
    harness.deaf.add(worker.process)
    driver.send(CancelTasks([ids.task_of(ref)]))
    harness.advance(5.0)
    assert worker.process not in harness.workers
    assert kind_of(driver.values[ref].payload) == "TaskCancelledError"


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


def test_tasks_spread_over_nodes_when_they_are_long() -> None:
    harness = Harness(nodes=3, cpus=2)
    driver = harness.driver()
    harness.hold = True
    driver.submit(*[driver.spec(NOOP) for _ in range(6)], templates=[NOOP])
    harness.advance(0.5)
    busy = [process.split("/")[0] for process, worker in harness.workers.items() if worker.queue]
    assert sorted(busy) == ["n:0", "n:0", "n:1", "n:1", "n:2", "n:2"]
    harness.hold = False
    harness.advance(0.5)
    assert len(driver.values) == 6


def test_borrowed_references_stay_alive_until_the_borrower_lets_go() -> None:
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    far = template("far", resources={"GPU": 1})
    kept: list[str] = []

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult:
        if spec.borrowed:  # it keeps the reference beyond its end
            kept.append(worker.process)
            harness.deliver(worker.process.split("/")[0], Received(worker.process, References(list(spec.borrowed), [])))
        return ok(spec)

    harness.behave = behave
    ref = driver.submit(driver.spec(NOOP), templates=[NOOP])[0]
    harness.run()
    lent = driver.submit(driver.spec(far, borrowed=(ref,)), templates=[far])[0]
    harness.run()
    driver.send(References([], [ref, lent]))
    harness.advance(1.0)
    assert ref in harness.machines["n:0"].table.entries, "freed while it was borrowed"
    harness.deliver("n:1", Received(kept[0], References([], [ref])))
    harness.advance(1.0)
    assert harness.machines["n:0"].table.entries == {}
    assert harness.machines["n:1"].table.entries == {}


def test_a_function_reaches_nodes_that_never_saw_its_caller() -> None:
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    far = template("far", resources={"GPU": 1})
    driver.submit(driver.spec(far), templates=[far])
    harness.advance(0.5)
    runs = [message for message in sent(harness, RunTasks) if message.functions]  # type: ignore[attr-defined]
    assert [f.function_id for message in runs for f in message.functions] == [far.function_id]  # type: ignore[attr-defined]


def test_a_worker_gives_back_what_it_has_not_begun() -> None:
    harness = Harness(cpus=1)
    driver = harness.driver()
    driver.submit(*[driver.spec(NOOP) for _ in range(5)], templates=[NOOP])
    harness.run()
    harness.hold = True
    refs = driver.submit(*[driver.spec(NOOP) for _ in range(10)], templates=[])
    harness.run()
    worker = next(worker for worker in harness.workers.values() if worker.queue)
    back = [spec.task_id for spec in list(worker.queue)[1:]]

    while len(worker.queue) > 1:
        worker.queue.pop()
    harness.deliver("n:0", Received(worker.process, ReturnTasks(back)))
    harness.deliver("n:0", Received(worker.process, Blocked(True)))
    harness.run()
    harness.hold = False
    harness.run()
    assert all(ref in driver.values for ref in refs)


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


def test_a_node_alone_knows_what_is_available() -> None:
    harness = Harness(nodes=1)
    driver = harness.driver()
    driver.send(Query(1, "available"))
    harness.run()
    answer = driver.inbox[-1]
    assert isinstance(answer, Answer) and msgspec.msgpack.decode(answer.body) == {"CPU": 2.0}


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


def test_a_stuck_queue_moves_only_if_another_node_has_room() -> None:
    harness = Harness(nodes=2, cpus=1)
    driver = harness.driver()
    create = template("Hog", kind=Kind.ACTOR_CREATION, num_cpus=1)
    hogs = [driver.spec(create) for _ in range(2)]
    driver.submit(*hogs, templates=[create])
    harness.run()
    refs = driver.submit(*[driver.spec(NOOP) for _ in range(10)], templates=[NOOP])
    before = len(harness.log)
    harness.advance(10.0)
    assert not any(ref in driver.values for ref in refs)
    assert len(harness.log) - before < 2_000, "it goes round and round"
    driver.send(ActorHandles([], [hogs[1].task_id]))
    harness.advance(5.0)
    assert all(ref in driver.values for ref in refs)


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
