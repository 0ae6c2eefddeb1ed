"""The client core: references, values, batches."""

from trio_ray.runtime.core import ids
from trio_ray.runtime.core.client import DROPPED_TOGETHER, ClientCore
from trio_ray.runtime.core.messages import (
    AnyMessage,
    CreateFailed,
    CreateObject,
    Function,
    ObjectCreated,
    ObjectsReady,
    PutObjects,
    References,
    Status,
    SubmitTasks,
    TaskResult,
    TasksDone,
    Unpin,
    Value,
    WaitObjects,
    Where,
)
from trio_ray.runtime.core.spec import Kind, TaskSpec, TaskTemplate
from trio_ray.runtime.core.waiter import Waiter

TEMPLATE = TaskTemplate(b"t", b"f", "square", Kind.TASK, (), (), 1, 3)
FUNCTION = Function(b"f", "square", b"")
ROOT = ids.children_prefix(ids.root_task_id("driver"))


class Pin:
    """Stands for the owner of a read pin."""

    def __init__(self, core: ClientCore, value: Value) -> None:
        self.core, self.object_id = core, value.object_id

    def __del__(self) -> None:
        self.core.unpinned.append(self.object_id)


def make_core() -> ClientCore:
    core = ClientCore("n:0/1", lambda value: Pin(core, value))
    return core


def task(number: int, *, inputs: tuple[bytes, ...] = ()) -> tuple[TaskSpec, bytes]:
    task_id = ids.child_task_id(ROOT, number)
    return TaskSpec(task_id, b"t", b"", inputs, (), b"scope", "n:0/1"), ids.return_id(task_id, 0)


def submit(core: ClientCore, number: int) -> bytes:
    spec, object_id = task(number)
    core.submit(spec, [object_id])
    return object_id


def kinds(messages: list[AnyMessage]) -> list[type]:
    return [type(message) for message in messages]


def test_neighbouring_tasks_are_one_message_and_templates_go_once() -> None:
    core = make_core()
    core.send(FUNCTION)
    core.send(TEMPLATE)
    for number in range(3):
        submit(core, number)
    (message,) = core.take()
    assert isinstance(message, SubmitTasks)
    assert len(message.specs) == 3 and message.templates == [TEMPLATE] and message.functions == [FUNCTION]
    submit(core, 3)
    (message,) = core.take()
    assert isinstance(message, SubmitTasks) and not message.templates
    assert core.take() == [] and not core.pending


def test_a_put_goes_before_tasks_but_after_those_whose_results_it_holds() -> None:
    core = make_core()
    first = submit(core, 0)
    core.put(b"plain", b"", ())
    assert kinds(core.take()) == [PutObjects, SubmitTasks]
    submit(core, 1)
    core.put(b"holds", b"", (first,))
    submit(core, 2)
    assert kinds(core.take()) == [SubmitTasks, PutObjects, SubmitTasks]


def test_a_dropped_reference_is_told_after_the_tasks_that_use_it() -> None:
    core = make_core()
    used = submit(core, 0)
    core.take()
    spec, _ = task(1, inputs=(used,))
    core.submit(spec, [])
    core.dropped.append(used)
    assert core.take() == [SubmitTasks([spec]), References([], [used])]
    assert used not in core.counts and used not in core.values


def test_many_references_dropped_at_once_are_told_in_parts() -> None:
    core = make_core()
    core.patient = True
    object_ids = [b"%05d" % number for number in range(2 * DROPPED_TOGETHER + 1)]
    core.made.extend(object_ids)
    core.made.append(b"kept")
    core.take()
    core.take()
    core.dropped.extend(object_ids)
    core.made.append(b"new")
    core.unpinned.append(b"read")
    messages = core.take()
    assert messages == [
        Unpin([b"read"]),
        References([b"new"], object_ids[:DROPPED_TOGETHER]),
        References([], object_ids[DROPPED_TOGETHER : 2 * DROPPED_TOGETHER]),
        References([], object_ids[-1:]),
    ]
    assert not core.pending and core.take() == []


def test_a_reference_that_came_and_went_between_flushes_is_not_told() -> None:
    core = make_core()
    core.patient = True
    core.made.append(b"brief")
    core.dropped.append(b"brief")
    core.made.append(b"kept")
    assert core.take() == [] and core.pending
    assert core.take() == [References([b"kept"], [])] and not core.pending
    core.made.append(b"kept")
    core.dropped.append(b"kept")
    assert core.take() == []
    core.dropped.append(b"kept")
    assert core.take() == [References([], [b"kept"])]


def test_new_references_are_told_with_whatever_is_told_next() -> None:
    core = make_core()
    core.patient = True
    container = submit(core, 0)
    core.take()
    for name in (b"a", b"b", b"a"):
        core.made.append(name)
    assert core.take() == []
    core.made.append(b"c")
    core.dropped += [b"b", b"a"]
    assert core.take() == [], "they came and went unsaid"
    core.made.append(b"d")
    core.dropped.append(container)
    assert core.take() == [References([b"a", b"c", b"d"], [container])]
    core.dropped += [b"a", b"d"]
    assert core.take() == [References([], [b"a", b"d"])]
    assert core.counts == {b"c": 1}


