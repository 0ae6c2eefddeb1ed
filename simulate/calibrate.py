"""Measuring what the control plane costs on this machine, for the profile that simulations charge CPU time from.

The machines are pure, so their cost can be measured without processes: small programs run on a simulated cluster whose
engine times every step (``measure_machines``), with events of one kind of message at a time, and the messages they
exchange are encoded and decoded as the wire does (part of the same). What processes and sockets add is measured on a
real cluster by ``experiments.calibration``, which puts both together.

For each kind of message, time is fitted by ``fixed + item * items`` over batches of one to a thousand items, each
batch size by its median, in relative error: so that small and large batches count alike.
"""

import gc
import os
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import numpy as np

from trio_ray.runtime.api import context
from trio_ray.runtime.api.actors import make_actor_class
from trio_ray.runtime.api.refs import ObjectRef
from trio_ray.runtime.api.remote import make_remote_function
from trio_ray.runtime.core.effects import AnyEffect
from trio_ray.runtime.core.machine import AnyEvent, Machine, Received, TimerFired
from trio_ray.runtime.core.messages import Address, AnyMessage
from trio_ray.runtime.core.node import NodeConfig, NodeMachine
from trio_ray.simulate.cluster import ClusterSpec
from trio_ray.simulate.costs import TaskCosts
from trio_ray.simulate.engine import Engine, Frame
from trio_ray.simulate.facts import facts_of
from trio_ray.simulate.functions import SimulatedSession
from trio_ray.simulate.profile import KindCost, Profile
from trio_ray.simulate.world import World

REPEATS = 5
BATCHES = (1, 4, 16, 64, 256, 1024)
SAMPLES_PER_SIZE = 3
"""Messages of one kind and size kept for timing the wire."""
EMPTY_STEPS = 2_000
BACKGROUND_S = 1.0
"""Simulated time for what nodes say behind: lineage, events, heartbeats."""


class Timings:
    """What was seen: seconds of steps by kind and size, and messages to encode."""

    def __init__(self) -> None:
        self.steps: dict[type, dict[tuple[int, int], list[float]]] = {}
        """By kind, then by messages and items of a step."""
        self.messages: dict[type, dict[int, list[AnyMessage]]] = {}


class TimedEngine(Engine):
    """Times every step, with the events of one kind of message at a time."""

    timings: Timings

    def step(self, address: Address, machine: Machine, events: list[AnyEvent], now: float) -> list[AnyEffect]:
        """The same as the base's, in as many steps as there are kinds in a row."""
        effects: list[AnyEffect] = []
        start = 0
        while start < len(events):
            kind = _kind(events[start])
            end = start + 1
            while end < len(events) and _kind(events[end]) is kind:
                end += 1
            batch = events[start:end]
            began = time.perf_counter()
            effects += machine.step(batch, now)
            took = time.perf_counter() - began
            if kind is not None:
                self._note(kind, batch, took)
            start = end
        return effects

    def weigh(self, frame: Frame, source: Address, to: Address, message: AnyMessage) -> None:
        """The same as the base's; keeps a few messages of each kind and size."""
        kept = self.timings.messages.setdefault(type(message), {}).setdefault(facts_of(message)[0], [])
        if len(kept) < SAMPLES_PER_SIZE:
            kept.append(message)
        super().weigh(frame, source, to, message)

    def _note(self, kind: type, batch: list[AnyEvent], took: float) -> None:
        items = 0
        for event in batch:
            assert isinstance(event, Received)
            items += facts_of(event.message)[0]
        self.timings.steps.setdefault(kind, {}).setdefault((len(batch), items), []).append(took)


def _kind(event: AnyEvent) -> type | None:
    return type(event.message) if type(event) is Received else None


