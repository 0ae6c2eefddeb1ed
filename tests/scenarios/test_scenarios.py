"""One program, two worlds: every scenario runs on a real cluster of three node processes and on a simulated one.

The same coroutines, the same functions, the same assertions; only ``world`` differs.
"""

import contextvars
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trio_ray
from trio_ray import exceptions, simulate

NODES, CPUS = 3, 2
SEAT = {"seat": 1}

Program = Callable[[trio_ray.Cluster], Awaitable[Any]]
World = Callable[[Program], Any]


def real(program: Program) -> Any:
    """Run it on node processes of this machine."""

    async def main() -> Any:
        with trio.fail_after(60):
            async with trio_ray.open_cluster(nodes=NODES, num_cpus=CPUS, resources=SEAT) as cluster:
                return await program(cluster)

    return trio.run(main)


def simulated(program: Program) -> Any:
    """Run it on a simulated cluster of the same shape."""
    return simulate.run(program, nodes=NODES, cpus=CPUS, resources={"seat": 1.0}).result


@pytest.fixture(params=[real, simulated])
def world(request: pytest.FixtureRequest) -> World:
    """Where a scenario runs."""
    run: World = request.param
    return run


@trio_ray.remote
def nothing() -> None:
    """An empty task."""


@trio_ray.remote
def add(*values: int) -> int:
    return sum(values)


@trio_ray.remote
def divide(x: float, y: float) -> float:
    return x / y


@trio_ray.remote
def tree(depth: int, width: int) -> int:
    """How many leaves a tree of tasks has, each of which waits for its children."""
    if depth == 0:
        return 1
    return sum(trio_ray.get([tree.remote(depth - 1, width) for _ in range(width)]))


@trio_ray.remote
class Counter:
    """Counts, and remembers the order of calls."""

    def __init__(self, start: int = 0) -> None:
        self.value = start
        self.calls: list[int] = []

    def add(self, amount: int = 1) -> int:
        self.value += amount
        self.calls.append(amount)
        return self.value

    def history(self) -> list[int]:
        return self.calls

    def fail(self) -> None:
        raise KeyError("no such count")


