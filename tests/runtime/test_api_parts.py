"""Parts of the API that need no cluster: serialization, references, errors, options, code."""

import gc
import pickle
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pytest

import trio_ray
from trio_ray import exceptions
from trio_ray.runtime.api import code, context, options, refs, serialize
from trio_ray.runtime.api.errors import describe_failure, make_task_error, system_error
from trio_ray.runtime.api.session import unpack_arguments
from trio_ray.runtime.core.client import ClientCore
from trio_ray.runtime.core.failures import system_error as core_error

INLINE = 100 * 1024


@pytest.fixture
def core() -> Iterator[ClientCore]:
    core = ClientCore("n:0/1")
    refs.bind(core)
    yield core
    refs.unbind()


def through(value: object) -> Any:
    """The value as another process gets it."""
    payload, _ = serialize.serialize(value, INLINE)
    return serialize.deserialize(payload.to_bytes() if isinstance(payload, serialize.Packed) else payload)


class Local:
    """Stands for a class of the user's."""


# -- serialization -----------------------------------------------------------------------------------------------


class Interrupted(list[bytes]):
    """A log during whose extension Ctrl-C is pressed."""

    def extend(self, more: Iterable[bytes]) -> None:
        super().extend(more)
        raise KeyboardInterrupt


def test_ctrl_c_while_references_are_made_leaves_none_counted(core: ClientCore) -> None:
    core.made = Interrupted()
    refs.bind(core)
    object_ids = [number.to_bytes(20, "big") for number in range(200)]
    with pytest.raises(KeyboardInterrupt):
        refs.restore_list(object_ids)
    assert gc.isenabled()
    assert core.made == core.dropped == object_ids


def test_plain_values_have_no_header() -> None:
    payload, contained = serialize.serialize({"a": 1}, INLINE)
    assert isinstance(payload, bytes) and payload[0] == serialize.PICKLE and contained == ()
    assert pickle.loads(payload) == {"a": 1}


def test_large_values_come_in_parts_and_arrays_are_aligned() -> None:
    small, large = np.arange(10), np.arange(100_000.0)
    payload, _ = serialize.serialize([small, large, "text", b""], INLINE)
    assert isinstance(payload, serialize.Packed) and payload.size > large.nbytes
    assert all(offset % serialize.ALIGNMENT == 0 for offset, _ in payload.parts)
    back = serialize.deserialize(memoryview(payload.to_bytes()))
    assert (back[1] == large).all() and back[0].tolist() == list(range(10)) and back[2:] == ["text", b""]
    assert not back[0].flags.writeable and not back[1].flags.writeable


def test_a_large_plain_value_is_one_part() -> None:
    payload, _ = serialize.serialize(b"x" * 200_000, INLINE)
    assert isinstance(payload, serialize.Packed) and len(payload.parts) == 1


def test_arrays_of_every_kind() -> None:
    for array in (np.zeros(0), np.zeros((3, 4), order="F"), np.arange(20)[::2], np.array(["a", "b"]), np.array(5)):
        assert (through(array) == array).all() and through(array).shape == array.shape


def test_what_only_cloudpickle_can() -> None:
    base = 3
    assert through(lambda x: x + base)(2) == 5
    main = type("Main", (), {"__module__": "__main__", "value": 7})
    assert through(main()).value == 7


def test_what_nothing_can() -> None:
    with pytest.raises(TypeError, match=r"could not serialize .*lock"):
        serialize.serialize(threading.Lock(), INLINE)
    with pytest.raises(TypeError, match=r"could not serialize .*global"):
        lock = threading.Lock()
        serialize.pickle_code(lambda: lock)


def test_references_inside_are_found_once(core: ClientCore) -> None:
    one, two = trio_ray.ObjectRef.from_random(), trio_ray.ObjectRef.from_random()
    payload, contained = serialize.serialize([one, {"x": two}, one], INLINE)
    assert contained == (bytes(one), bytes(two))
    assert serialize.serialize(5, INLINE)[1] == ()
    pickle.dumps(one)  # by the user's own hand, into nowhere
    assert serialize.serialize(5, INLINE)[1] == ()
    assert isinstance(payload, bytes)
    assert serialize.deserialize(payload)[1]["x"] == two