def measure_machines(progress: Callable[[float], None] = lambda part: None) -> Profile:
    """A profile with the costs of machine steps and of the wire measured on this machine, the rest at its defaults.

    Takes some ten seconds of one CPU. ``progress`` is told the part that is done.
    """
    runs: list[tuple[dict[str, KindCost], float]] = []
    collecting = gc.isenabled()
    for repeat in range(REPEATS):
        timings = Timings()
        gc.collect()
        gc.disable()
        try:
            for nodes in (1, 3):
                _exercise(nodes, timings)
            step_s = _empty_step()
            kinds = {
                kind.__name__: _fit_kind(timings.steps.get(kind, {}), messages, step_s)
                for kind, messages in timings.messages.items()
            }
        finally:
            if collecting:
                gc.enable()
        runs.append((kinds, step_s))
        progress((repeat + 1) / REPEATS)
    names = sorted({name for kinds, _ in runs for name in kinds})
    fields = KindCost.__struct_fields__
    middle = {}
    spread = {"step_s": spread_of([step_s for _, step_s in runs])}
    for name in names:
        found = [kinds[name] for kinds, _ in runs if name in kinds]
        middle[name] = KindCost(**{field: median(getattr(cost, field) for cost in found) for field in fields})
        spread[name] = spread_of([cost.step_message_s + cost.step_item_s + cost.encode_message_s for cost in found])
    return Profile(
        step_s=median(step_s for _, step_s in runs), kinds=middle, machine=machine_facts(), spread=spread,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )  # fmt: skip


def machine_facts() -> dict[str, str]:
    """Which machine and which versions these are."""
    model = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    model = line.partition(":")[2].strip()
                    break
    except OSError:
        pass
    return {
        "processor": model,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "msgspec": msgspec.__version__,
    }


def spread_of(values: Sequence[float]) -> float:
    """Interquartile range over median."""
    low, mid, high = np.percentile(values, (25, 50, 75))
    return round(float((high - low) / mid), 4) if mid else 0.0


# -- programs that make every kind of message, in small and large batches -------------------------------------------


def _exercise(nodes: int, timings: Timings) -> None:
    def make_engine(*args: Any, **options: Any) -> Engine:
        engine = TimedEngine(*args, **options)
        engine.timings = timings
        return engine

    costs = TaskCosts({_slow: 4 * NodeConfig().write_behind_s}, 0.0, seed=0)
    world = World(
        ClusterSpec.uniform(nodes, 4), costs, profile=Profile(), policy="bottom-up", seed=0, network="simple",
        engine=make_engine,
    )  # fmt: skip
    world.engine.boot()
    session = world.connect_driver()
    token = context.running.set(session.root)
    with world.bound():
        try:
            for count in BATCHES:
                for program in (_tasks, _with_inputs, _nested, _lineage, _actor_calls, _values):
                    program(session, count)
            _objects(session)
            world.engine.env.run(until=world.engine.now + BACKGROUND_S)
        finally:
            context.running.reset(token)
            world.close()


def _get(session: SimulatedSession, wanted: list[ObjectRef]) -> list[Any]:
    session.link.wait(wanted, len(wanted), None, fetch=True)
    return session.read_all(wanted, return_exceptions=False)


def _tasks(session: SimulatedSession, count: int) -> None:
    """A batch of empty tasks; and as many of a millisecond, which spread over the nodes."""
    _get(session, [_empty.remote() for _ in range(count)])


def _with_inputs(session: SimulatedSession, count: int) -> None:
    first = [_identity.remote(index) for index in range(count)]
    _get(session, [_identity.remote(ref) for ref in first])


def _nested(session: SimulatedSession, count: int) -> None:
    """References inside values: borrowed, counted, handed on."""
    inner = _identity.remote(1)
    _get(session, [_length.remote([inner]) for _ in range(min(count, 64))])


def _lineage(session: SimulatedSession, count: int) -> None:
    """Tasks that are not done yet when lineage is written behind."""
    _get(session, [_slow.remote() for _ in range(count)])


def _actor_calls(session: SimulatedSession, count: int) -> None:
    actor = _Counter.remote()
    _get(session, [actor.add.remote() for _ in range(count)])


def _values(session: SimulatedSession, count: int) -> None:
    stored = [session.put(session.root, index) for index in range(count)]
    session.link.flush()
    _get(session, stored)


