"""What a node writes to the task table, and takes back: rows go when no result can be asked for any more."""

import pytest

from tests.core.harness import Driver, Harness, Worker, ok, sent, template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.messages import ForgetTasks, LogTasks, Output, References, Status, TaskResult
from trio_ray.runtime.core.spec import TaskSpec

NOOP = template("noop")


def logged(harness: Harness) -> list[bytes]:
    """Tasks whose lineage was written."""
    return [record.spec.task_id for message in sent(harness, LogTasks) for record in message.records]  # type: ignore[attr-defined]


def forgotten(harness: Harness) -> list[bytes]:
    """Tasks whose lineage was taken back."""
    return [task_id for message in sent(harness, ForgetTasks) for task_id in message.task_ids]  # type: ignore[attr-defined]


@pytest.fixture
def harness() -> Harness:
    """One node whose workers hold what they are given."""
    made = Harness()
    made.hold = True
    return made


@pytest.fixture
def driver(harness: Harness) -> Driver:
    """A driver of that node."""
    return harness.driver()


def finish(harness: Harness) -> None:
    """Let the workers go on, and all that follows be written."""
    harness.hold = False
    harness.advance(2.0)


@pytest.mark.parametrize("before", [False, True], ids=["dropped at once", "dropped when it was written"])
@pytest.mark.parametrize("inputs", [False, True], ids=["", "with an input"])
def test_a_task_whose_result_is_dropped_while_it_runs(
    harness: Harness, driver: Driver, before: bool, inputs: bool
) -> None:
    given = driver.submit(driver.spec(NOOP), templates=[NOOP]) if inputs else []
    task = driver.spec(NOOP, *given)
    [ref] = driver.submit(task, templates=[NOOP])
    harness.run()
    if before:
        harness.advance(1.0)
        assert task.task_id in logged(harness)
    driver.send(References([], [ref]))
    finish(harness)
    assert (task.task_id in logged(harness)) == (task.task_id in forgotten(harness))
    driver.send(References([], given))
    finish(harness)
    assert set(logged(harness)) == set(forgotten(harness))
    assert not harness.machines["control/0"].tasks.records


@pytest.mark.parametrize("inputs", [False, True], ids=["", "with an input"])
def test_a_result_that_was_forgotten_and_is_asked_for_again_has_its_lineage(
    harness: Harness, driver: Driver, inputs: bool
) -> None:
    given = driver.submit(driver.spec(NOOP), templates=[NOOP]) if inputs else []
    task = driver.spec(NOOP, *given)
    [ref] = driver.submit(task, templates=[NOOP])
    harness.run()
    driver.send(References([], [ref]))  # as when the parent that submitted it died
    driver.submit(task, templates=[NOOP])  # and runs again
    finish(harness)
    assert harness.machines["n:0"].table.entries[ref].exported
    assert task.task_id in logged(harness)
    driver.send(References([], [ref, *given]))
    finish(harness)
    assert set(logged(harness)) == set(forgotten(harness))


def test_a_chain_of_failures_may_be_of_any_length(harness: Harness, driver: Driver) -> None:
    def behave(worker: Worker, spec: TaskSpec) -> TaskResult:
        return TaskResult(spec.task_id, Status.ERROR, (Output(b"\x02x"),), 1.0, 1e-5)

    harness.behave = behave
    specs = [driver.spec(NOOP)]
    for _ in range(3_000):
        specs.append(driver.spec(NOOP, ids.return_id(specs[-1].task_id, 0)))
    refs = driver.submit(*specs, templates=[NOOP])
    finish(harness)
    assert all(driver.values[ref].payload == b"\x02x" for ref in refs)


@pytest.mark.parametrize("exported", [False, True])
def test_references_within_references_may_be_of_any_depth(harness: Harness, driver: Driver, exported: bool) -> None:
    refs: list[bytes] = []

    def behave(worker: Worker, spec: TaskSpec) -> TaskResult:
        return ok(spec, contained=(refs[refs.index(ids.return_id(spec.task_id, 0)) - 1],) if len(refs) > 1 else ())

    harness.behave = behave
    harness.hold = False
    for _ in range(3_000):
        refs += driver.submit(driver.spec(NOOP), templates=[NOOP])
        harness.run()
    driver.send(References([], refs[:-1]))
    harness.run()
    if exported:
        harness.advance(2.0)
    driver.send(References([], refs[-1:]))
    harness.advance(2.0)
    assert not harness.machines["n:0"].table.entries