def test_a_shell_that_does_not_come_back_tells_new_references_at_once() -> None:
    core = make_core()
    core.made.append(b"a")
    assert core.take() == [References([b"a"], [])] and not core.pending


def test_an_object_that_was_looked_at_in_the_short_life_of_its_reference_is_forgotten() -> None:
    core = make_core()
    core.made.append(b"brief")
    core.want([b"brief"], fetch=True)
    assert core.expected == 1
    core.dropped.append(b"brief")
    assert core.take() == [WaitObjects([b"brief"], True)]
    assert b"brief" not in core.values and not core.expected


def test_an_object_whose_reference_came_to_life_elsewhere_is_waited_for() -> None:
    """Unpickled before this process joined, or inherited over a fork: nobody counts it, but it can be read."""
    core = make_core()
    other = submit(core, 0)
    core.take()
    core.want([b"foreign"], fetch=True)
    core.dropped.append(other)
    core.made.append(b"made")
    assert core.take() == [WaitObjects([b"foreign"], True), References([b"made"], [other])]
    core.receive([ObjectsReady([Value(b"foreign", payload=b"1", size=1)])])
    assert core.readable(b"foreign")


def test_an_object_that_was_being_fetched_is_asked_for_again_in_its_next_life() -> None:
    core = make_core()
    for _ in range(2):
        core.made.append(b"x")
        core.want([b"x"], fetch=False)
        core.take()
        core.receive([ObjectsReady([Value(b"x", Where.ELSEWHERE, size=10)])])
        core.want([b"x"], fetch=True)
        assert WaitObjects([b"x"], True) in core.take()
        core.dropped.append(b"x")
        core.take()


def test_a_drop_of_what_was_never_counted_is_ignored() -> None:
    core = make_core()
    core.dropped.append(b"of an earlier session")
    assert core.take() == []


def test_results_stand_between_added_and_removed_references() -> None:
    core = make_core()
    mine = submit(core, 0)
    core.take()
    core.made.append(b"made")
    core.dropped.append(mine)
    done = TasksDone([TaskResult(b"x", Status.OK, ())])
    assert core.take(done) == [References([b"made"], []), done, References([], [mine])]


def test_values_arrive_and_go_with_the_last_reference() -> None:
    core = make_core()
    object_id = submit(core, 0)
    core.take()
    assert core.values[object_id] is None
    core.receive([ObjectsReady([Value(object_id, payload=b"1", size=1)])])
    value = core.values[object_id]
    assert value is not None and value.payload == b"1" and core.readable(object_id)
    core.dropped.append(object_id)
    core.take()
    core.receive([ObjectsReady([Value(object_id, payload=b"1", size=1)])])
    assert not core.values


def test_only_what_the_node_does_not_tell_by_itself_is_asked_for() -> None:
    core = make_core()
    mine = submit(core, 0)
    core.want([mine, b"other", b"other"], fetch=True)
    assert core.take()[1:] == [WaitObjects([b"other"])]
    core.want([mine, b"other"], fetch=True)
    assert core.take() == []


def test_the_bytes_of_a_large_result_are_asked_for_as_soon_as_it_exists() -> None:
    core = make_core()
    mine, unwanted = submit(core, 0), submit(core, 1)
    core.take()
    called: list[bool] = []
    waiter = Waiter(core, [mine], 1, lambda: called.append(True), fetch=True, stop_at_error=False)
    assert not waiter.start()
    news = [Value(mine, Where.ELSEWHERE, size=10**6), Value(unwanted, Where.ELSEWHERE, size=10**6)]
    core.receive([ObjectsReady(news)])
    assert not core.readable(mine)
    assert core.take() == [WaitObjects([mine])]
    core.want([mine, unwanted], fetch=True)
    assert core.take() == [WaitObjects([unwanted])]
    core.receive([ObjectsReady([Value(mine, Where.SHARED, offset=64, size=10**6)])])
    assert core.readable(mine) and isinstance(core.owners[mine], Pin)


def test_a_read_pin_ends_with_its_owner() -> None:
    core = make_core()
    mine = submit(core, 0)
    core.take()
    shared = ObjectsReady([Value(mine, Where.SHARED, offset=64, size=10**6)])
    core.receive([shared])
    view = core.owners[mine]
    core.dropped.append(mine)
    assert core.take() == [References([], [mine])], "user code still looks at it"
    del view
    assert core.take() == [Unpin([mine])]


def test_a_read_pin_nobody_uses_ends_with_the_last_reference() -> None:
    core = make_core()
    mine = submit(core, 0)
    core.take()
    shared = ObjectsReady([Value(mine, Where.SHARED, offset=64, size=10**6)])
    core.receive([shared])
    core.dropped.append(mine)
    assert core.take() == [Unpin([mine]), References([], [mine])]
    core.receive([shared])
    assert core.take() == [Unpin([mine])], "nobody wanted it any more"