def _objects(session: SimulatedSession) -> None:
    """Objects of the store, moved between nodes."""
    for _ in range(8):
        stored = session.put(session.root, bytes(200_000))
        _get(session, [_length_elsewhere.remote(stored) for _ in range(16)])
        _get(session, [_large.remote() for _ in range(4)])


_empty = make_remote_function(lambda: None, {"name": "empty"})
_slow = make_remote_function(lambda: None, {"name": "slow"})
_identity = make_remote_function(lambda value: value, {"name": "identity"})
_length = make_remote_function(lambda value: len(value), {"name": "length"})
_length_elsewhere = make_remote_function(lambda value: len(value), {"name": "length", "scheduling_strategy": "SPREAD"})
_large = make_remote_function(lambda: bytes(200_000), {"name": "large", "scheduling_strategy": "SPREAD"})


class _Count:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        """One more."""
        self.count += 1
        return self.count


_Counter = make_actor_class(_Count, {})


# -- fitting -----------------------------------------------------------------------------------------------------


def _empty_step() -> float:
    """A step in which nothing happens but a timer."""
    world = World(
        ClusterSpec.uniform(1, 1), TaskCosts({}, 0.0, seed=0), profile=Profile(), policy="bottom-up", seed=0,
        network="instant",
    )  # fmt: skip
    world.engine.boot()
    host = world.engine.hosts[0]
    machine = host.machines[host.node]
    assert isinstance(machine, NodeMachine)
    events = [TimerFired("balance")]
    now = world.engine.now
    times = []
    for _ in range(EMPTY_STEPS):
        began = time.perf_counter()
        machine.step(events, now)
        times.append(time.perf_counter() - began)
    world.close()
    return median(times)


def _fit_kind(
    steps: dict[tuple[int, int], list[float]], messages: dict[int, list[AnyMessage]], step_s: float
) -> KindCost:  # fmt: skip
    rows = [(count, items, max(0.0, median(times) - step_s)) for (count, items), times in steps.items()]
    fixed, item = _fit(rows)
    encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(list[AnyMessage])
    encoding, decoding, sizes = [], [], []
    for items, samples in messages.items():
        for message in samples:
            payload = facts_of(message)[2]
            data = encoder.encode([message])
            encoding.append((1, items, _time(partial(encoder.encode, [message]))))
            decoding.append((1, items, _time(partial(decoder.decode, data))))
            sizes.append((1, items, float(max(1, len(data) - payload))))
    encode_message, encode_item = _fit(encoding)
    decode_message, decode_item = _fit(decoding)
    message_bytes, item_bytes = _fit(sizes)
    return KindCost(
        step_message_s=fixed, step_item_s=item, encode_message_s=encode_message, encode_item_s=encode_item,
        decode_message_s=decode_message, decode_item_s=decode_item, message_bytes=message_bytes, item_bytes=item_bytes,
    )  # fmt: skip


def _time(call: Callable[[], object]) -> float:
    """Seconds of one call: the best of three runs of several."""
    rounds = 20
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        for _ in range(rounds):
            call()
        best = min(best, time.perf_counter() - began)
    return best / rounds


def _fit(rows: Sequence[tuple[int, int, float]]) -> tuple[float, float]:
    """``a`` and ``b``, neither negative, such that ``a * messages + b * items`` comes near the third figure of each
    row, in least squares of the relative error."""
    if not rows:
        return 0.0, 0.0
    table = np.array(rows, dtype=float)
    table = table[table[:, 2] > 0]
    if not len(table):
        return 0.0, 0.0
    x = table[:, :2] / table[:, 2:]
    ones = np.ones(len(table))
    both = np.linalg.lstsq(x, ones, rcond=None)[0] if np.linalg.matrix_rank(x) == 2 else np.array([-1.0, -1.0])
    if both.min() >= 0:
        return float(both[0]), float(both[1])
    # One of them alone, whichever fits better.
    candidates = []
    for column in (0, 1):
        denominator = float(x[:, column] @ x[:, column])
        only = float(x[:, column].sum()) / denominator if denominator else 0.0
        candidates.append((float(((x[:, column] * only - 1) ** 2).sum()), column, only))
    _, column, only = min(candidates)
    return (only, 0.0) if column == 0 else (0.0, only)
