"""The SimPy shell: hosts the very machines of a real cluster on modelled processes, links and workers.

Each simulated node process is one SimPy process. It takes all that has arrived, hands it to its machines
(``step(events, now)``), keeps its CPU busy for as long as that costs by the profile, and then carries the effects out.
What arrives meanwhile waits for the next round, as it would in a socket's buffer, so that batches grow under load as
they do in reality. The messages travel as they are, unencoded; what encoding and sending them costs is charged.

Nothing is decided here. A frame (all messages of one step for one destination) is one SimPy event, however many tasks
it carries, so that SimPy's share stays small.
"""

from collections.abc import Callable, Generator
from random import Random
from typing import Any, Protocol

import simpy

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
    Machine,
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
    AssignTasks,
    ForgetTasks,
    Heartbeat,
    HoldObjects,
    HoldsCounted,
    LogEvents,
    LogTasks,
    NodeInfo,
    ObjectsChanged,
    SubmitTasks,
    TasksDone,
    control_address,
)
from trio_ray.runtime.core.node import NodeConfig, NodeMachine
from trio_ray.runtime.core.scheduling.placement import PlacementMachine
from trio_ray.runtime.core.scheduling.policies import load
from trio_ray.simulate.cluster import ClusterSpec, NodeGroup
from trio_ray.simulate.facts import FACTS, facts_of
from trio_ray.simulate.history import History
from trio_ray.simulate.meter import Meter
from trio_ray.simulate.network import after, make_network
from trio_ray.simulate.profile import Profile

BACKGROUND = frozenset({Heartbeat, LogEvents, LogTasks, ForgetTasks, HoldObjects, HoldsCounted, ObjectsChanged})
"""What nodes also say when nothing goes on: it is no sign of progress. Never iterated."""

QUIET_S = 0.05
"""A cluster has come up when every worker is there and nothing but the background has been said for so long, plus
what the slowest links need for a few round trips."""
FIRST_MOMENT = 1.0
"""When simulated time begins: not at zero, which messages use for times that are not known."""


STUCK_S = 30.0
"""Without progress for so long, with no task running and no timer of the program's, nothing will come any more."""


class SimulationError(RuntimeError):
    """The simulation cannot go on; the sentence says why."""


class Process(Protocol):
    """A simulated driver or worker process."""

    address: Address

    def receive(self, messages: list[AnyMessage]) -> None:
        """A frame from the node has arrived."""

    def end(self, reason: str) -> None:
        """The process is gone."""


class Price:
    """What one kind of message costs, ready for use."""

    __slots__ = ("background", "decode_item", "decode_message", "encode_item", "encode_message", "facts", "item_bytes",
                 "message_bytes", "name", "step_item", "step_message")  # fmt: skip

    def __init__(self, kind: type, profile: Profile) -> None:
        cost = profile.kind(kind.__name__)
        byte_s = profile.link.byte_s
        self.name = kind.__name__
        self.facts = FACTS.get(kind, facts_of)
        self.background = kind in BACKGROUND
        self.step_message, self.step_item = cost.step_message_s, cost.step_item_s
        self.encode_message = cost.encode_message_s + byte_s * cost.message_bytes
        self.encode_item = cost.encode_item_s + byte_s * cost.item_bytes
        self.decode_message = cost.decode_message_s + byte_s * cost.message_bytes
        self.decode_item = cost.decode_item_s + byte_s * cost.item_bytes
        self.message_bytes, self.item_bytes = cost.message_bytes, cost.item_bytes


class Frame:
    """Messages on their way to a host or process, and what receiving them will cost."""

    __slots__ = ("decode_s", "encode_s", "messages", "size", "step_s")

    def __init__(self) -> None:
        self.messages: list[tuple[Address, Received]] = []
        """Each with the machine it is for."""
        self.size = 0.0
        self.encode_s = 0.0
        self.decode_s = 0.0
        self.step_s = 0.0


