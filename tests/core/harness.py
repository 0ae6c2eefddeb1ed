"""A whole cluster of machines in one process: no sockets, no clock but the harness's own, every step validated.

Messages between two addresses stay in order; ``run`` delivers until nothing is left to do. Workers are played by the
harness: ``behave`` says what a task does.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec

from trio_ray.runtime.core import ids
from trio_ray.runtime.core.control.store import ControlMachine
from trio_ray.runtime.core.effects import (
    AnyEffect,
    CancelTimer,
    CloseWindow,
    OpenWindow,
    Send,
    SendBytes,
    SetTimer,
    StartWorker,
    StopWorker,
)
from trio_ray.runtime.core.machine import (
    AnyEvent,
    BytesSent,
    PeerLost,
    ProcessConnected,
    ProcessLost,
    Received,
    TimerFired,
    WindowFilled,
)
from trio_ray.runtime.core.messages import (
    PLACEMENT,
    Address,
    AnyMessage,
    CreateObject,
    Function,
    Interrupt,
    NodeInfo,
    ObjectCreated,
    Output,
    ReturnTasks,
    RunTasks,
    Status,
    SubmitTasks,
    TakeBack,
    TaskResult,
    TasksDone,
    Unpin,
    Value,
    Where,
    control_address,
    node_of,
)
from trio_ray.runtime.core.node import NodeConfig, NodeMachine
from trio_ray.runtime.core.scheduling.placement import PlacementMachine
from trio_ray.runtime.core.scheduling.policies import load
from trio_ray.runtime.core.spec import Kind, TaskSpec, TaskTemplate, resources

CPU1 = resources({"CPU": 1})


def template(name: str, **options: Any) -> TaskTemplate:
    """A template with defaults; ``num_cpus`` 1, one return value, no retries."""
    shape = resources({"CPU": options.pop("num_cpus", 1), **options.pop("resources", {})})
    return TaskTemplate(
        ids.content_id(f"{name}{sorted(options.items())}{shape}".encode()),
        ids.content_id(name.encode()),
        name,
        options.pop("kind", Kind.TASK),
        options.pop("held", shape),
        shape,
        options.pop("num_returns", 1),
        options.pop("max_retries", 0),
        **options,
    )


class Worker:
    """A played worker: it holds what it was given until the harness lets it run."""

    def __init__(self, process: Address) -> None:
        self.process = process
        self.queue: deque[TaskSpec] = deque()
        self.inputs: dict[bytes, Value] = {}


class Driver:
    """A played driver: submits specs and remembers what it is told."""

    def __init__(self, harness: Harness, node: Address, number: int) -> None:
        self.harness = harness
        self.node = node
        self.process = f"{node}/{number}"
        self.task_id = ids.root_task_id(self.process)
        self.prefix = ids.children_prefix(self.task_id)
        self.scope = ids.job_scope(self.process)
        self.count = 0
        self.values: dict[bytes, Value] = {}
        self.inbox: list[AnyMessage] = []

    def spec(self, of: TaskTemplate, *inputs: bytes, **fields: Any) -> TaskSpec:
        self.count += 1
        return TaskSpec(
            ids.child_task_id(self.prefix, self.count), of.template_id, fields.pop("args", b""), inputs,
            fields.pop("borrowed", ()), fields.pop("scope", self.scope), self.process, **fields,
        )  # fmt: skip

    def submit(self, *specs: TaskSpec, templates: list[TaskTemplate]) -> list[bytes]:
        """Returns the id of the first result of each."""
        functions = [Function(t.function_id, t.name, b"f") for t in templates]
        self.send(SubmitTasks(list(specs), templates, functions))
        return [ids.return_id(spec.task_id, 0) for spec in specs]

    def send(self, message: AnyMessage) -> None:
        self.harness.deliver(self.node, Received(self.process, message))


Behave = Callable[[Worker, TaskSpec], TaskResult | None]


class Harness:
    """``nodes`` node machines, a placement machine and control-store shards."""

    def __init__(
        self, nodes: int = 1, cpus: float = 2, shards: int = 1, store_bytes: int = 1 << 20, policy: str = "bottom-up",
        extra: dict[int, dict[str, float]] | None = None,
    ) -> None:  # fmt: skip
        self.now = 0.0
        self.machines: dict[Address, Any] = {}
        self.inbox: dict[Address, deque[AnyEvent]] = {}
        self.timers: list[tuple[float, int, Address, str]] = []
        self.timer_at: dict[tuple[Address, str], float] = {}
        self.sequence = 0
        self.workers: dict[Address, Worker] = {}
        self.drivers: dict[Address, Driver] = {}
        self.processes: dict[Address, int] = {}
        self.windows: dict[tuple[Address, int], OpenWindow] = {}
        self.behave: Behave = lambda worker, spec: ok(spec)
        self.hold = False
        """While true, workers keep what they are given."""
        self.log: list[tuple[Address, AnyEffect]] = []
        self.dead: set[Address] = set()
        self.deaf: set[Address] = set()
        """Workers that do not hear an interrupt."""
        self.templates: dict[bytes, TaskTemplate] = {}
        for shard in range(shards):
            self.add(control_address(shard), ControlMachine(shard, shards))
        self.add(PLACEMENT, PlacementMachine(load(policy), shards=shards, rng=random.Random(0)))
        for index in range(nodes):
            amounts = {"CPU": cpus, **(extra or {}).get(index, {})}
            info = NodeInfo(f"n:{index}", "", resources(amounts), store_bytes=store_bytes)
            config = NodeConfig()
            machine = NodeMachine(
                info, head_shards=shards, config=config, policy=policy, rng=random.Random(index), load_policy=load
            )
            self.add(info.node, machine)
        self.run()

    def add(self, address: Address, machine: Any) -> None:
        self.machines[address] = machine
        self.inbox[address] = deque()
        self.carry_out(address, machine.start(self.now))

    def driver(self, node: int = 0) -> Driver:
        address = f"n:{node}"
        self.processes[address] = number = self.processes.get(address, 0) + 1
        driver = Driver(self, address, number)
        self.drivers[driver.process] = driver
        self.deliver(address, ProcessConnected(driver.process, "driver", 1))
        self.run()
        return driver

    def deliver(self, to: Address, event: AnyEvent) -> None:
        if to in self.inbox and to not in self.dead:
            # On the wire and back: a message must survive it, and nothing may be shared between machines.
            self.inbox[to].append(msgspec.msgpack.decode(msgspec.msgpack.encode(event), type=type(event)))

    def carry_out(self, source: Address, effects: list[AnyEffect]) -> None:
        for effect in effects:
            self.log.append((source, effect))
            if isinstance(effect, Send):
                self.send(source, effect.to, effect.message)
            elif isinstance(effect, SetTimer):
                self.sequence += 1
                self.timer_at[source, effect.key] = effect.at
                heapq.heappush(self.timers, (effect.at, self.sequence, source, effect.key))
            elif isinstance(effect, CancelTimer):
                self.timer_at.pop((source, effect.key), None)
            elif isinstance(effect, StartWorker):
                self.processes[source] = number = self.processes.get(source, 0) + 1
                process = f"{source}/{number}"
                self.workers[process] = Worker(process)
                self.deliver(source, ProcessConnected(process, "worker", 100 + number, effect.number))
            elif isinstance(effect, StopWorker):
                self.kill(effect.process, "killed by SIGKILL" if effect.kill else "")
            elif isinstance(effect, OpenWindow):
                self.windows[source, effect.transfer] = effect
            elif isinstance(effect, CloseWindow):
                self.windows.pop((source, effect.transfer), None)
            elif isinstance(effect, SendBytes):
                if (effect.to, effect.transfer) in self.windows:
                    assert self.windows.pop((effect.to, effect.transfer)).size == effect.size
                    self.deliver(effect.to, WindowFilled(effect.transfer))
                self.deliver(source, BytesSent(effect.transfer, effect.to))

    def send(self, source: Address, to: Address, message: AnyMessage) -> None:
        if "/" in to and to in self.workers:
            worker = self.workers[to]
            if isinstance(message, RunTasks):
                worker.queue.extend(message.specs)
                worker.inputs.update((value.object_id, value) for value in message.inputs)
                self.templates.update((t.template_id, t) for t in message.templates)
            elif isinstance(message, TakeBack):
                back = [spec.task_id for spec in list(worker.queue)[1:] if spec.task_id in message.task_ids]
                worker.queue = deque(spec for spec in worker.queue if spec.task_id not in back)
                self.deliver(source, Received(to, ReturnTasks(back)))
                self._unpin_if_idle(worker)
            elif isinstance(message, Interrupt) and to not in self.deaf:
                hit = [spec for spec in worker.queue if spec.task_id in message.task_ids]
                worker.queue = deque(spec for spec in worker.queue if spec.task_id not in message.task_ids)
                results = [TaskResult(spec.task_id, Status.CANCELLED, ()) for spec in hit]
                self.deliver(source, Received(to, TasksDone(results)))
                self._unpin_if_idle(worker)
        elif to in self.drivers:
            self.drivers[to].inbox.append(message)
            for value in getattr(message, "values", ()):
                self.drivers[to].values[value.object_id] = value
        elif "/" not in to or to.startswith("control/"):
            self.deliver(to, Received(source, message))

    def _unpin_if_idle(self, worker: Worker) -> None:
        """A worker that is to run nothing any more has no use for what it was to read."""
        if not worker.queue:
            shared = [value.object_id for value in worker.inputs.values() if value.where == Where.SHARED]
            worker.inputs.clear()
            if shared:
                self.deliver(node_of(worker.process), Received(worker.process, Unpin(shared)))

    def lose_node(self, node: Address) -> None:
        """A whole node is gone; the others learn of it when their links to it break."""
        self.dead.add(node)
        for process in [*self.workers, *self.drivers]:
            if node_of(process) == node:
                self.workers.pop(process, None)
                self.drivers.pop(process, None)
        for address in self.machines:
            self.deliver(address, PeerLost(node, "killed"))
        self.run()

    def kill(self, process: Address, reason: str) -> None:
        self.workers.pop(process, None)
        self.drivers.pop(process, None)
        self.deliver(node_of(process), ProcessLost(process, reason))

    def step(self) -> bool:
        """One round: every machine takes in what waits for it, then every worker runs what it has."""
        busy = False
        for address, inbox in self.inbox.items():
            if inbox and address not in self.dead:
                busy = True
                events = list(inbox)
                inbox.clear()
                machine = self.machines[address]
                effects = machine.step(events, self.now)
                machine.validate()
                self.carry_out(address, effects)
        if not self.hold:
            for worker in list(self.workers.values()):
                results = []
                while worker.queue:
                    spec = worker.queue[0]
                    result = self.behave(worker, spec)
                    if worker.process not in self.workers or result is None:
                        break
                    worker.queue.popleft()
                    results.append(result)
                if results:
                    busy = True
                    self.deliver(node_of(worker.process), Received(worker.process, TasksDone(results)))
        return busy

    def run(self) -> None:
        """Until nothing is left to do now."""
        for _ in range(10_000):
            if not self.step():
                return
        raise AssertionError("the cluster does not come to rest")

    def advance(self, seconds: float) -> None:
        """Let time pass, firing timers in order."""
        end = self.now + seconds
        self.run()
        while self.timers and self.timers[0][0] <= end:
            at, _, address, key = heapq.heappop(self.timers)
            if self.timer_at.get((address, key)) == at:
                del self.timer_at[address, key]
                self.now = max(self.now, at)
                self.deliver(address, TimerFired(key))
                self.run()
        self.now = end


def ok(spec: TaskSpec, *payloads: bytes, duration_s: float = 1e-5, contained: tuple[bytes, ...] = ()) -> TaskResult:
    """A task ended well."""
    outputs = tuple(Output(payload, contained=contained) for payload in payloads or (b"\x00N.",))
    return TaskResult(spec.task_id, Status.OK, outputs, 1.0, duration_s)


def kind_of(payload: bytes) -> str:
    """The class of a system error."""
    assert payload[:1] == b"\x03"
    return str(msgspec.msgpack.decode(payload[1:])[0])


def sent(harness: Harness, kind: type) -> list[object]:
    """All messages of a kind that were sent so far."""
    return [effect.message for _, effect in harness.log if isinstance(getattr(effect, "message", None), kind)]


def big(harness: Harness, worker: Worker, spec: TaskSpec, size: int) -> TaskResult:
    """The worker writes a large result into its node's arena."""
    node = worker.process.split("/")[0]
    object_id = ids.return_id(spec.task_id, 0)
    machine = harness.machines[node]
    effects = machine.step([Received(worker.process, CreateObject(object_id, size))], harness.now)
    offset = next(e.message.offset for e in effects if isinstance(getattr(e, "message", None), ObjectCreated))
    harness.carry_out(node, [e for e in effects if not isinstance(getattr(e, "message", None), ObjectCreated)])
    return TaskResult(spec.task_id, Status.OK, (Output(b"", offset, size),), 1.0, 1.0)