def test_ten_thousand_empty_tasks(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        assert await cluster.gather([nothing.remote() for _ in range(10_000)]) == [None] * 10_000

    world(program)


def test_a_chain_of_a_thousand(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        ref = add.remote(0)
        for _ in range(1_000):
            ref = add.remote(ref, 1)
        assert await ref == 1_000

    world(program)


def test_a_fan_in_of_a_hundred(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        assert await add.remote(*[add.remote(i) for i in range(100)]) == sum(range(100))

    world(program)


def test_recursion_with_more_tasks_than_cpus(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        assert await tree.remote(3, 4) == 64

    world(program)


def test_several_return_values(world: World) -> None:
    @trio_ray.remote(num_returns=3)
    def three() -> tuple[int, str, list[int]]:
        return 1, "two", [3]

    @trio_ray.remote(num_returns=2)
    def wrong() -> tuple[int, ...]:
        return 1, 2, 3

    async def program(cluster: trio_ray.Cluster) -> None:
        one, two, three_ = three.remote()
        assert await cluster.gather([one, two, three_]) == [1, "two", [3]]
        first, _ = wrong.remote()
        with pytest.raises(ValueError, match="3"):
            await first

    world(program)


def test_a_large_array_is_read_on_every_node(world: World) -> None:
    @trio_ray.remote(resources={"seat": 1}, num_cpus=0)
    def total(array: np.ndarray[Any, Any]) -> tuple[float, bool]:
        return float(array.sum()), array.flags.writeable

    async def program(cluster: trio_ray.Cluster) -> None:
        array = np.arange(2_000_000, dtype=np.float64)
        ref = await cluster.put(array)
        for result in await cluster.gather([total.remote(ref) for _ in range(6)]):
            assert result == (float(array.sum()), False)
        again = await ref
        assert np.array_equal(again, array)

    world(program)


def test_large_results_and_arguments_travel(world: World) -> None:
    @trio_ray.remote(num_cpus=0, resources={"seat": 1})
    def ones(size: int) -> np.ndarray[Any, Any]:
        return np.ones(size)

    @trio_ray.remote(num_cpus=0, resources={"seat": 1})
    def both(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> float:
        return float(left.sum() + right.sum())

    async def program(cluster: trio_ray.Cluster) -> None:
        refs = [ones.remote(100_000) for _ in range(4)]
        sums = [both.remote(refs[i], refs[(i + 1) % 4]) for i in range(4)]
        assert await cluster.gather(sums) == [200_000.0] * 4
        assert await both.remote(np.ones(50_000), refs[0]) == 150_000.0

    world(program)


def test_references_inside_values(world: World) -> None:
    @trio_ray.remote
    def inner(refs: dict[str, trio_ray.ObjectRef]) -> int:
        return int(trio_ray.get(refs["value"])) + 1

    @trio_ray.remote
    def make() -> list[trio_ray.ObjectRef]:
        return [add.remote(20, 2), trio_ray.put(20)]

    async def program(cluster: trio_ray.Cluster) -> None:
        ref = add.remote(40, 1)
        result = inner.remote({"value": ref})
        del ref  # the task keeps it alive
        assert await result == 42
        made = await make.remote()
        assert await cluster.gather(made) == [22, 20]

    world(program)


def test_two_thousand_calls_run_in_order(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        counter = Counter.remote()
        values = await cluster.gather([counter.add.remote() for _ in range(2_000)])
        assert values == list(range(1, 2_001))

    world(program)


def test_a_call_waits_for_its_argument_and_holds_back_the_next(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        counter = cluster.actor(Counter)
        slow = add.remote(tree.remote(2, 3), 0)
        counter.add.remote(slow)
        counter.add.remote(5)
        assert await counter.history.remote() == [9, 5]

    world(program)


def test_a_handle_can_be_passed_on(world: World) -> None:
    @trio_ray.remote
    def use(counter: Any, times: int) -> int:
        return int(trio_ray.get([counter.add.remote() for _ in range(times)])[-1])

    async def program(cluster: trio_ray.Cluster) -> None:
        counter = Counter.remote(100)
        await cluster.gather([use.remote(counter, 5) for _ in range(4)])
        assert await counter.add.remote(0) == 120

    world(program)


def test_a_named_actor_is_found(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        kept = Counter.options(name="tally").remote(7)
        assert await kept.add.remote() == 8
        assert await trio_ray.get_actor("tally").add.remote() == 9
        with pytest.raises(ValueError, match="nobody"):
            trio_ray.get_actor("nobody")

    world(program)


def test_errors_keep_their_type_and_show_where(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        with pytest.raises(ZeroDivisionError) as caught:
            await divide.remote(1, 0)
        assert isinstance(caught.value, exceptions.RayTaskError)
        assert "divide" in str(caught.value) and "test_scenarios.py" in str(caught.value)
        counter = Counter.remote()
        with pytest.raises(KeyError, match="no such count"):
            await counter.fail.remote()
        assert await counter.add.remote() == 1
        results = await cluster.gather([divide.remote(1, 0), add.remote(1)], return_exceptions=True)
        assert isinstance(results[0], ZeroDivisionError) and results[1] == 1

    world(program)


def test_a_failed_input_fails_what_depends_on_it(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        with pytest.raises(ZeroDivisionError):
            await add.remote(1, add.remote(2, divide.remote(1, 0)))

    world(program)


def test_a_failed_constructor_shows_in_the_calls(world: World) -> None:
    @trio_ray.remote
    class Broken:
        def __init__(self) -> None:
            raise OSError("no device")

        def work(self) -> int:
            return 1

    async def program(cluster: trio_ray.Cluster) -> None:
        broken = Broken.remote()
        with pytest.raises((exceptions.RayActorError, OSError)):
            await broken.work.remote()

    world(program)


def test_a_killed_actor_answers_no_more(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        counter = Counter.remote()
        assert await counter.add.remote() == 1
        trio_ray.kill(counter)
        with pytest.raises(exceptions.RayActorError):
            await counter.add.remote()

    world(program)


def test_exceptions_that_are_retried(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        attempts = Counter.remote()

        @trio_ray.remote(max_retries=5, retry_exceptions=[ConnectionError])
        def unsteady(counter: Any) -> int:
            attempt = int(trio_ray.get(counter.add.remote()))
            if attempt < 3:
                raise ConnectionError(f"attempt {attempt}")
            return attempt

        assert await unsteady.remote(attempts) == 3

    world(program)


@trio_ray.remote
class Gates:
    """Calls that wait until another call lets them through, so that no scenario depends on how fast anything is."""

    def __init__(self) -> None:
        self.opened = [trio.Event() for _ in range(5)]

    async def wait(self, number: int) -> int:
        await self.opened[number].wait()
        return number

    async def open(self, number: int) -> None:
        self.opened[number].set()


def test_waiting_for_some(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        gates = Gates.remote()
        refs = [gates.wait.remote(number) for number in range(5)]
        await cluster.gather([gates.open.remote(1), gates.open.remote(2)])
        ready, rest = await cluster.wait(refs, num_returns=2)
        assert ready == [refs[1], refs[2]] and rest == [refs[0], refs[3], refs[4]]
        ready, rest = await cluster.wait(rest, timeout=0.05)
        assert ready == [] and len(rest) == 3
        order = []
        await gates.open.remote(4)
        async for ref in cluster.as_completed([refs[3], refs[4]]):
            order.append(await ref)
            await gates.open.remote(3)
        assert order == [4, 3]
        await gates.open.remote(0)
        assert await refs[0] == 0

    world(program)


def test_awaiting_what_is_there_lets_others_run_and_can_be_cancelled(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        here = await cluster.put(1)
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                await trio.lowlevel.checkpoint()
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(take_turns)
            while turns < 3:  # for ever, if nobody else had a turn
                assert await here == 1
                assert await cluster.gather([here, here]) == [1, 1]
            with trio.CancelScope() as scope:
                await here
                scope.cancel()
                await here
                raise AssertionError("a cancelled task went on")
            assert scope.cancelled_caught
            nursery.cancel_scope.cancel()

    world(program)


def test_a_nursery_waits_for_its_tasks(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        async with cluster.open_nursery() as nursery:
            refs = [nursery.start_soon(add, i, 1) for i in range(8)]
        ready, rest = await cluster.wait(refs, num_returns=8, timeout=0)
        assert len(ready) == 8 and not rest
        assert await cluster.gather(refs) == list(range(1, 9))

    world(program)


@trio_ray.remote
async def sleep_long() -> None:
    await trio.sleep(1000)


def test_the_first_failure_cancels_the_rest(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        began = cluster.now()
        with pytest.raises(ExceptionGroup) as caught:
            async with cluster.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(sleep_long)
                nursery.start_soon(divide, 1, 0)
        assert caught.value.subgroup(ZeroDivisionError) is not None
        assert cluster.now() - began < 20

    world(program)


def test_a_cancelled_scope_reaches_the_tasks(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        began = cluster.now()
        with trio.move_on_after(0.3) as scope:
            async with cluster.open_nursery() as nursery:
                nursery.start_soon(sleep_long)
        assert scope.cancelled_caught
        assert cluster.now() - began < 20
        assert await add.remote(1, 2) == 3  # the cluster goes on

    world(program)


def test_a_deadline_is_inherited(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        with trio.fail_after(0.3):  # noqa: ASYNC100 - what is submitted inside inherits the deadline
            ref = sleep_long.remote()
        with pytest.raises(exceptions.TaskCancelledError):
            await ref

    world(program)


def test_what_no_node_has_is_a_sentence(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        with pytest.raises(exceptions.TaskUnschedulableError, match="unicorn"):
            await cluster.submit(add, 1, resources={"unicorn": 1})
        assert await add.remote(1) == 1

    world(program)


def test_fractions_of_resources(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        half = add.options(num_cpus=0, resources={"seat": 0.5})
        assert await cluster.gather([half.remote(i) for i in range(20)]) == list(range(20))
        assert (await cluster.resources())["seat"] == NODES
        assert len(await cluster.nodes()) == NODES

    world(program)


def test_async_actors_interleave(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        gates = Gates.remote()
        waiting = [gates.wait.remote(0) for _ in range(3)]
        await gates.open.remote(0)
        assert await cluster.gather(waiting) == [0] * 3

    world(program)


def test_a_coroutine_returns_a_large_array(world: World) -> None:
    @trio_ray.remote
    async def later(size: int) -> np.ndarray[Any, Any]:
        await trio.sleep(0.01)
        return np.ones(size)

    async def program(cluster: trio_ray.Cluster) -> None:
        arrays = await cluster.gather([later.remote(100_000) for _ in range(3)])
        assert [len(array) for array in arrays] == [100_000] * 3

    world(program)


def test_nurseries_within_tasks(world: World) -> None:
    @trio_ray.remote
    def plain() -> int:
        with trio_ray.task_scope() as scope:
            refs = [scope.start_soon(add, i, i) for i in range(4)]
        return int(sum(trio_ray.get(refs)))

    @trio_ray.remote
    async def coroutine() -> int:
        async with trio_ray.open_nursery() as nursery:
            refs = [nursery.start_soon(add, i, i) for i in range(4)]
        return int(sum([await ref for ref in refs]))

    async def program(cluster: trio_ray.Cluster) -> None:
        assert await plain.remote() == 12
        assert await coroutine.remote() == 12

    world(program)


def test_what_tasks_left_running_ends_with_their_nursery(world: World) -> None:
    @trio_ray.remote(num_cpus=0, resources=SEAT)
    def leaves_one(nested: bool) -> list[trio_ray.ObjectRef]:
        if nested:
            with trio_ray.task_scope() as scope:
                scope.start_soon(add, 1, 1)
        return [sleep_long.remote()]

    @trio_ray.remote
    class Leaves:
        def call(self) -> list[trio_ray.ObjectRef]:
            return [sleep_long.remote()]

    async def program(cluster: trio_ray.Cluster) -> None:
        actor = Leaves.remote()
        async with cluster.open_nursery() as nursery:
            refs = [nursery.start_soon(leaves_one, number % 2 == 0) for number in range(NODES)]
            refs.append(nursery.start_soon(actor.call))
        for ref in refs:
            [left] = await ref
            with pytest.raises(exceptions.TaskCancelledError):
                await left

    world(program)


@trio_ray.remote
class Background:
    """Starts something that goes on after the call."""

    def __init__(self) -> None:
        self.asked, self.done = trio.Event(), trio.Event()
        self.sum = 0

    async def begin(self) -> None:
        trio.lowlevel.spawn_system_task(self._add_when_asked, context=contextvars.copy_context())

    async def _add_when_asked(self) -> None:
        await self.asked.wait()
        self.sum = await add.remote(1, 2)
        self.done.set()

    async def result(self) -> int:
        self.asked.set()
        await self.done.wait()
        return self.sum


def test_what_an_actor_does_after_a_call_is_its_own(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        actor = Background.remote()
        async with cluster.open_nursery() as nursery:
            nursery.start_soon(actor.begin)
        assert await actor.result.remote() == 3

    world(program)


def test_an_argument_that_cannot_travel_is_named(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        with pytest.raises(TypeError, match="add"):
            add.remote(threading.Lock())
        assert await add.remote(1) == 1

    world(program)


def test_a_timeline_can_be_replayed(world: World, tmp_path: Path) -> None:
    file = str(tmp_path / "timeline.json")

    async def program(cluster: trio_ray.Cluster) -> None:
        await cluster.gather([add.remote(i) for i in range(20)])
        tasks: list[dict[str, Any]] = []
        with trio.fail_after(10):
            while len(tasks) < 20:  # nodes report what ran in batches
                await cluster.sleep(0.05)
                tasks = [event for event in await cluster.timeline(file) if event["ph"] == "X"]
        assert len(tasks) == 20 and all(task["dur"] >= 0 and task["ts"] >= 0 for task in tasks)

    world(program)
    assert len(simulate.recorded(file)["add"].durations_s) == 20


def test_the_clock_and_sleep(world: World) -> None:
    async def program(cluster: trio_ray.Cluster) -> None:
        began = cluster.now()
        await cluster.sleep(0.2)
        assert 0.199 <= cluster.now() - began < 5

    world(program)
