"""The Trio API on a real cluster of three nodes."""

import os
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

import trio_ray
from trio_ray import Cluster, exceptions
from trio_ray.runtime.transport import frames


@pytest.fixture
async def cluster() -> AsyncIterator[Cluster]:
    async with trio_ray.open_cluster(num_cpus=1, nodes=3) as cluster:
        yield cluster
    assert not trio_ray.is_initialized()


async def eventually(holds: Callable[[], bool], limit_s: float = 15.0) -> None:
    """Wait until something that happens in another process has."""
    with trio.fail_after(limit_s):
        while not holds():
            await trio.sleep(0.005)


@trio_ray.remote
def square(x: int) -> int:
    return x * x


@trio_ray.remote
def fail() -> None:
    raise ValueError("no good")


@trio_ray.remote(num_cpus=0)
def hang(mark: str) -> None:
    Path(mark).touch()
    time.sleep(600)


@trio_ray.remote(num_cpus=0)
def hang_below(mark: str) -> Any:
    return trio_ray.get(hang.remote(mark))


@trio_ray.remote
class Counter:
    def __init__(self) -> None:
        self.value = 0

    def add(self, amount: int) -> int:
        self.value += amount
        return self.value


async def test_submit_gather_put_and_actors(cluster: Cluster) -> None:
    assert await square.remote(3) == 9
    assert await cluster.submit(square, 4) == 16
    assert await cluster.submit(lambda x: x + 1, 4) == 5
    assert await cluster.submit(partial(square, 5), num_cpus=0.5) == 25
    refs = [cluster.submit(square, i) for i in range(50)]
    assert await cluster.gather(refs) == [i * i for i in range(50)]
    array = np.arange(200_000.0)
    ref = await cluster.put(array)
    assert (await ref == array).all()
    assert await cluster.gather([cluster.submit(lambda x, i: float(x[i]), ref, i) for i in range(6)]) == [
        float(i) for i in range(6)
    ]
    counter = cluster.actor(Counter)
    assert await cluster.gather([counter.add.remote(1) for _ in range(10)]) == list(range(1, 11))
    assert len(await cluster.nodes()) == 3 and (await cluster.resources())["CPU"] == 3.0


