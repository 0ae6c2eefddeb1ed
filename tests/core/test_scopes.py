"""Scopes that end when everything started in them is done: what that left running must go, and nothing else be told."""

import msgspec
import pytest

from tests.core.harness import Harness, Worker, kind_of, ok, sent, template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.machine import Received
from trio_ray.runtime.core.messages import (
    CancelScope,
    Function,
    PublishCancel,
    SubmitTasks,
    TaskResult,
    TasksFinished,
    node_of,
)
from trio_ray.runtime.core.spec import TaskSpec

NOOP = template("noop")
GPU = template("on the GPU", resources={"GPU": 1})


def spawns(harness: Harness, child: TaskSpec, *, told: bool = True) -> None:
    """Tasks with the argument ``spawn`` submit the child and end; what has the argument ``stuck`` never does."""

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult | None:
        if spec.args == b"stuck":
            return None
        if spec.args != b"spawn":
            return ok(spec)
        own = msgspec.structs.replace(child, submitter=worker.process)
        message = SubmitTasks([own], [NOOP], [Function(NOOP.function_id, NOOP.name, b"f")])
        harness.deliver(node_of(worker.process), Received(worker.process, message))
        return msgspec.structs.replace(ok(spec), spawned=told)

    harness.behave = behave


def cancelled_scopes(harness: Harness) -> list[dict[bytes, None]]:
    return [machine.tasks.cancelled for address, machine in harness.machines.items() if address.startswith("n:")]


def test_a_scope_whose_tasks_are_done_and_spawned_nothing_is_nobodys_business() -> None:
    harness = Harness(nodes=2, cpus=1)
    driver = harness.driver()
    scope = ids.child_scope(driver.scope, driver.task_id, 0)
    harness.hold = True
    refs = driver.submit(*[driver.spec(NOOP, scope=scope) for _ in range(6)], templates=[NOOP])
    harness.advance(1.0)
    harness.hold = False
    harness.run()
    assert sent(harness, TasksFinished), "no task ran on the other node"
    assert all(ref in driver.values for ref in refs)
    driver.send(CancelScope(scope, done=True))
    harness.run()
    assert not sent(harness, PublishCancel)
    assert cancelled_scopes(harness) == [{}, {}]


@pytest.mark.parametrize("far", [False, True])
def test_what_the_tasks_of_a_scope_left_running_ends_with_it(far: bool) -> None:
    harness = Harness(nodes=2, cpus=1, extra={int(far): {"GPU": 1}})
    driver = harness.driver()
    scope = ids.child_scope(driver.scope, driver.task_id, 0)
    parent = driver.spec(GPU, args=b"spawn", scope=scope)
    spawns(harness, driver.spec(NOOP, args=b"stuck", scope=scope))
    ref = driver.submit(parent, driver.spec(NOOP, scope=scope), templates=[GPU, NOOP])[0]
    harness.advance(1.0)
    assert not driver.values[ref].error
    stuck = [worker for worker in harness.workers.values() if worker.queue]
    assert [node_of(worker.process) for worker in stuck] == [f"n:{int(far)}"]
    driver.send(CancelScope(scope, done=True))
    harness.run()
    assert not stuck[0].queue
    for address in ("n:0", "n:1"):
        assert not harness.machines[address].tasks.entries and not harness.machines[address].tasks.strays


def test_a_nursery_ends_with_the_process_that_opened_it() -> None:
    harness = Harness(nodes=2, cpus=1, extra={0: {"GPU": 1}})
    driver = harness.driver()
    parent = driver.spec(GPU, args=b"open")
    inner = ids.child_scope(driver.scope, parent.task_id, 0)
    prefix = ids.children_prefix(parent.task_id)
    opener: list[Worker] = []

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult | None:
        if spec.args == b"open" and not opener:
            opener.append(worker)
            children = [
                driver.spec(NOOP, args=b"spawn", scope=inner), driver.spec(NOOP, args=b"stuck", scope=inner),
                driver.spec(NOOP, args=b"stuck"),
            ]  # fmt: skip
            own = [
                msgspec.structs.replace(child, task_id=ids.child_task_id(prefix, number), submitter=worker.process)
                for number, child in enumerate(children)
            ]
            message = SubmitTasks(own, [NOOP], [Function(NOOP.function_id, NOOP.name, b"f")])
            harness.deliver(node_of(worker.process), Received(worker.process, message))
        return None if spec.args in (b"open", b"stuck") else ok(spec)

    harness.behave = behave
    sibling = ids.child_scope(driver.scope, driver.task_id, 7)
    ref = driver.submit(parent, driver.spec(NOOP, args=b"stuck", scope=sibling), templates=[GPU, NOOP])[0]
    harness.advance(1.0)
    harness.kill(opener[0].process, "killed by SIGKILL")
    harness.advance(1.0)
    assert kind_of(driver.values[ref].payload) == "WorkerCrashedError"
    left = [task.spec.scope for number in (0, 1) for task in harness.machines[f"n:{number}"].tasks.entries.values()]
    assert inner not in left
    assert {driver.scope, sibling} == set(left)


@pytest.mark.parametrize("far", [False, True])
def test_what_a_task_that_ran_twice_left_running_the_first_time_ends_with_its_scope(far: bool) -> None:
    harness = Harness(nodes=2, cpus=1, extra={int(far): {"GPU": 1}})
    driver = harness.driver()
    again = template("again", resources={"GPU": 1}, max_retries=1)
    scope = ids.child_scope(driver.scope, driver.task_id, 0)
    spawns(harness, driver.spec(NOOP, args=b"stuck", scope=scope))
    behave, killed = harness.behave, []

    def die_once(worker: Worker, spec: TaskSpec) -> TaskResult | None:
        if spec.args == b"spawn" and killed:
            return ok(spec)
        result = behave(worker, spec)
        if spec.args == b"spawn":
            killed.append(worker.process)
            harness.kill(worker.process, "killed by SIGKILL")
        return result

    harness.behave = die_once
    ref = driver.submit(driver.spec(again, args=b"spawn", scope=scope), templates=[again, NOOP])[0]
    harness.advance(1.0)
    assert killed and not driver.values[ref].error
    driver.send(CancelScope(scope, done=True))
    harness.run()
    assert not any(worker.queue for worker in harness.workers.values())