def test_streamed_bytes_are_a_value_when_complete() -> None:
    core = make_core()
    mine = submit(core, 0)
    core.receive([ObjectsReady([Value(mine, Where.STREAMED, offset=7, size=3)])])
    assert not core.readable(mine) and core.streams[7].size == 3
    core.streamed(7, b"abc")
    value = core.values[mine]
    assert value is not None and value.payload == b"abc" and not core.streams


def test_watchers_are_called_once() -> None:
    core = make_core()
    mine = submit(core, 0)
    calls: list[str] = []
    taken_back = lambda object_id: calls.append("taken back")  # noqa: E731
    core.watch(mine, lambda object_id: calls.append("first"))
    core.watch(mine, taken_back)
    core.watch(b"never", taken_back)
    core.unwatch(mine, taken_back)
    core.unwatch(b"never", taken_back)
    ready = ObjectsReady([Value(mine)])
    core.receive([ready, ready])
    assert calls == ["first"]


def test_room_for_a_large_object() -> None:
    core = make_core()
    answers: list[ObjectCreated | CreateFailed] = []
    core.create(b"big", 100, answers.append)
    assert core.take() == [CreateObject(b"big", 100)]
    core.receive([ObjectCreated(b"big", 640)])
    core.create(b"bigger", 200, answers.append)
    core.receive([CreateFailed(b"bigger", "the object store is full")])
    assert [type(answer) for answer in answers] == [ObjectCreated, CreateFailed]


def test_a_lost_link_wakes_everybody() -> None:
    core = make_core()
    mine = submit(core, 0)
    said: list[str] = []
    core.watch(mine, lambda object_id: said.append("watcher"))
    core.create(b"big", 100, lambda answer: said.append(getattr(answer, "reason", "")))
    core.ask("nodes", "", lambda answer: said.append(answer.error))
    core.lost("the node is gone")
    assert said == ["the node is gone", "the node is gone", "watcher"] and core.failure == "the node is gone"


def waiter(core: ClientCore, object_ids: list[bytes], count: int, *, fetch: bool = True, stop: bool = False) -> Waiter:
    waiter = Waiter(core, object_ids, count, lambda: calls.append(count), fetch=fetch, stop_at_error=stop)
    calls.clear()
    return waiter


calls: list[int] = []


def test_waiting_for_all() -> None:
    core = make_core()
    all_ids = [submit(core, number) for number in range(4)]
    wait = waiter(core, all_ids, 4)
    assert not wait.start()
    for object_id in (all_ids[3], all_ids[0], all_ids[2]):
        core.receive([ObjectsReady([Value(object_id)])])
    assert not wait.done
    core.receive([ObjectsReady([Value(all_ids[1])])])
    assert wait.done and calls == [4] and not wait.failed
    assert waiter(core, all_ids, 4).start()


def test_waiting_for_some() -> None:
    core = make_core()
    all_ids = [submit(core, number) for number in range(4)]
    wait = waiter(core, all_ids, 2)
    assert not wait.start()
    core.receive([ObjectsReady([Value(all_ids[3]), Value(all_ids[1], Where.ELSEWHERE, size=10**6)])])
    assert not wait.done, "the bytes of one are missing"
    core.receive([ObjectsReady([Value(all_ids[1], Where.SHARED, size=10**6)])])
    assert wait.done and calls == [2]
    assert waiter(core, all_ids, 2).start()
    assert not waiter(core, all_ids, 3).start()


def test_waiting_without_fetching_is_for_existence() -> None:
    core = make_core()
    mine = submit(core, 0)
    wait = waiter(core, [mine], 1, fetch=False)
    assert not wait.start()
    core.receive([ObjectsReady([Value(mine, Where.ELSEWHERE, size=10**6)])])
    assert wait.done


def test_an_error_can_end_the_wait() -> None:
    core = make_core()
    first, second = submit(core, 0), submit(core, 1)
    patient, impatient = waiter(core, [first, second], 2), waiter(core, [first, second], 2, stop=True)
    assert not patient.start() and not impatient.start()
    core.receive([ObjectsReady([Value(second, error=True)])])
    assert impatient.failed and impatient.done and not patient.done
    late = waiter(core, [first, second], 2, stop=True)
    assert late.start() and late.failed


def test_a_cancelled_wait_is_forgotten_and_a_lost_link_ends_one() -> None:
    core = make_core()
    mine = submit(core, 0)
    cancelled, wait = waiter(core, [mine], 1, stop=True), waiter(core, [mine], 1)
    assert not cancelled.start() and not wait.start()
    cancelled.cancel()
    assert not core.error_watchers
    core.lost("gone")
    assert calls == [1] and wait.done
    assert waiter(core, [mine], 1).start()