def test_errors_have_layouts_of_their_own() -> None:
    error = serialize.deserialize(core_error("WorkerCrashedError", "it died"))
    assert isinstance(error, exceptions.WorkerCrashedError) and str(error) == "it died"
    assert isinstance(system_error("NoSuchKind", "x"), exceptions.RaySystemError)
    payload = serialize.serialize_error(make_task_error("f", "text", ValueError("x"), 1))
    assert isinstance(serialize.deserialize(payload), ValueError)
    with pytest.raises(exceptions.RaySystemError, match="corrupt"):
        serialize.deserialize(b"\x07")


def test_arguments_are_put_back_in_their_places() -> None:
    assert unpack_arguments((1, 2), ()) == ((1, 2), {})
    packed = [[None, 2, None], {"x": None, "y": 5}, [(0, 0), (2, 1), ("x", 0)]]
    assert unpack_arguments(packed, ["a", "b"]) == (["a", 2, "b"], {"x": "a", "y": 5})


# -- references --------------------------------------------------------------------------------------------------


def test_a_reference_is_its_id(core: ClientCore) -> None:
    ref = trio_ray.ObjectRef(b"0123456789abcdefghij")
    assert ref == b"0123456789abcdefghij" and hash(ref) == hash(b"0123456789abcdefghij")
    assert ref.binary() == bytes(ref) and type(ref.binary()) is bytes and ref.hex() == bytes(ref).hex()
    assert not ref.is_nil() and trio_ray.ObjectRef.nil().is_nil() and ref.size() == 20
    with pytest.raises(ValueError, match="20 bytes"):
        trio_ray.ObjectRef(b"short")
    with pytest.raises(TypeError):
        list(ref)
    with pytest.raises(RuntimeError, match="not initialized"):
        ref.future()


def test_references_are_counted_as_they_come_and_go(core: ClientCore) -> None:
    ref = refs.owned(b"0" * 20)
    again = pickle.loads(pickle.dumps(ref))
    assert list(core.made) == [b"0" * 20] and again == ref
    woken = []
    refs.wake_with(lambda: woken.append(True))
    del ref
    assert list(core.dropped) == [b"0" * 20] and woken == [True]
    refs.unbind()
    del again
    assert len(core.dropped) == 1, "nobody counts any more"


@pytest.mark.parametrize("count", [1, 2, 255, 256, 257, 700, 6000])
def test_a_list_of_references_is_their_ids(core: ClientCore, count: int) -> None:
    ids = [number.to_bytes(20, "big") for number in range(count)]
    payload, contained = serialize.serialize([refs.owned(object_id) for object_id in ids], INLINE)
    core.dropped.clear()
    assert contained == tuple(ids) and all(type(object_id) is bytes for object_id in contained)
    assert isinstance(payload, serialize.Packed) == (count * 20 >= INLINE)
    data = payload.to_bytes() if isinstance(payload, serialize.Packed) else payload
    assert len(data) == 1 + 20 * count
    back = serialize.deserialize(memoryview(data))
    assert back == ids and {type(ref) for ref in back} == {trio_ray.ObjectRef}
    assert core.made == ids and gc.isenabled()
    del back
    assert sorted(core.dropped) == ids
    assert core.take() == [] and not core.counts and not core.pending


def test_references_among_other_things_are_found_and_counted(core: ClientCore) -> None:
    one, two = refs.owned(b"1" * 20), refs.owned(b"2" * 20)
    for value in ([one, two, 3], (one, two), [one, [two]], {"a": one, "b": [two, two]}):
        payload, contained = serialize.serialize(value, INLINE)
        assert contained == (b"1" * 20, b"2" * 20)
        assert isinstance(payload, bytes) and serialize.deserialize(payload) == value
    payload, contained = serialize.serialize([one, one], INLINE)
    assert contained == (b"1" * 20,)
    assert isinstance(payload, bytes) and serialize.deserialize(payload) == [one, one]


