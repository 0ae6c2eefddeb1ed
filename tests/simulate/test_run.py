"""Programs on simulated clusters: time, costs, cancellation, actors, transfers, reports."""

import json
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from trio_ray import simulate
from trio_ray.runtime.api import context
from trio_ray.runtime.api.actors import make_actor_class
from trio_ray.runtime.api.cluster import Cluster
from trio_ray.runtime.api.errors import TaskCancelledError, TaskUnschedulableError
from trio_ray.runtime.api.remote import make_remote_function

FREE: dict[str, Any] = {"profile": simulate.free_profile(), "network": "instant"}
"""Nothing but the tasks takes time."""


def get(refs: list[Any]) -> list[Any]:
    """What ``trio_ray.get`` is to a task."""
    session = context.current().session
    session.link.wait(refs, len(refs), None, fetch=True)
    return session.read_all(refs, return_exceptions=False)


def square(x: int) -> int:
    return x * x


def total(*values: float) -> float:
    return sum(values)


def fail(sentence: str) -> None:
    raise ValueError(sentence)


def zeros(size: int) -> np.ndarray[Any, Any]:
    return np.zeros(size, dtype=np.uint8)


def length(value: np.ndarray[Any, Any]) -> int:
    return len(value)


def fibonacci(n: int) -> int:
    if n < 2:
        return n
    return sum(get([remote_fibonacci.remote(n - 1), remote_fibonacci.remote(n - 2)]))


remote_fibonacci = make_remote_function(fibonacci, {})


class Counter:
    """An actor."""

    def __init__(self, start: int = 0) -> None:
        self.count = start
        self.order: list[int] = []

    def add(self, amount: int) -> int:
        """Keep the order of calls."""
        self.count += amount
        self.order.append(amount)
        return self.count

    def seen(self) -> list[int]:
        """Amounts in the order of their calls."""
        return self.order


remote_counter = make_actor_class(Counter, {})


async def sleeper(seconds: float) -> float:
    await trio.sleep(seconds)
    return seconds


def test_tasks_take_their_cost_on_as_many_cpus_as_there_are() -> None:
    async def main(cluster: Cluster) -> list[int]:
        return await cluster.gather([cluster.submit(square, i) for i in range(8)])

    report = simulate.run(main, cpus=4, costs={square: 0.5}, **FREE)
    assert report.result == [i * i for i in range(8)]
    assert report.makespan_s == pytest.approx(1.0)
    assert report.tasks == 8 and report.failed == 0
    assert report.utilisation["CPU"] == pytest.approx(1.0)
    assert report.throughput_per_s == pytest.approx(8.0)


def test_a_profile_makes_the_control_plane_cost_something() -> None:
    async def main(cluster: Cluster) -> None:
        await cluster.gather([cluster.submit(square, i) for i in range(200)])

    free = simulate.run(main, nodes=2, cpus=2, **FREE)
    real = simulate.run(main, nodes=2, cpus=2)
    assert free.makespan_s == 0.0
    assert 0.001 < real.makespan_s < 1.0
    assert 0.0 < real.node_process_busy["head"] <= 1.0


@pytest.mark.parametrize(
    "cost",
    [0.25, lambda rng: 0.25, simulate.Samples([0.25]), simulate.model(0.25, result=7), simulate.uniform(0.25, 0.25)],
    ids=["seconds", "callable", "samples", "model", "distribution"],
)
def test_every_kind_of_cost(cost: Any) -> None:
    async def main(cluster: Cluster) -> int:
        return int(await cluster.submit(square, 3))

    report = simulate.run(main, costs={square: cost}, **FREE)
    assert report.makespan_s == pytest.approx(0.25)
    assert report.result == (7 if isinstance(cost, type(simulate.model())) else 9)


def test_costs_by_name_and_the_default() -> None:
    async def main(cluster: Cluster) -> None:
        await cluster.submit(square, 3)
        await cluster.submit(length, b"x")

    report = simulate.run(main, costs={"square": 1.0, "sqare": 5.0}, default_cost=0.5, **FREE)
    assert report.makespan_s == pytest.approx(1.5)
    assert report.unused_costs == ["sqare"] and "sqare" in str(report)


def test_a_plain_function_that_waits_gives_its_cpu_away() -> None:
    async def main(cluster: Cluster) -> int:
        return int(await remote_fibonacci.remote(8))

    report = simulate.run(main, cpus=1, costs={fibonacci: 0.01}, **FREE)
    assert report.result == 21
    assert report.tasks == 67
    assert report.makespan_s <= 0.67 + 1e-9  # those that wait hold no CPU, so the 67 need no longer than in a row


def test_no_thread_is_left_over() -> None:
    def waits_for_ever() -> None:
        get([make_remote_function(sleeper, {}).remote(1e9)])

    async def main(cluster: Cluster) -> None:
        cluster.submit(waits_for_ever)
        await trio.sleep(1)

    before = threading.active_count()
    simulate.run(main, cpus=2)
    assert threading.active_count() == before