class Host:
    """One simulated node process with its machines, timers, arena and child processes."""

    def __init__(self, engine: "Engine", number: int, info: NodeInfo, group: NodeGroup) -> None:
        self.engine = engine
        self.number = number
        self.info = info
        self.group = group
        self.node = info.node
        self.machines: dict[Address, Machine] = {}
        self.processes: dict[Address, Process] = {}
        self.arena: dict[int, object] = {}
        """The values in the object store by offset. What is freed stays until its offset is used again."""
        self._busy_s = 0.0
        self._busy_until = 0.0
        self.steps = 0
        self._inbox: dict[Address, list[AnyEvent]] = {}
        self._owed = 0.0
        """CPU seconds that taking in the inbox costs."""
        self._idle: simpy.Event | None = None
        self._timers: dict[tuple[Address, str], simpy.Event] = {}
        self._windows: dict[int, int] = {}
        """Offset by transfer."""
        self._numbers = 0
        self._fork_free_at = 0.0

    @property
    def busy_s(self) -> float:
        """CPU seconds the node process has spent until now."""
        return self._busy_s - max(0.0, self._busy_until - self.engine.now)

    @property
    def busy(self) -> bool:
        """Whether a step is under way or waits to begin."""
        return bool(self._inbox) or self._busy_until > self.engine.now

    def start(self) -> None:
        """Start the machines and the SimPy process."""
        now = self.engine.env.now
        plan = self._plan([(address, machine.start(now)) for address, machine in self.machines.items()])
        after(self.engine.env, 0.0, lambda: self._carry_out(plan[0]))
        self.engine.env.process(self._run())

    # -- arriving ----------------------------------------------------------------------------------------------

    def arrive(self, frame: Frame, seconds: float) -> None:
        """Messages are here; taking them in costs the node process so many seconds."""
        inbox = self._inbox
        for address, received in frame.messages:
            events = inbox.get(address)
            if events is None:
                inbox[address] = [received]
            else:
                events.append(received)
        self._owed += seconds
        idle = self._idle
        if idle is not None:
            self._idle = None
            idle.succeed()

    def happen(self, address: Address, event: AnyEvent, what: str) -> None:
        """Anything that happens to a machine other than a message."""
        self.engine.history.event(self.engine.env.now, address, what)
        events = self._inbox.get(address)
        if events is None:
            self._inbox[address] = [event]
        else:
            events.append(event)
        idle = self._idle
        if idle is not None:
            self._idle = None
            idle.succeed()

    def from_process(self, source: Address, messages: list[AnyMessage], delay: float) -> None:
        """A process sends its node a frame that arrives in ``delay`` seconds."""
        engine = self.engine
        frame = Frame()
        for message in messages:
            engine.weigh(frame, source, self.node, message)
            kind = type(message)
            if kind is SubmitTasks:
                engine.meter.submitted(message, engine.env.now)  # type: ignore[arg-type]
            elif kind is TasksDone:
                engine.meter.done(message, engine.env.now)  # type: ignore[arg-type]
        seconds = frame.decode_s + frame.step_s + engine.profile.link.receive_frame_s
        after(engine.env, delay, lambda: self.arrive(frame, seconds))

    def attach(self, process: Process, role: str, number: int = 0) -> None:
        """A process has connected."""
        self.processes[process.address] = process
        self.happen(self.node, ProcessConnected(process.address, role, 0, number, True), f"{role} connected")

    def detach(self, process: Address, reason: str = "") -> None:
        """A process is gone."""
        gone = self.processes.pop(process, None)
        if gone is not None:
            gone.end(reason)
            self.happen(self.node, ProcessLost(process, reason), "process lost")

    def new_process(self) -> Address:
        """The address for the next process of this node."""
        self._numbers += 1
        return f"{self.node}/{self._numbers}"

    # -- running -----------------------------------------------------------------------------------------------

    def _run(self) -> Generator[simpy.Event, None, None]:
        env = self.engine.env
        step_s = self.engine.profile.step_s
        machines = self.machines
        while True:
            if not self._inbox:
                self._idle = env.event()
                yield self._idle
            inbox, self._inbox = self._inbox, {}
            seconds, self._owed = self._owed, 0.0
            now = env.now
            results: list[tuple[Address, list[AnyEffect]]] = []
            for address, events in inbox.items():
                effects = self.engine.step(address, machines[address], events, now)
                seconds += step_s
                if effects:
                    results.append((address, effects))
            self.steps += len(inbox)
            plan, sending = self._plan(results)
            seconds += sending
            if seconds > 0.0:
                self._busy_s += seconds
                self._busy_until = now + seconds
                yield env.timeout(seconds)
            if plan:
                self._carry_out(plan)

    def _plan(self, results: list[tuple[Address, list[AnyEffect]]]) -> tuple[list[Any], float]:
        """Effects in order, messages gathered into one frame a destination; and what sending costs."""
        engine = self.engine
        plan: list[Any] = []
        frames: dict[Host | Address, Frame] = {}
        hosts = engine.hosts_of_machines
        for address, effects in results:
            for effect in effects:
                if type(effect) is Send:
                    to = effect.to
                    destination: Host | Address = hosts.get(to) or to
                    frame = frames.get(destination)
                    if frame is None:
                        frame = frames[destination] = Frame()
                    engine.weigh(frame, address, to, effect.message)
                else:
                    if type(effect) is StopWorker:
                        plan += frames.items()
                        frames = {}
                    plan.append((address, effect))
        plan += frames.items()
        seconds = 0.0
        send_s = engine.profile.link.send_frame_s
        for destination, item in plan:
            if type(item) is Frame and destination is not self:
                seconds += item.encode_s + send_s
        return plan, seconds

    def _carry_out(self, plan: list[Any]) -> None:
        engine = self.engine
        env = engine.env
        link = engine.profile.link
        for destination, item in plan:
            if type(item) is Frame:
                if destination is self:
                    self.arrive(item, item.step_s)
                elif type(destination) is Host:
                    engine.meter.frames += 1
                    engine.meter.frame_bytes += int(item.size)
                    delay = engine.network.message_delay(self.number, destination.number, int(item.size))
                    seconds = item.decode_s + item.step_s + link.receive_frame_s
                    timeout = env.timeout(delay, (destination, item, seconds))
                    timeout.callbacks.append(_arrive)
                else:
                    process = self.processes.get(destination)
                    if process is not None:
                        timeout = env.timeout(link.unix_latency_s, (self, process, item))
                        timeout.callbacks.append(_receive)
            else:
                self._effect(destination, item)

    def _effect(self, machine: Address, effect: AnyEffect) -> None:
        """Anything but a message."""
        env = self.engine.env
        if isinstance(effect, SetTimer):
            timer = env.timeout(max(0.0, effect.at - env.now))
            self._timers[machine, effect.key] = timer
            timer.callbacks.append(lambda fired: self._fire(machine, effect.key, fired))
        elif isinstance(effect, CancelTimer):
            self._timers.pop((machine, effect.key), None)
        elif isinstance(effect, OpenWindow):
            self._windows[effect.transfer] = effect.offset
        elif isinstance(effect, CloseWindow):
            self._windows.pop(effect.transfer, None)
        elif isinstance(effect, SendBytes):
            self._send_bytes(machine, effect)
        elif isinstance(effect, StartWorker):
            self._start_worker(effect.number)
        elif isinstance(effect, StopWorker):
            self.detach(effect.process, "killed by SIGKILL" if effect.kill else "")

    def _fire(self, machine: Address, key: str, timer: simpy.Event) -> None:
        if self._timers.get((machine, key)) is timer:
            del self._timers[machine, key]
            self.happen(machine, TimerFired(key), key)

    def _start_worker(self, number: int) -> None:
        env = self.engine.env
        self._fork_free_at = max(env.now, self._fork_free_at) + self.engine.profile.worker.start_s
        self.engine.starting += 1

        def connected() -> None:
            self.engine.starting -= 1
            self.attach(self.engine.make_worker(self, self.new_process()), "worker", number)

        after(env, self._fork_free_at - env.now, connected)

    def _send_bytes(self, machine: Address, effect: SendBytes) -> None:
        engine = self.engine
        receiver = engine.hosts_of_machines[effect.to]
        content = self.arena.get(effect.offset)
        engine.meter.transfers += 1
        engine.meter.bytes_moved += effect.size
        engine.moving += 1

        def left() -> None:
            self.happen(machine, BytesSent(effect.transfer, effect.to), "bytes sent")

        def arrived() -> None:
            engine.moving -= 1
            offset = receiver._windows.pop(effect.transfer, None)
            if offset is not None:
                receiver.arena[offset] = content
                receiver.happen(receiver.node, WindowFilled(effect.transfer), "window filled")

        engine.network.transfer(self.number, receiver.number, effect.size, left, arrived)


