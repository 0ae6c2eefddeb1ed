"""Cutting batches that are too large for a frame."""

import pytest

from trio_ray.runtime.core.messages import (
    CancelScope,
    Function,
    ObjectsReady,
    PutObjects,
    References,
    Status,
    SubmitTasks,
    TaskResult,
    TasksDone,
    Value,
)
from trio_ray.runtime.core.spec import TaskSpec
from trio_ray.runtime.core.split import frames, halves


def test_several_messages_stay_whole() -> None:
    messages = [CancelScope(b"1"), CancelScope(b"2"), CancelScope(b"3")]
    first, second = halves(messages)  # type: ignore[arg-type]
    assert first + second == messages and first and second


def test_a_batch_is_cut_in_order_and_what_tasks_need_comes_first() -> None:
    specs = [TaskSpec(bytes([number]), b"", b"", (), (), b"", "") for number in range(3)]
    function = Function(b"f", "f", b"")
    (first,), (second,) = halves([SubmitTasks(specs, [], [function])])
    assert isinstance(first, SubmitTasks) and isinstance(second, SubmitTasks)
    assert first.specs + second.specs == specs and first.functions == [function] and not second.functions


@pytest.mark.parametrize(
    "message",
    [
        PutObjects([(b"1", b"", ()), (b"2", b"", ())]),
        TasksDone([TaskResult(b"1", Status.OK, ()), TaskResult(b"2", Status.OK, ())]),
        ObjectsReady([Value(b"1"), Value(b"2")]),
    ],
)
def test_other_batches(message: PutObjects | TasksDone | ObjectsReady) -> None:
    (first,), (second,) = halves([message])
    assert type(first) is type(second) is type(message) and first != second


def test_what_cannot_be_cut_is_refused() -> None:
    with pytest.raises(ValueError, match="SubmitTasks message of"):
        halves([SubmitTasks([TaskSpec(b"1", b"", b"", (), (), b"", "")])])
    with pytest.raises(ValueError, match="CancelScope"):
        halves([CancelScope(b"")])


def test_many_dropped_references_are_a_frame_each() -> None:
    done, drops = CancelScope(b"1"), [References([], [bytes([number])]) for number in range(3)]
    assert frames([done]) == [[done]]
    assert frames([done, drops[0]]) == [[done, drops[0]]]
    assert frames([drops[0], done, drops[1], drops[2]]) == [[drops[0], done, drops[1]], [drops[2]]]  # type: ignore[list-item]
    assert frames(drops) == [[drop] for drop in drops]  # type: ignore[arg-type]
