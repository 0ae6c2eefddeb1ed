"""The synchronous API on a real cluster of one node."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trio_ray as ray
from tests.runtime.processes import eventually
from trio_ray import exceptions
from trio_ray.runtime.api.context import current


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with ray.init(num_cpus=2, resources={"lamp": 1}):
        yield
    assert not ray.is_initialized()


@ray.remote
def square(x: int) -> int:
    return x * x


@ray.remote
def add(*xs: int, extra: int = 0) -> int:
    return sum(xs) + extra


@ray.remote
def fail(kind: str = "value") -> None:
    if kind == "value":
        raise ValueError("no good")
    raise FileNotFoundError(2, "gone", "/there")


@ray.remote
def sleep(seconds: float, mark: str = "") -> None:
    if mark:
        Path(mark).touch()
    time.sleep(seconds)


@ray.remote
class Counter:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, amount: int = 1) -> int:
        self.value += amount
        return self.value

    def fail(self) -> None:
        raise KeyError("missing")

    def pid(self) -> int:
        return os.getpid()

    @ray.method(num_returns=2)
    def pair(self) -> tuple[int, int]:
        return self.value, -self.value


def test_values_and_references_as_arguments() -> None:
    assert ray.get(square.remote(3)) == 9
    two, three = square.remote(2), ray.put(3)
    assert ray.get(add.remote(two, three, 1, extra=square.remote(10))) == 108
    assert ray.get(add.remote(two, two)) == 8


def test_nested_references_stay_references() -> None:
    @ray.remote
    def look(refs: list[ray.ObjectRef]) -> int:
        assert all(isinstance(ref, ray.ObjectRef) for ref in refs)
        return sum(ray.get(refs))

    assert ray.get(look.remote([square.remote(1), square.remote(2)])) == 5

    @ray.remote
    def give() -> list[ray.ObjectRef]:
        return [square.remote(3)]

    assert ray.get(ray.get(give.remote())[0]) == 9


def test_closures_lambdas_and_recursion() -> None:
    base = 10
    assert ray.get(ray.remote(lambda x: x + base).remote(1)) == 11

    @ray.remote
    def fibonacci(n: int) -> int:
        return n if n < 2 else sum(ray.get([fibonacci.remote(n - 1), fibonacci.remote(n - 2)]))

    assert ray.get(fibonacci.remote(7)) == 13, "many more blocked tasks than CPUs"


def test_several_and_no_returns() -> None:
    @ray.remote(num_returns=3)
    def three() -> list[int]:
        return [1, 2, 3]

    assert ray.get(three.remote()) == [1, 2, 3]
    assert three.options(num_returns=0).remote() is None
    with pytest.raises(ValueError, match="returned 3"):
        ray.get(three.options(num_returns=2).remote())


def test_large_values_are_read_in_place() -> None:
    array = np.arange(1_000_000.0)
    ref = ray.put(array)
    back = ray.get(ref)
    assert (back == array).all() and not back.flags.writeable
    again = ray.get(ref)
    assert again.__array_interface__["data"] == back.__array_interface__["data"], "the same memory"

    @ray.remote
    def double(x: Any) -> Any:
        assert not x.flags.writeable
        return x * 2

    doubled = ray.get(double.remote(ref))
    assert (doubled == array * 2).all()
    assert float(ray.get(ray.remote(lambda x: x.sum()).remote(array))) == float(array.sum()), "a large argument"
    view = back[10:20]
    del ref, back, again
    assert view.tolist() == list(range(10, 20))


def test_the_store_is_freed_with_the_references() -> None:
    def used() -> int:
        import msgspec


        return int(msgspec.msgpack.decode(current().session.link.ask("node"))["store_used"])

    eventually(lambda: used() == 0)
    ref = ray.put(np.zeros(500_000))
    value = ray.get(ref)
    assert used() > 0
    del ref
    assert used() > 0, "a view is still in use"
    del value
    eventually(lambda: used() == 0)


def test_small_arrays_and_odd_values() -> None:
    assert ray.get(ray.put(np.arange(3))).tolist() == [0, 1, 2]
    for value in (None, b"", "x", {"a": [1.5]}, {1, 2}, b"x" * 300_000, bytearray(200_000)):
        assert ray.get(ray.put(value)) == value


def test_errors_are_of_the_users_type_and_show_where() -> None:
    with pytest.raises(ValueError, match="no good") as caught:
        ray.get(fail.remote())
    error = caught.value
    assert isinstance(error, exceptions.RayTaskError) and isinstance(error.cause, ValueError)
    text = str(error)
    assert "in fail" in text and 'raise ValueError("no good")' in text and "runtime/worker" not in text
    with pytest.raises(FileNotFoundError) as missing:
        ray.get(fail.remote("file"))
    assert missing.value.errno == 2
    with pytest.raises(ValueError, match="no good"):
        ray.get(add.remote(1, fail.remote()))
    assert isinstance(ray.get(fail.remote(), return_exceptions=True), ValueError)


def test_an_error_passes_through_the_tasks_that_wait_for_it() -> None:
    @ray.remote
    def outer() -> None:
        ray.get(fail.remote())

    with pytest.raises(ValueError) as caught:
        ray.get(outer.remote())
    text = str(caught.value)
    assert text.index("in fail") < text.index("in outer")


def test_get_raises_the_first_error_without_waiting_for_the_rest() -> None:
    slow = sleep.remote(60)
    with pytest.raises(ValueError, match="no good"):
        ray.get([slow, fail.remote()])
    mixed = ray.get([square.remote(2), fail.remote()], return_exceptions=True)
    assert mixed[0] == 4 and isinstance(mixed[1], ValueError)
    ray.cancel(slow)


def test_timeouts() -> None:
    slow = sleep.remote(60)
    with pytest.raises(exceptions.GetTimeoutError):
        ray.get(slow, timeout=0.05)
    with pytest.raises(TimeoutError):
        ray.get([slow], timeout=0)
    ready, rest = ray.wait([slow], timeout=0)
    assert (ready, rest) == ([], [slow])
    ray.cancel(slow)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(slow)


def test_wait_keeps_the_order_and_limits() -> None:
    refs = [square.remote(i) for i in range(5)]
    ready, rest = ray.wait(refs, num_returns=5)
    assert ready == refs and rest == []
    ready, rest = ray.wait(refs, num_returns=2)
    assert ready == refs[:2] and rest == refs[2:]
    slow = sleep.remote(60)
    ready, rest = ray.wait([slow, fail.remote()], num_returns=2, return_when="first_error")
    assert rest == [slow]
    ray.cancel(slow)
    for wrong, kind in (([], ValueError), ([refs[0], refs[0]], ValueError), ([1], TypeError), (refs[0], TypeError)):
        with pytest.raises(kind):
            ray.wait(wrong)  # type: ignore[arg-type]


def test_wait_looks_through_a_list_that_was_changed_since_wait_left_it() -> None:
    slow = sleep.remote(60)
    refs = [square.remote(i) for i in range(3)]
    _, rest = ray.wait([refs[0], slow, refs[1], refs[2]], num_returns=3)
    assert rest == [slow]
    rest += [refs[0], 1, slow]  # type: ignore[list-item]
    with pytest.raises(TypeError, match="1"):
        ray.wait(rest)
    _, rest = ray.wait([slow, *refs, sleep.remote(0)])
    rest[1] = rest[0]  # its length and its ends are as wait left them
    with pytest.raises(ValueError, match="twice"):
        ray.wait(rest, num_returns=3, timeout=60)
    ray.cancel(slow)
    _, nothing = ray.wait(refs, num_returns=3)
    with pytest.raises(ValueError, match="empty"):
        ray.wait(nothing)


def test_a_large_object_of_ones_own_is_there_for_wait() -> None:
    large, small = ray.put(np.zeros(1_000_000)), ray.put(1)
    assert ray.wait([large], timeout=0) == ([large], [])
    ready, rest = ray.wait([large, small])
    assert ready == [large] and rest == [small]
    first, second = ray.put(np.zeros(1_000_000)), ray.put(np.zeros(1_000_000))
    _, rest = ray.wait([small, first, second])
    assert ray.wait(rest, timeout=0) == ([first], [second])


def test_what_is_no_reference_is_refused() -> None:
    with pytest.raises(ValueError, match="ObjectRef"):
        ray.get(3)  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="ObjectRef"):
        ray.get([3])  # type: ignore[list-item]
    with pytest.raises(TypeError, match="ObjectRef"):
        ray.put(square.remote(1))
    with pytest.raises(TypeError, match=r"square\.remote"):
        square(1)
    with pytest.raises(TypeError, match="cancel"):
        ray.cancel(1)  # type: ignore[arg-type]


def test_what_cannot_be_pickled_is_named() -> None:
    with pytest.raises(TypeError, match=r"argument.*square.*number 1.*lock"):
        square.options(name="square").remote(1, threading.Lock())
    lock = threading.Lock()
    with pytest.raises(TypeError, match="could not serialize"):
        ray.remote(lambda: lock).remote()
    with pytest.raises(TypeError, match="return value"):
        ray.get(ray.remote(lambda: threading.Lock()).remote())
    assert ray.get(square.remote(2)) == 4, "the cluster goes on"


def test_actors_keep_state_and_order() -> None:
    counter = Counter.remote(10)
    assert ray.get([counter.add.remote() for _ in range(100)]) == list(range(11, 111))
    first, second = counter.pair.remote()
    assert ray.get([first, second]) == [110, -110]
    with pytest.raises(KeyError) as caught:
        ray.get(counter.fail.remote())
    assert caught.value.args == ("missing",)
    assert ray.get(counter.add.remote(0)) == 110


def test_handles_travel() -> None:
    counter = Counter.remote()

    @ray.remote
    def use(handles: list[Any], times: int) -> int:
        return max(ray.get([handles[0].add.remote() for _ in range(times)]))

    assert ray.get(use.remote([counter], 5)) == 5
    assert ray.get(counter.add.remote()) == 6


def test_an_actor_ends_with_its_last_handle() -> None:
    counter = Counter.remote()
    pid = ray.get(counter.pid.remote())
    late = counter.add.remote()
    del counter
    assert ray.get(late) == 1, "calls made before are answered"
    eventually(lambda: not Path(f"/proc/{pid}").exists())


def test_killed_and_failed_actors_say_so() -> None:
    counter = Counter.remote()
    ray.get(counter.add.remote())
    ray.kill(counter)
    with pytest.raises(exceptions.ActorDiedError):
        ray.get(counter.add.remote())

    @ray.remote
    class Broken:
        def __init__(self) -> None:
            raise OSError("no such thing")

        def method(self) -> None: ...

    with pytest.raises(exceptions.ActorDiedError):
        ray.get(Broken.remote().method.remote())


def test_a_crash_is_retried_then_told() -> None:
    @ray.remote(max_retries=0)
    def crash() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(exceptions.WorkerCrashedError, match=r"crash.*SIGKILL"):
        ray.get(crash.remote())

    @ray.remote
    def crash_once(mark: str) -> str:
        path = Path(mark)
        if not path.exists():
            path.touch()
            os._exit(3)
        return "survived"

    mark = f"/tmp/trio-ray-test-{os.getpid()}"
    try:
        assert ray.get(crash_once.remote(mark)) == "survived"
    finally:
        Path(mark).unlink()


def test_exceptions_can_be_retried(tmp_path: Path) -> None:
    def flaky(folder: str, kind: type[Exception]) -> int:
        tries = len(list(Path(folder).iterdir()))
        (Path(folder) / str(tries)).touch()
        if tries < 2:
            raise kind("not yet")
        return tries

    assert ray.get(ray.remote(retry_exceptions=[ValueError])(flaky).remote(str(tmp_path), ValueError)) == 2
    with pytest.raises(KeyError):
        other = tmp_path / "other"
        other.mkdir()
        ray.get(ray.remote(retry_exceptions=[ValueError])(flaky).remote(str(other), KeyError))


def test_a_running_task_is_interrupted(tmp_path: Path) -> None:
    mark = tmp_path / "running"

    @ray.remote
    def loop(mark: str) -> None:
        Path(mark).touch()
        while True:
            pass

    ref = loop.remote(str(mark))
    eventually(mark.exists)
    ray.cancel(ref)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(ref, timeout=10)
    assert ray.get([square.remote(i) for i in range(10)]) == [i * i for i in range(10)]


def test_task_scopes_cancel_what_is_left(tmp_path: Path) -> None:
    with ray.task_scope() as scope:
        refs = [scope.start_soon(square, i) for i in range(4)]
    assert ray.get(refs) == [0, 1, 4, 9]
    with pytest.raises(ExceptionGroup) as caught, ray.task_scope() as scope:
        slow = scope.start_soon(sleep, 60)
        scope.start_soon(fail)
    assert caught.group_contains(ValueError)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(slow)


def test_threads_share_the_connection() -> None:
    results: list[int] = []

    def work(base: int) -> None:
        for i in range(20):
            results.append(ray.get(square.remote(base + i)))

    threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(results) == sorted((100 * n + i) ** 2 for n in range(4) for i in range(20))


def test_futures_complete_by_themselves() -> None:
    assert square.remote(5).future().result(timeout=10) == 25
    with pytest.raises(ValueError, match="no good"):
        fail.remote().future().result(timeout=10)


def test_options_are_checked_where_they_are_declared() -> None:
    with pytest.raises(ValueError, match=r"'num_cpu'.*num_cpus"):
        ray.remote(num_cpu=1)(lambda: None)
    with pytest.raises(ValueError, match="zero or more"):
        square.options(num_cpus=-1)
    with pytest.raises(TypeError, match="max_retries"):
        square.options(max_retries="many")
    with pytest.raises(ValueError, match="num_cpus"):
        square.options(resources={"CPU": 1})
    with pytest.raises(ValueError, match="actor classes"):
        Counter.options(num_returns=2)
    with pytest.raises(TypeError):
        ray.remote(3)


def test_what_no_node_has_is_refused() -> None:
    with pytest.raises(exceptions.TaskUnschedulableError, match="unicorn"):
        ray.get(square.options(resources={"unicorn": 1}).remote(1), timeout=20)
    assert ray.get(square.options(resources={"lamp": 0.5}, num_cpus=0.25).remote(2)) == 4


def test_threaded_actors_run_calls_at_the_same_time() -> None:
    @ray.remote(max_concurrency=2)
    class Meeting:
        def __init__(self) -> None:
            self.barrier = threading.Barrier(2, timeout=20)

        def meet(self) -> int:
            return self.barrier.wait()

    meeting = Meeting.remote()
    assert sorted(ray.get([meeting.meet.remote(), meeting.meet.remote()])) == [0, 1]


def test_async_actors_and_tasks() -> None:
    @ray.remote
    class Bell:
        def __init__(self) -> None:
            import trio

            self.event = trio.Event()

        async def wait(self) -> str:
            await self.event.wait()
            return "rung"

        def ring(self) -> None:
            self.event.set()

        async def ask(self, x: int) -> int:
            value: int = await square.remote(x)
            return value

    bell = Bell.remote()
    waiting = bell.wait.remote()
    assert ray.wait([waiting], timeout=0.05) == ([], [waiting])
    ray.get(bell.ring.remote())
    assert ray.get(waiting) == "rung"
    assert ray.get([bell.ask.remote(i) for i in range(10)]) == [i * i for i in range(10)]

    @ray.remote
    async def outer(n: int) -> int:
        async with ray.open_nursery() as nursery:
            refs = [nursery.start_soon(square, i) for i in range(n)]
        return sum([await ref for ref in refs])

    assert ray.get(outer.remote(5)) == 30


def test_calls_of_an_async_actor_begin_in_order_and_end_apart() -> None:
    @ray.remote(max_concurrency=3)
    class Desk:
        def __init__(self) -> None:
            self.begun: list[int] = []
            self.doors: dict[int, Any] = {}

        async def visit(self, number: int, *, wait: bool) -> int:
            import trio

            self.begun.append(number)
            if wait:
                self.doors[number] = trio.Event()
                await self.doors[number].wait()
            return number

        async def fail(self) -> None:
            raise ValueError("closed")

        def look(self) -> list[int]:
            return self.begun

        def open(self, number: int) -> None:
            self.doors[number].set()

    desk = Desk.remote()
    first, second, third = (desk.visit.remote(number, wait=number != 1) for number in range(3))
    assert ray.get(second) == 1
    assert ray.get(desk.look.remote()) == [0, 1, 2]
    ray.cancel(first)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(first)
    failed = desk.fail.remote()
    with pytest.raises(ValueError, match="closed"):
        ray.get(failed)
    assert ray.wait([third], timeout=0) == ([], [third])
    desk.open.remote(2)
    assert ray.get([third, *(desk.visit.remote(n, wait=False) for n in range(3, 300))]) == list(range(2, 300))
    assert ray.get(desk.look.remote()) == list(range(300))


def test_a_cancelled_call_whose_cleaning_up_fails_leaves_its_actor_alive() -> None:
    @ray.remote
    class Pool:
        async def swim(self, mark: Any) -> None:
            import trio

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                try:
                    mark.release.remote()
                    await trio.sleep_forever()
                finally:
                    raise KeyError("a towel")

        async def depth(self) -> int:
            return 3

    class Mark:
        def __init__(self) -> None:
            self.event = threading.Event()

        def release(self) -> None:
            self.event.set()

        def acquire(self) -> bool:
            return self.event.wait(20)

    pool, mark = Pool.remote(), ray.remote(max_concurrency=2)(Mark).remote()
    swim = pool.swim.remote(mark)
    assert ray.get(mark.acquire.remote())
    ray.cancel(swim)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(swim)
    assert ray.get(pool.depth.remote()) == 3


@pytest.mark.parametrize("how", ["block", "block_in_coroutine"])
def test_a_method_that_holds_up_an_async_actor_does_not_hold_back_results(tmp_path: Path, how: str) -> None:
    @ray.remote
    class Mixed:
        async def quick(self) -> int:
            return 1

        def block(self, until: Path) -> bool:
            time.sleep(0.002)  # so that it is known to block, also where it need not
            while not until.exists():
                time.sleep(0.001)
            return True

        async def block_in_coroutine(self, until: Path) -> bool:
            return self.block(until)

    mixed = Mixed.options(max_concurrency=4).remote()
    assert ray.get(mixed.quick.remote()) == 1
    for number in range(2):  # the first time nobody knows how long it takes
        until = tmp_path / f"until {number}"
        quick, blocked = [mixed.quick.remote() for _ in range(20)], getattr(mixed, how).remote(until)
        assert ray.get(quick, timeout=60) == [1] * 20
        until.touch()
        assert ray.get(blocked)


def test_an_async_task_is_cancelled(tmp_path: Path) -> None:
    mark = tmp_path / "running"

    @ray.remote
    async def forever(mark: str) -> None:
        import trio

        await trio.Path(mark).touch()
        await trio.sleep_forever()

    ref = forever.remote(str(mark))
    eventually(mark.exists)
    ray.cancel(ref)
    with pytest.raises(exceptions.TaskCancelledError):
        ray.get(ref, timeout=10)


def test_named_actors() -> None:
    counter = Counter.options(name="shared").remote(5)
    ray.get(counter.add.remote())
    assert ray.get(ray.get_actor("shared").add.remote()) == 7
    with pytest.raises(ValueError, match="shared"):
        Counter.options(name="shared").remote()
    same = Counter.options(name="shared", get_if_exists=True).remote()
    assert ray.get(same.add.remote()) == 8

    @ray.remote
    def elsewhere() -> int:
        return int(ray.get(ray.get_actor("shared").add.remote()))

    assert ray.get(elsewhere.remote()) == 9
    with pytest.raises(ValueError, match="nobody"):
        ray.get_actor("nobody")


def test_a_second_init_is_refused() -> None:
    with pytest.raises(RuntimeError, match="already"):
        ray.init()
    assert ray.init(ignore_reinit_error=True)["address"]


def test_views_of_the_cluster() -> None:
    assert ray.cluster_resources() == {"CPU": 2.0, "lamp": 1.0}
    (node,) = ray.nodes()
    assert node["Alive"] and node["Resources"]["CPU"] == 2.0
    eventually(lambda: ray.available_resources().get("lamp") == 1.0)


def test_references_can_be_awaited_under_asyncio() -> None:
    import asyncio

    async def main() -> list[int]:
        return list(await asyncio.gather(*[square.remote(i) for i in range(5)]))

    assert asyncio.run(main()) == [0, 1, 4, 9, 16]


def test_an_exception_that_cannot_travel_leaves_its_text() -> None:
    @ray.remote
    def odd() -> None:
        class Odd(Exception):
            def __init__(self, first: int, second: int) -> None:
                super().__init__("an odd one")
                self.lock = threading.Lock()

        raise Odd(1, 2)

    with pytest.raises(exceptions.RayTaskError, match="an odd one") as caught:
        ray.get(odd.remote())
    assert caught.value.cause is None


def test_a_task_may_start_processes_of_its_own() -> None:
    @ray.remote
    def spread() -> list[int]:
        import multiprocessing

        with multiprocessing.get_context("fork").Pool(2) as pool:
            return pool.map(abs, [-1, -2, -3])

    assert ray.get(spread.remote()) == [1, 2, 3]
    assert ray.get(square.remote(3)) == 9


def test_a_task_that_exits_says_so() -> None:
    @ray.remote(max_retries=0)
    def leave() -> None:
        raise SystemExit(4)

    with pytest.raises(exceptions.RayTaskError, match="SystemExit: 4"):
        ray.get(leave.remote())


def test_many_small_objects_and_one_that_holds_them() -> None:
    refs = [ray.put(i) for i in range(2000)]
    holder = ray.put(refs)
    del refs
    back = ray.get(holder)
    del holder
    assert ray.get(back) == list(range(2000))


def test_tasks_are_cancelled_at_whatever_moment() -> None:
    @ray.remote(max_retries=0)
    async def forever() -> None:
        import trio

        await trio.sleep_forever()

    @ray.remote(max_retries=0)
    def loop() -> None:
        while True:
            pass

    for function in (forever, loop):
        for steps in range(20):
            ref = function.remote()
            ray.wait([ref], timeout=0.0005 * steps)
            ray.cancel(ref)
            with pytest.raises(exceptions.TaskCancelledError):
                ray.get(ref, timeout=20)


def test_an_error_lets_go_of_what_it_was_read_from() -> None:
    """Without the help of the cycle collector, which may not run for long."""
    import gc

    session = current().session
    gc.collect()
    gc.disable()
    try:
        for what in (lambda: ray.get(fail.remote()), lambda: ray.get([square.remote(1), fail.remote()])):
            session.link.flush()
            before = dict(session.core.counts)
            with pytest.raises(ValueError, match="no good"):
                what()
            session.link.flush()
            assert session.core.counts == before
    finally:
        gc.enable()