async def test_errors_and_partial_waits(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no good"):
        await fail.remote()
    slow = hang.remote(str(tmp_path / "slow"))
    with pytest.raises(ValueError, match="no good"):
        await cluster.gather([slow, fail.remote()])
    mixed = await cluster.gather([square.remote(1), fail.remote()], return_exceptions=True)
    assert mixed[0] == 1 and isinstance(mixed[1], ValueError)
    quick = square.remote(2)
    assert await cluster.wait([slow, quick], num_returns=1) == ([quick], [slow])
    assert await cluster.wait([slow], timeout=0.05) == ([], [slow])
    with trio.move_on_after(0.05) as scope:
        await slow
    assert scope.cancelled_caught
    done = [ref async for ref in cluster.as_completed([square.remote(i) for i in range(10)])]
    assert sorted(await cluster.gather(done)) == [i * i for i in range(10)]
    trio_ray.cancel(slow)
    with pytest.raises(exceptions.TaskCancelledError):
        await slow


async def test_a_nursery_waits_for_its_tasks(cluster: Cluster) -> None:
    async with cluster.open_nursery() as nursery:
        refs = [nursery.start_soon(square, i) for i in range(8)]
        nothing = nursery.start_soon(square, 1, num_returns=0)
    assert [await ref for ref in refs] == [i * i for i in range(8)] and await nothing == 1
    with pytest.raises(RuntimeError, match="closed"):
        nursery.start_soon(square, 1)


async def test_the_first_failure_cancels_the_rest(cluster: Cluster, tmp_path: Path) -> None:
    mark = tmp_path / "running"
    with pytest.raises(ExceptionGroup) as caught:
        async with cluster.open_nursery() as nursery:
            below = nursery.start_soon(hang_below, str(mark))
            await eventually(mark.exists)
            nursery.start_soon(fail)
            await trio.sleep_forever()
    assert caught.group_contains(ValueError, match="no good") and len(caught.value.exceptions) == 1
    with pytest.raises(exceptions.TaskCancelledError):
        await below
    assert await square.remote(2) == 4


async def test_an_exception_in_the_block_cancels_its_tasks(cluster: Cluster, tmp_path: Path) -> None:
    mark = tmp_path / "running"
    with pytest.raises(ExceptionGroup) as caught:
        async with cluster.open_nursery() as nursery:
            ref = nursery.start_soon(hang, str(mark))
            await eventually(mark.exists)
            raise KeyError("mine")
    assert caught.group_contains(KeyError) and len(caught.value.exceptions) == 1
    with pytest.raises(exceptions.TaskCancelledError):
        await ref


async def test_a_cancelled_trio_scope_cancels_remote_tasks(cluster: Cluster, tmp_path: Path) -> None:
    mark = tmp_path / "running"
    with trio.CancelScope() as scope:
        async with cluster.open_nursery() as nursery:
            ref = nursery.start_soon(hang, str(mark))
            await eventually(mark.exists)
            scope.cancel()
    assert scope.cancelled_caught
    with pytest.raises(exceptions.TaskCancelledError):
        await ref


async def test_deadlines_reach_the_tasks(cluster: Cluster, tmp_path: Path) -> None:
    mark = tmp_path / "running"
    with trio.move_on_after(0.5):
        ref = hang_below.remote(str(mark))
        await trio.lowlevel.checkpoint()
    with pytest.raises(exceptions.TaskCancelledError, match="cancelled"):
        await ref


@pytest.mark.parametrize("way", ["nursery", "await", "gather"])
async def test_a_deadline_that_the_cluster_notices_first_is_a_deadline_all_the_same(cluster: Cluster, way: str) -> None:
    @trio_ray.remote(num_cpus=0)
    async def sleep_long() -> None:
        await trio.sleep(600)

    async def hold_up_trio() -> None:
        await trio.sleep(0.1)
        time.sleep(1.0)  # noqa: ASYNC251 - meanwhile the deadline passes, and the task is cancelled and reported

    async with trio.open_nursery() as nursery:
        nursery.start_soon(hold_up_trio)
        with trio.move_on_after(0.3) as scope:
            if way == "nursery":
                async with cluster.open_nursery() as tasks:
                    tasks.start_soon(sleep_long)
            elif way == "await":
                await sleep_long.remote()
            else:
                await cluster.gather([sleep_long.remote() for _ in range(2)])
    assert scope.cancelled_caught


async def test_a_nursery_ends_with_the_worker_in_which_it_is_open(cluster: Cluster, tmp_path: Path) -> None:
    @trio_ray.remote(num_cpus=0)
    async def beat(mark: Path) -> None:
        while True:
            await trio.Path(mark).write_text(str(time.monotonic()))
            await trio.sleep(0.01)

    @trio_ray.remote(num_cpus=0, max_retries=0)
    async def opens(mark: Path) -> None:
        async with trio_ray.open_nursery() as nursery:
            nursery.start_soon(beat, mark)
            while not await trio.Path(mark).exists():
                await trio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)

    mark = tmp_path / "beat"
    with pytest.raises(exceptions.WorkerCrashedError):
        await opens.remote(mark)
    now = time.monotonic
    await eventually(lambda: now() - float(mark.read_text() or now()) > 0.5)


async def test_another_cluster_is_refused_meanwhile(cluster: Cluster) -> None:
    with pytest.raises(RuntimeError, match="already"):
        async with trio_ray.open_cluster():
            raise AssertionError("not reached")


async def test_a_thread_that_submits_without_end_does_not_keep_trio_from_running(cluster: Cluster) -> None:
    stop = threading.Event()

    def submit_on() -> None:
        while not stop.is_set():
            square.remote(1)

    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, submit_on)
            try:
                for number in range(20):
                    assert await square.remote(number) == number * number
            finally:
                stop.set()


async def test_what_no_frame_can_carry_is_an_error_for_who_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    large = bytes(1 << 20)

    def holds_much() -> int:
        return len(large)

    async with trio_ray.open_cluster(num_cpus=1) as cluster:
        monkeypatch.setattr(frames, "MAX_CONTROL_BYTES", 1 << 16)
        with trio.fail_after(10) as limit, pytest.raises(exceptions.RaySystemError, match="larger than a frame"):
            await cluster.submit(holds_much)
        assert not limit.cancel_called, "it was told only when the deadline woke Trio"