def test_async_tasks_sleep_on_simulated_time() -> None:
    async def main(cluster: Cluster) -> list[float]:
        return await cluster.gather([cluster.submit(sleeper, s) for s in (100.0, 50.0)])

    report = simulate.run(main, cpus=2, **FREE)
    assert report.result == [100.0, 50.0]
    assert report.makespan_s == pytest.approx(100.0)


def test_a_coroutine_may_block() -> None:
    async def blocks() -> int:
        session = context.current().session
        ref = session.put(context.current(), zeros(500_000))
        return int(get([make_remote_function(length, {}).remote(ref)])[0])

    async def main(cluster: Cluster) -> int:
        return int(await cluster.submit(blocks))

    assert simulate.run(main, cpus=1).result == 500_000


def test_the_clocks_agree() -> None:
    async def main(cluster: Cluster) -> None:
        began = cluster.now()
        await cluster.sleep(5)
        with trio.move_on_after(7):
            await trio.sleep_forever()
        assert cluster.now() == began + 12
        assert trio.current_time() == cluster.now()

    assert simulate.run(main, **FREE).makespan_s == pytest.approx(12)


def test_a_deadline_reaches_the_task() -> None:
    async def main(cluster: Cluster) -> None:
        began = cluster.now()
        with pytest.raises(trio.TooSlowError), trio.fail_after(2):
            await cluster.submit(square, 1)
        assert cluster.now() == pytest.approx(began + 2)
        with trio.fail_after(2):  # noqa: ASYNC100 - what is submitted inside inherits the deadline
            ref = cluster.submit(square, 2)
        with pytest.raises(TaskCancelledError):
            await ref
        assert cluster.now() < began + 4.5

    simulate.run(main, costs={square: 1000.0})


def test_a_failure_in_a_nursery_cancels_its_siblings() -> None:
    async def main(cluster: Cluster) -> None:
        began = cluster.now()
        with pytest.raises(ExceptionGroup) as caught:
            async with cluster.open_nursery() as nursery:
                nursery.start_soon(sleeper, 1000.0)
                nursery.start_soon(square, 3)
                nursery.start_soon(fail, "no such thing")
        (error,) = caught.value.exceptions
        assert isinstance(error, ValueError) and "no such thing" in str(error)
        assert cluster.now() < began + 100

    simulate.run(main, cpus=4, costs={square: 1000.0})


def test_cancelling_around_a_nursery_ends_its_tasks() -> None:
    async def main(cluster: Cluster) -> None:
        with trio.move_on_after(1) as scope:
            async with cluster.open_nursery() as nursery:
                for _ in range(4):
                    nursery.start_soon(square, 3)
        assert scope.cancelled_caught
        assert cluster.now() < 10

    simulate.run(main, cpus=2, costs={square: 1000.0})


def test_errors_carry_the_users_frames_only() -> None:
    async def main(cluster: Cluster) -> str:
        with pytest.raises(ValueError) as caught:
            await cluster.submit(fail, "broken")
        return str(caught.value)

    text = simulate.run(main).result
    assert "broken" in text and "test_run.py" in text
    assert "simulate/worker.py" not in text


def test_actors_keep_their_state_and_order() -> None:
    async def main(cluster: Cluster) -> None:
        counter = cluster.actor(remote_counter, 10)
        assert await cluster.gather([counter.add.remote(i) for i in range(50)]) == list(np.cumsum(range(50)) + 10)
        assert await counter.seen.remote() == list(range(50))
        other = remote_counter.remote()
        assert await other.add.remote(1) == 1

    report = simulate.run(main, nodes=3, cpus=2, costs={"Counter.add": 0.001})
    assert report.tasks == 54
    assert report.makespan_s > 0.05


def test_a_method_that_only_computes() -> None:
    class Doubler:
        def double(self, x: int) -> int:
            return 2 * x

    async def main(cluster: Cluster) -> int:
        return int(await cluster.actor(Doubler).double.remote(4))

    assert simulate.run(main).result == 8


def test_a_modelled_actor_needs_no_object() -> None:
    async def main(cluster: Cluster) -> list[Any]:
        counter = remote_counter.remote()
        return await cluster.gather([counter.add.remote(1) for _ in range(3)])

    costs = {remote_counter: simulate.model(0.5), "Counter.add": simulate.model(1.0, result=5)}
    report = simulate.run(main, costs=costs, **FREE)
    assert report.result == [5, 5, 5]
    assert report.makespan_s == pytest.approx(3.5)
    with pytest.raises(simulate.CostError, match=r"'Counter\.add' that is a model"):
        simulate.run(main, costs={remote_counter: simulate.model(0.5)}, **FREE)