def _arrive(event: simpy.Event) -> None:
    arrival: tuple[Host, Frame, float] = event.value  # type: ignore[assignment]
    host, frame, seconds = arrival
    host.arrive(frame, seconds)


def _receive(event: simpy.Event) -> None:
    arrival: tuple[Host, Process, Frame] = event.value  # type: ignore[assignment]
    host, process, frame = arrival
    if process.address in host.processes:
        process.receive([received.message for _, received in frame.messages])


MakeWorker = Callable[[Host, Address], Process]


class Engine:
    """A simulated cluster: hosts, network, history. ``boot`` brings it up."""

    def __init__(
        self, cluster: ClusterSpec, *, profile: Profile, policy: str, seed: int, network: str,
        make_worker: MakeWorker, config: NodeConfig | None = None,
    ) -> None:  # fmt: skip
        cluster.check()
        self.env = simpy.Environment(FIRST_MOMENT)
        self.cluster = cluster
        self.profile = profile
        self.seed = seed
        self.history = History()
        self.meter = Meter()
        self.make_worker = make_worker
        self.hosts: list[Host] = []
        self.hosts_of_machines: dict[Address, Host] = {}
        self.starting = 0
        """Workers that are being forked."""
        self.running = 0
        """Tasks that workers are busy with."""
        self.moving = 0
        """Objects on their way from node to node."""
        self.progress_at = FIRST_MOMENT
        """When something other than the background was last said."""
        self.woken = False
        """A Trio task may have become runnable: the clock must let Trio run before time goes on."""
        self._prices: dict[type, Price] = {}
        config = config or NodeConfig()
        groups: list[NodeGroup] = []
        for number, (info, group) in enumerate(cluster.each(seed)):
            host = Host(self, number, info, group)
            self.hosts.append(host)
            groups.append(group)
            self._place(
                host, info.node,
                NodeMachine(
                    info, head_shards=cluster.shards, config=config, policy=policy,
                    rng=Random(f"{seed} {info.node}"), load_policy=load,
                ),
            )  # fmt: skip
        self._place(
            self.hosts[0], PLACEMENT,
            PlacementMachine(load(policy), shards=cluster.shards, rng=Random(f"{seed} placement")),
        )  # fmt: skip
        for shard in range(cluster.shards):
            host = self.hosts[shard % len(self.hosts) if cluster.spread_shards else 0]
            self._place(host, control_address(shard), ControlMachine(shard, cluster.shards))
        self.network = make_network(network, self.env, groups)

    def _place(self, host: Host, address: Address, machine: Machine) -> None:
        host.machines[address] = machine
        self.hosts_of_machines[address] = host

    @property
    def now(self) -> float:
        """Simulated time in seconds."""
        return float(self.env.now)

    def boot(self) -> None:
        """Start every node, and let the cluster come to rest with all its workers connected."""
        for host in self.hosts:
            host.start()
        quiet = QUIET_S + 8 * max(group.latency_s for group in self.cluster.groups)
        env = self.env
        while True:
            while self.starting or env.peek() <= self.progress_at + quiet:
                env.step()
            if not any(host.busy for host in self.hosts):
                break
            env.step()
        self.progress_at = self.now

    def check_progress(self) -> None:
        """Raise ``SimulationError`` if a program that waits without a deadline waits for ever."""
        env = self.env
        quiet = env.now - self.progress_at > STUCK_S and not (self.running or self.moving or self.starting)
        if quiet or env.peek() == float("inf"):
            raise SimulationError(
                f"the program waits for something that cannot come any more: at {env.now - FIRST_MOMENT:.3f} s of "
                "simulated time no task is running, no object is moving and nothing is being said. Look for a task "
                "that waits for its own result, for an actor that waits for a call to itself, or for an event that "
                "nobody sets"
            )

    def step(self, address: Address, machine: Machine, events: list[AnyEvent], now: float) -> list[AnyEffect]:
        """One step of one machine; calibration and tests put something around it."""
        return machine.step(events, now)

    def weigh(self, frame: Frame, source: Address, to: Address, message: AnyMessage) -> None:
        """Put a message into a frame and into the history."""
        kind = type(message)
        price = self._prices.get(kind)
        if price is None:
            price = self._prices[kind] = Price(kind, self.profile)
        items, ids, payload = price.facts(message)
        frame.messages.append((to, Received(source, message)))
        frame.size += price.message_bytes + items * price.item_bytes + payload
        paid = payload * self.profile.link.byte_s
        frame.encode_s += price.encode_message + items * price.encode_item + paid
        frame.decode_s += price.decode_message + items * price.decode_item + paid
        frame.step_s += price.step_message + items * price.step_item
        now = self.env.now
        if not price.background:
            self.progress_at = now
        self.history.message(now, source, to, price.name, items, payload, ids)
        if kind is AssignTasks:
            self.meter.assigned(message)  # type: ignore[arg-type]
