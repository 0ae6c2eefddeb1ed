"""The node machine in a whole cluster of machines: events in, effects out, ``validate`` after each step."""

import msgspec
import pytest

from tests.core.harness import Harness, Worker, big, kind_of, ok, sent, template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.machine import Received
from trio_ray.runtime.core.messages import (
    PLACEMENT,
    ActorHandles,
    Answer,
    AssignTasks,
    Blocked,
    CancelScope,
    CancelTasks,
    CreateObject,
    ObjectCreated,
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
    Unpin,
    WaitObjects,
    Where,
)
from trio_ray.runtime.core.spec import Kind, TaskSpec

NOOP = template("noop")


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


@pytest.mark.parametrize("how", ["cancelled", "out of time"])
def test_a_task_that_placement_has_when_it_is_cancelled_runs_nowhere(how: str) -> None:
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    ran = []
    harness.behave = lambda worker, spec: ran.append(spec.task_id) or ok(spec)
    gpu = template("gpu", resources={"GPU": 1})
    deadline = harness.now + 1.0 if how == "out of time" else None
    [ref] = driver.submit(driver.spec(gpu, deadline=deadline), templates=[gpu])
    placement = harness.inbox[PLACEMENT]
    while not any(isinstance(getattr(event, "message", None), PlaceTasks) for event in placement):
        harness.step()
    late = list(placement)
    placement.clear()
    if how == "cancelled":
        driver.send(CancelTasks([ids.task_of(ref)]))
    harness.advance(2.0)
    assert kind_of(driver.values[ref].payload) == "TaskCancelledError"
    placement.extend(late)
    harness.advance(2.0)
    assert sent(harness, AssignTasks) and not ran
    assert not any(harness.machines[f"n:{number}"].tasks.entries for number in (0, 1))


def test_a_large_result_that_was_waited_for_and_dropped_before_it_came_is_on_no_node() -> None:
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    harness.behave = lambda worker, spec: big(harness, worker, spec, 9000)
    gpu = template("gpu", resources={"GPU": 1})
    [ref] = driver.submit(driver.spec(gpu), templates=[gpu])
    driver.send(WaitObjects([ref]))
    driver.send(References([], [ref]))
    harness.advance(3.0)
    for number in (0, 1):
        table = harness.machines[f"n:{number}"].table
        assert not table.entries and not table.arena.used


def test_an_input_for_which_there_is_no_room_leaves_nothing_behind() -> None:
    harness = Harness(nodes=2, store_bytes=1 << 14, extra={0: {"disk": 1}, 1: {"GPU": 1}})
    driver = harness.driver()
    harness.behave = lambda worker, spec: ok(spec) if spec.inputs else big(harness, worker, spec, 9000)
    disk, gpu = template("disk", resources={"disk": 1}), template("gpu", resources={"GPU": 1})
    [here] = driver.submit(driver.spec(disk), templates=[disk])
    [there] = driver.submit(driver.spec(gpu), templates=[gpu])
    harness.advance(1.0)
    [ref] = driver.submit(driver.spec(gpu, here), templates=[])
    harness.advance(20.0)
    assert kind_of(driver.values[ref].payload) == "ObjectStoreFullError"
    driver.send(References([], [here, there, ref]))
    harness.advance(3.0)
    for number in (0, 1):
        table = harness.machines[f"n:{number}"].table
        assert not table.entries and not table.arena.used


def test_a_large_result_that_was_lent_and_dropped_before_it_came_is_on_no_node() -> None:
    harness = Harness(nodes=2, extra={1: {"GPU": 1}})
    driver = harness.driver()
    harness.behave = lambda worker, spec: big(harness, worker, spec, 9000)
    harness.hold = True
    gpu = template("gpu", resources={"GPU": 1})
    made = driver.spec(gpu)
    [ref] = driver.submit(made, templates=[gpu])
    borrower = driver.spec(gpu, borrowed=(ref,))
    refs = [ref, *driver.submit(borrower, templates=[])]
    harness.advance(0.5)
    driver.send(CancelTasks([borrower.task_id]))
    driver.send(References([], refs))
    harness.advance(1.0)
    harness.hold = False
    harness.advance(3.0)
    for number in (0, 1):
        table = harness.machines[f"n:{number}"].table
        assert not table.entries and not table.arena.used


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


def test_a_node_alone_knows_what_is_available() -> None:
    harness = Harness(nodes=1)
    driver = harness.driver()
    driver.send(Query(1, "available"))
    harness.run()
    answer = driver.inbox[-1]
    assert isinstance(answer, Answer) and msgspec.msgpack.decode(answer.body) == {"CPU": 2.0}


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