# -- errors ------------------------------------------------------------------------------------------------------


class Custom(Exception):
    def __init__(self, first: int, second: int) -> None:
        super().__init__("custom")
        self.first, self.second = first, second

    def __reduce__(self) -> tuple[Any, ...]:
        return Custom, (self.first, self.second)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"), KeyError("x"), FileNotFoundError(2, "gone", "/x"), StopIteration(4), Custom(1, 2),
        UnicodeDecodeError("utf8", b"x", 0, 1, "bad"), ExceptionGroup("g", [ValueError(1)]),
    ],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_a_task_error_is_of_its_causes_type(error: Exception) -> None:
    try:
        raise error
    except Exception as raised:
        told = describe_failure("f", raised, "here")
    told = pickle.loads(pickle.dumps(told))
    assert isinstance(told, exceptions.RayTaskError) and isinstance(told, type(error))
    assert type(told.cause) is type(error) and str(error) in str(told) and "raise error" in str(told)
    if isinstance(told, OSError):
        assert told.errno == 2 and told.filename == "/x"
    if isinstance(told, Custom):
        assert (told.first, told.second) == (1, 2)
    if isinstance(told, ExceptionGroup):
        with pytest.raises(ExceptionGroup) as caught:
            raise told
        assert caught.group_contains(ValueError)


def test_what_ends_processes_stays_a_plain_task_error() -> None:
    for error in (KeyboardInterrupt(), SystemExit(2)):
        told = describe_failure("f", error, "here")
        assert type(told) is exceptions.RayTaskError and told.cause is error


def test_rays_tree() -> None:
    assert issubclass(exceptions.GetTimeoutError, TimeoutError)
    assert issubclass(exceptions.ActorDiedError, exceptions.RayActorError)
    assert issubclass(exceptions.ObjectReconstructionFailedError, exceptions.ObjectLostError)
    for name in exceptions.__all__:
        assert issubclass(getattr(exceptions, name), exceptions.RayError)


# -- code and options ----------------------------------------------------------------------------------------------


def test_a_function_that_calls_itself_is_pickled_once() -> None:
    @trio_ray.remote
    def down(n: int) -> Any:
        return n if n == 0 else down.remote(n - 1)

    function = down._code.export()
    loaded = code.load(function)
    inner = loaded.__closure__[0].cell_contents
    assert isinstance(inner, trio_ray.RemoteFunction)
    assert inner._code.export() is function, "its name is known where it was unpickled"


def test_a_function_that_another_uses_travels_as_bytes() -> None:
    @trio_ray.remote
    def inner() -> int:
        return 1

    @trio_ray.remote
    def outer() -> Any:
        return inner.remote()

    loaded = code.load(outer._code.export())
    assert loaded.__closure__[0].cell_contents._code.export() == inner._code.export()


def test_shapes_and_policies() -> None:
    assert options.shape({}, 1) == (("CPU", 10_000),)
    assert options.shape({"num_cpus": 0.5, "resources": {"x": 2}}, 1) == (("CPU", 5_000), ("x", 20_000))
    assert options.shape({"num_cpus": 0}, 1) == ()
    assert options.policy({"scheduling_strategy": "SPREAD"}) == "spread" and options.policy({}) == ""
    with pytest.raises(ValueError, match="ten-thousandths"):
        options.check({"num_cpus": 0.00001}, options.TASK, "tasks")


def test_children_and_scopes_of_a_context_are_counted() -> None:
    class NoSession:
        pass

    task = context.TaskContext(NoSession(), b"t" * 16, b"s" * 8)  # type: ignore[arg-type]
    assert task.prefix == task.prefix and len(task.prefix) == 11
    assert [next(task.children) for _ in range(3)] == [0, 1, 2] and next(task.puts) == 0
    assert context.current_or_none() is None