def test_an_object_takes_latency_and_size_over_bandwidth() -> None:
    async def main(cluster: Cluster) -> float:
        there = make_remote_function(zeros, {"resources": {"a": 1}})
        here = make_remote_function(length, {"resources": {"b": 1}})
        ref = there.remote(10_000_000)
        await cluster.wait([ref])
        began = cluster.now()
        assert await here.remote(ref) == 10_000_000
        return cluster.now() - began

    groups = tuple(
        simulate.NodeGroup(cpus=2, resources=own, latency_s=0.25, bandwidth_bytes_per_s=1e7)
        for own in ({}, {"a": 1.0}, {"b": 1.0})
    )
    report = simulate.run(main, cluster=simulate.ClusterSpec(groups=groups), profile=simulate.free_profile())
    assert report.transfers == 1 and 10_000_000 <= report.bytes_moved < 10_001_000
    # The bytes themselves: 0.25 + 1.0 s. Besides, messages there and back, each of 0.25 s.
    assert report.result == pytest.approx(1.25, abs=1.6)
    assert report.result > 1.25


def test_a_modelled_result_counts_at_its_declared_size() -> None:
    async def main(cluster: Cluster) -> None:
        there = make_remote_function(zeros, {"resources": {"a": 1}})
        here = make_remote_function(length, {"resources": {"b": 1}})
        await cluster.gather([here.remote(there.remote(1)) for _ in range(3)])

    groups = tuple(simulate.NodeGroup(cpus=2, resources=own) for own in ({"a": 1.0}, {"b": 1.0}))
    costs = {zeros: simulate.model(0.1, result=b"small", size_bytes=50_000_000), length: simulate.model(0.1)}
    report = simulate.run(main, cluster=simulate.ClusterSpec(groups=groups), costs=costs)
    assert report.bytes_moved == 150_000_000


def test_a_task_that_no_node_can_run_is_an_error() -> None:
    async def main(cluster: Cluster) -> None:
        with pytest.raises(TaskUnschedulableError, match="unicorn"):
            await cluster.submit(square, 1, resources={"unicorn": 1})

    simulate.run(main, nodes=2)


def test_a_program_that_waits_for_ever_is_told_so() -> None:
    async def main(cluster: Cluster) -> None:
        await trio.Event().wait()

    with pytest.raises(simulate.SimulationError, match="cannot come any more"):
        simulate.run(main, nodes=2)


def test_what_the_program_raises_comes_out() -> None:
    async def main(cluster: Cluster) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        simulate.run(main)


def test_a_bad_cost_comes_out() -> None:
    async def main(cluster: Cluster) -> None:
        await cluster.submit(square, 1)

    with pytest.raises(simulate.CostError, match=r"square is -1\.0"):
        simulate.run(main, costs={square: lambda rng: -1.0})


async def test_not_within_another_trio_loop() -> None:
    async def main(cluster: Cluster) -> int:
        return int(await cluster.submit(square, 3))

    with pytest.raises(simulate.SimulationError, match=r"to_thread\.run_sync"):
        simulate.run(main)
    report = await trio.to_thread.run_sync(lambda: simulate.run(main))
    assert report.result == 9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"network": "telepathy"}, "telepathy"),
        ({"policy": "astrology"}, "astrology"),
        ({"nodes": 0}, "nodes"),
        ({"profile": "/nonexistent/profile.json"}, "profile"),
        ({"cluster": "nowhere.toml"}, "nowhere.toml"),
        ({"resources": {"x": -1.0}}, "'x'"),
    ],
)
def test_arguments_that_cannot_be(options: dict[str, Any], said: str) -> None:
    async def main(cluster: Cluster) -> None:
        raise AssertionError("not reached")

    with pytest.raises(ValueError, match=said):
        simulate.run(main, **options)


def test_the_report_can_be_read_saved_and_drawn(tmp_path: Path) -> None:
    async def main(cluster: Cluster) -> None:
        await cluster.gather([cluster.submit(square, i) for i in range(20)])

    report = simulate.run(main, nodes=2, cpus=2, costs={square: simulate.exponential(0.1)}, seed=3)
    text = str(report)
    for word in ("makespan", "20", "utilisation", "CPU", "placement", report.event_log_hash):
        assert word in text
    plain = json.loads(report.to_json())
    assert plain["tasks"] == 20 and plain["seed"] == 3 and "runs" not in plain
    assert sum(plain["placement"].values()) == 20
    assert sum(plain["tasks_by_node"].values()) == 20
    assert set(report.latency_s) == {"mean", "p50", "p90", "p95", "p99", "max"}
    trace = tmp_path / "trace.json"
    report.chrome_trace(trace)
    tasks = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    assert len(tasks) == 20
    durations = simulate.recorded(trace)["square"].durations_s
    assert len(durations) == 20 and sum(durations) == pytest.approx(report.utilisation["CPU"] * 4 * report.makespan_s)
    picture = tmp_path / "report.png"
    report.plot(picture)
    assert picture.stat().st_size > 1000


def test_a_thousand_nodes() -> None:
    async def main(cluster: Cluster) -> int:
        return sum(await cluster.gather([cluster.submit(square, 1) for _ in range(5000)]))

    report = simulate.run(main, nodes=1000, cpus=4, costs={square: 1.0}, shards=8, spread_shards=True, policy="spread")
    assert report.result == 5000
    assert len(report.tasks_by_node) > 900
    assert report.makespan_s < 4.0
