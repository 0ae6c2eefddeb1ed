"""Batches that are too much for one frame."""

import msgspec

from trio_ray.runtime.core.messages import AnyMessage, ObjectsReady, PutObjects, References, SubmitTasks, TasksDone


def frames(messages: list[AnyMessage]) -> list[list[AnyMessage]]:
    """The same messages as the batches to be sent as a frame each: one, unless they drop many references."""
    if len(messages) < 2 or type(messages[-1]) is not References:
        return [messages]
    end = len(messages)
    while end > 1 and type(messages[end - 1]) is type(messages[end - 2]) is References:
        end -= 1
    return [messages[:end], *([message] for message in messages[end:])]


def halves(messages: list[AnyMessage]) -> tuple[list[AnyMessage], list[AnyMessage]]:
    """The same messages as two batches, to be sent one after the other.

    A single message is cut in two where it is a batch itself. Raises ValueError for one that cannot be.
    """
    middle = len(messages) // 2
    if middle:
        return messages[:middle], messages[middle:]
    (message,) = messages
    if isinstance(message, SubmitTasks):
        middle = len(message.specs) // 2
        first = SubmitTasks(message.specs[:middle], message.templates, message.functions)
        return _pair(middle, first, SubmitTasks(message.specs[middle:]))
    if isinstance(message, PutObjects):
        middle = len(message.objects) // 2
        return _pair(middle, PutObjects(message.objects[:middle]), PutObjects(message.objects[middle:]))
    if isinstance(message, TasksDone):
        middle = len(message.results) // 2
        return _pair(middle, TasksDone(message.results[:middle]), TasksDone(message.results[middle:]))
    if isinstance(message, ObjectsReady):
        middle = len(message.values) // 2
        return _pair(middle, ObjectsReady(message.values[:middle]), ObjectsReady(message.values[middle:]))
    return _pair(0, message, message)


def _pair(middle: int, first: AnyMessage, second: AnyMessage) -> tuple[list[AnyMessage], list[AnyMessage]]:
    if not middle:
        kind = type(first).__name__
        size = len(msgspec.msgpack.encode(first))
        raise ValueError(f"a {kind} message of {size:,} bytes is larger than a frame may be, and cannot be cut in two")
    return [first], [second]
