"""The worker core: queue, results, giving back."""

from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.messages import (
    AnyMessage,
    Blocked,
    Interrupt,
    ObjectsReady,
    ReturnTasks,
    RunTasks,
    Status,
    TakeBack,
    TaskResult,
    TasksDone,
    Value,
    Where,
)
from trio_ray.runtime.core.spec import Kind, TaskSpec, TaskTemplate
from trio_ray.runtime.core.worker import FLUSH_S, WorkerCore


def template(kind: Kind = Kind.TASK) -> TaskTemplate:
    return TaskTemplate(b"t%d" % kind, b"f", "work", kind, (), (), 1, 3)


def spec(name: bytes, kind: Kind = Kind.TASK) -> TaskSpec:
    return TaskSpec(name, b"t%d" % kind, b"", (), (), b"scope", "n:0/1", actor=b"a" if kind == Kind.ACTOR_CALL else b"")


def run(*names: bytes, kind: Kind = Kind.TASK, inputs: list[Value] | None = None) -> RunTasks:
    return RunTasks([spec(name, kind) for name in names], inputs or [], [template(kind)])


def make_worker() -> WorkerCore:
    return WorkerCore(ClientCore("n:0/2"), lambda value: Owner(value.object_id))


class Owner:
    """Stands for the owner of a read pin; ``gone`` lists those that died."""

    gone: list[bytes] = []

    def __init__(self, object_id: bytes) -> None:
        self.object_id = object_id

    def __del__(self) -> None:
        Owner.gone.append(self.object_id)


def finish(worker: WorkerCore, now: float = 0.0) -> bool:
    entry = worker.next()
    assert entry is not None
    return worker.done(TaskResult(entry[0].task_id, Status.OK, ()), now)


def done_ids(messages: list[AnyMessage]) -> list[bytes]:
    return [result.task_id for message in messages if isinstance(message, TasksDone) for result in message.results]


def test_results_wait_for_each_other_a_little() -> None:
    worker = make_worker()
    worker.receive([run(b"1", b"2", b"3", b"4")])
    assert not finish(worker, 5.0)
    assert not finish(worker, 5.0 + FLUSH_S / 2)
    assert finish(worker, 5.0 + FLUSH_S * 1.5)
    assert done_ids(worker.take()) == [b"1", b"2", b"3"]
    assert finish(worker, 6.0), "nothing follows"
    assert done_ids(worker.take()) == [b"4"]
    assert worker.next() is None and not worker.pending


def test_tasks_are_taken_back_unless_begun() -> None:
    worker = make_worker()
    worker.receive([run(b"1", b"2", b"3")])
    worker.next()
    worker.receive([TakeBack([b"1", b"3", b"unknown"])])
    assert worker.take() == [ReturnTasks([b"3"])]
    worker.receive([TakeBack([b"1"])])
    assert worker.take() == [ReturnTasks([])], "the node waits for an answer"
    assert [entry[0].task_id for entry in worker.queue] == [b"2"]


def test_who_waits_gives_back_what_is_behind() -> None:
    worker = make_worker()
    worker.receive([run(b"1", b"2")])
    worker.next()
    worker.wait_begins()
    assert worker.take() == [ReturnTasks([b"2"]), Blocked(True)]
    worker.receive([run(b"3")])
    assert worker.take() == [ReturnTasks([b"3"])], "it was on its way"
    worker.wait_ends()
    assert worker.take() == [Blocked(False)]


def test_an_actor_keeps_its_calls_and_is_blocked_when_all_its_calls_are() -> None:
    worker = make_worker()
    worker.receive([run(b"a", kind=Kind.ACTOR_CREATION)])
    finish(worker)
    worker.take()
    worker.receive([run(b"1", b"2", b"3", kind=Kind.ACTOR_CALL)])
    worker.next()
    worker.next()
    worker.wait_begins()
    assert worker.take() == []
    worker.wait_begins()
    assert worker.take() == [Blocked(True)] and len(worker.queue) == 1
    worker.wait_ends()
    assert worker.take() == [Blocked(False)]
    worker.wait_ends()
    assert worker.take() == []


def test_interrupts_drop_what_has_not_begun_and_name_what_runs() -> None:
    worker = make_worker()
    worker.receive([run(b"1", b"2", b"3")])
    worker.next()
    worker.receive([Interrupt([b"1", b"3", b"done long ago"])])
    assert worker.interrupted == [b"1"]
    (message,) = worker.take()
    assert message == TasksDone([TaskResult(b"3", Status.CANCELLED, ())])
    assert [entry[0].task_id for entry in worker.queue] == [b"2"]


def test_inputs_are_pinned_until_the_last_task_that_came_with_them_is_done() -> None:
    Owner.gone.clear()
    worker = make_worker()
    worker.receive([run(b"1", b"2", inputs=[Value(b"in", Where.SHARED, offset=0, size=10)])])
    first = worker.next()
    assert first is not None and first[1][b"in"].value.size == 10
    del first
    assert not Owner.gone
    worker.next()
    assert Owner.gone == [b"in"]


def test_values_for_the_client_pass_through() -> None:
    worker = make_worker()
    worker.client.want([b"x"], fetch=True)
    worker.receive([ObjectsReady([Value(b"x", payload=b"1", size=1)])])
    assert worker.client.readable(b"x")
