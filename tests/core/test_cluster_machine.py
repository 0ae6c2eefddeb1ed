"""Any program on a small cluster of machines: every step valid, every task ends, and in the end nothing is left."""

from __future__ import annotations

import msgspec
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.core.harness import Harness, Worker, ok, template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.machine import Received
from trio_ray.runtime.core.messages import (
    ActorHandles,
    Blocked,
    CancelScope,
    CancelTasks,
    CreateObject,
    KillActor,
    ObjectCreated,
    Output,
    PutObjects,
    References,
    Status,
    SubmitTasks,
    TaskResult,
    Unpin,
    WaitObjects,
    Where,
    node_of,
)
from trio_ray.runtime.core.spec import Kind, TaskSpec

TASKS = [
    template("plain", max_retries=1),
    template("two", num_returns=2),
    template("gpu", resources={"GPU": 1}, max_retries=1),
    template("free", num_cpus=0),
]
CREATE = template("Actor", kind=Kind.ACTOR_CREATION, held=())
CREATE_FAR = template("FarActor", kind=Kind.ACTOR_CREATION, held=(), resources={"GPU": 1})
CALL = template("Actor.call", kind=Kind.ACTOR_CALL, num_cpus=0)


class AnyProgram(RuleBasedStateMachine):
    """Rules are what drivers, workers and fate do."""

    @initialize(nodes=st.integers(1, 3), shards=st.integers(1, 2))
    def begin(self, nodes: int, shards: int) -> None:
        self.harness = Harness(nodes=nodes, shards=shards, store_bytes=1 << 16, extra={nodes - 1: {"GPU": 1}})
        self.harness.behave = self.behave
        self.driver = self.harness.driver()
        self.held: dict[bytes, None] = {}
        self.expected: dict[bytes, None] = {}
        self.actors: dict[bytes, None] = {}
        self.scopes = [self.driver.scope]
        self.inside: dict[bytes, list[bytes]] = {}
        """The first results of the driver's tasks, by scope."""
        self.known: set[bytes] = set()

    def behave(self, worker: Worker, spec: TaskSpec) -> TaskResult | None:
        harness, node = self.harness, node_of(worker.process)
        of = harness.templates.get(spec.template)
        count = of.num_returns if of is not None else 1
        for value in [value for value in worker.inputs.values() if value.where == Where.SHARED]:
            del worker.inputs[value.object_id]
            harness.deliver(node, Received(worker.process, Unpin([value.object_id])))
        if spec.args == b"fail":
            return TaskResult(spec.task_id, Status.ERROR, (Output(b"\x02boom"),) * count, 1.0, 0.001)
        if spec.args == b"large" and count == 1:
            object_id = ids.return_id(spec.task_id, 0)
            effects = harness.machines[node].step(
                [Received(worker.process, CreateObject(object_id, 9000))], harness.now
            )
            told = [e.message for e in effects if isinstance(getattr(e, "message", None), ObjectCreated)]
            harness.carry_out(node, effects)
            if told:
                return TaskResult(spec.task_id, Status.OK, (Output(b"", told[0].offset, 9000),), 1.0, 0.001)
        if spec.args == b"stuck":
            return None
        if spec.args == b"spawn" and len(spec.scope) > ids.SCOPE_BYTES:
            child = msgspec.structs.replace(
                spec, task_id=ids.child_task_id(ids.children_prefix(spec.task_id), 0), submitter=worker.process,
                template=TASKS[0].template_id, inputs=(), borrowed=(), args=b"stuck",
            )  # fmt: skip
            harness.deliver(node, Received(worker.process, SubmitTasks([child], [TASKS[0]])))
            dropped = References([], [ids.return_id(child.task_id, 0)])
            harness.deliver(node, Received(worker.process, dropped))
            return msgspec.structs.replace(ok(spec, *[b"\x00N."] * count), spawned=True)
        return ok(spec, *[b"\x00N."] * count, contained=spec.borrowed if spec.args == b"pass on" else ())

    def submit(self, spec: TaskSpec, of: object, count: int) -> None:
        templates = [] if spec.template in self.known else [of]
        self.known.add(spec.template)
        self.driver.submit(spec, templates=templates)  # type: ignore[arg-type]
        for index in range(count):
            self.held[ids.return_id(spec.task_id, index)] = None
            self.expected[ids.return_id(spec.task_id, index)] = None

    @rule(
        which=st.integers(0, len(TASKS) - 1), inputs=st.lists(st.integers(0, 50), max_size=3),
        borrowed=st.lists(st.integers(0, 50), max_size=2),
        args=st.sampled_from([b"", b"", b"fail", b"large", b"pass on", b"spawn"]), scope=st.integers(0, 5),
    )  # fmt: skip
    def task(self, which: int, inputs: list[int], borrowed: list[int], args: bytes, scope: int) -> None:
        held = list(self.held)
        of = TASKS[which]
        pick = {held[i % len(held)]: None for i in inputs} if held else {}
        lend = {held[i % len(held)]: None for i in borrowed} if held else {}
        within = self.scopes[scope % len(self.scopes)]
        spec = self.driver.spec(of, *pick, borrowed=tuple(lend), args=args, scope=within)
        self.inside.setdefault(within, []).append(ids.return_id(spec.task_id, 0))
        self.submit(spec, of, of.num_returns)

    @rule(far=st.booleans())
    def create(self, far: bool) -> None:
        of = CREATE_FAR if far else CREATE
        spec = self.driver.spec(of)
        self.submit(spec, of, 1)
        del self.held[ids.return_id(spec.task_id, 0)]  # it is the handle
        self.actors[spec.task_id] = None

    @rule(which=st.integers(0, 50), inputs=st.lists(st.integers(0, 50), max_size=1))
    def call(self, which: int, inputs: list[int]) -> None:
        if self.actors:
            held = list(self.held)
            pick = [held[i % len(held)] for i in inputs] if held else []
            self.submit(self.driver.spec(CALL, *pick, actor=list(self.actors)[which % len(self.actors)]), CALL, 1)

    @rule(which=st.integers(0, 50))
    def let_actor_go(self, which: int) -> None:
        if self.actors:
            actor = list(self.actors)[which % len(self.actors)]
            del self.actors[actor]
            self.expected.pop(ids.return_id(actor, 0))
            self.driver.send(ActorHandles([], [actor]))

    @rule(which=st.integers(0, 50))
    def kill_actor(self, which: int) -> None:
        if self.actors:
            self.driver.send(KillActor(list(self.actors)[which % len(self.actors)]))

    @rule()
    def put(self) -> None:
        self.driver.count += 1
        object_id = ids.put_id(self.driver.task_id, self.driver.count)
        self.driver.send(PutObjects([(object_id, b"\x00N.", ())]))
        self.held[object_id] = None

    @rule(which=st.integers(0, 50))
    def drop(self, which: int) -> None:
        if self.held:
            object_id = list(self.held)[which % len(self.held)]
            del self.held[object_id]
            self.expected.pop(object_id, None)
            self.driver.send(References([], [object_id]))

    @rule(which=st.integers(0, 50))
    def read(self, which: int) -> None:
        if self.held:
            self.driver.send(WaitObjects([list(self.held)[which % len(self.held)]]))

    @rule()
    def open_scope(self) -> None:
        self.scopes.append(ids.child_scope(self.scopes[-1], self.driver.task_id, len(self.scopes)))

    @rule()
    def cancel_scope(self) -> None:
        if len(self.scopes) > 1:
            scope, values = self.scopes.pop(), self.driver.values
            done = all(ref in values and not values[ref].error for ref in self.inside.get(scope, []))
            self.driver.send(CancelScope(scope, done))

    @rule(
        which=st.lists(st.integers(0, len(TASKS) - 1), min_size=1, max_size=3),
        crash=st.none() | st.integers(0, 50), args=st.sampled_from([b"", b"fail", b"spawn"]),
    )  # fmt: skip
    def scope_from_beginning_to_end(self, which: list[int], args: bytes, crash: int | None) -> None:
        self.open_scope()
        for of in which:
            self.task(of, [], [], args, len(self.scopes) - 1)
        self.some_steps(1)
        if crash is not None:
            self.crash(crash)
        self.harness.advance(1.0)
        self.cancel_scope()

    @rule(which=st.integers(0, 50), force=st.booleans())
    def cancel_task(self, which: int, force: bool) -> None:
        if self.expected:
            task_id = ids.task_of(list(self.expected)[which % len(self.expected)])
            if task_id not in self.actors:
                self.driver.send(CancelTasks([task_id], force=force))

    @rule(which=st.integers(0, 50))
    def crash(self, which: int) -> None:
        workers = list(self.harness.workers)
        if workers:
            self.harness.kill(workers[which % len(workers)], "killed by SIGKILL")

    @rule(which=st.integers(0, 50), blocked=st.booleans())
    def block(self, which: int, blocked: bool) -> None:
        workers = list(self.harness.workers)
        if workers:
            process = workers[which % len(workers)]
            self.harness.deliver(node_of(process), Received(process, Blocked(blocked)))

    @rule(hold=st.booleans())
    def pause_workers(self, hold: bool) -> None:
        self.harness.hold = hold

    @rule(steps=st.integers(1, 4))
    def some_steps(self, steps: int) -> None:
        for _ in range(steps):
            self.harness.step()

    @rule(seconds=st.sampled_from([0.001, 0.05, 1.0]))
    def time_passes(self, seconds: float) -> None:
        self.harness.advance(seconds)

    def read_all(self) -> None:
        """Ends every read pin of the driver."""
        for message in self.driver.inbox:
            for value in getattr(message, "values", ()):
                if value.where == Where.SHARED:
                    self.driver.send(Unpin([value.object_id]))
        self.driver.inbox.clear()

    def teardown(self) -> None:
        if not hasattr(self, "harness"):
            return
        harness, driver = self.harness, self.driver
        harness.hold = False
        while len(self.scopes) > 1:  # what is stuck in them gives up its CPU
            self.cancel_scope()
        for process in list(harness.workers):
            harness.deliver(node_of(process), Received(process, Blocked(False)))
        for _ in range(6):
            harness.advance(2.0)
            self.read_all()
        missing = [object_id for object_id in self.expected if object_id not in driver.values]
        assert not missing, f"{len(missing)} results never came"
        driver.send(References([], list(self.held)))
        driver.send(ActorHandles([], list(self.actors)))
        for _ in range(6):
            harness.advance(2.0)
            self.read_all()
        for address, machine in harness.machines.items():
            if address.startswith("n:"):
                assert machine.tasks.entries == {}, address
                assert machine.scheduler.available == dict(machine.info.resources), address
                left = [msgspec.structs.asdict(entry) for entry in machine.table.entries.values()]
                assert not left, (address, left)
                assert machine.table.arena.used == 0, address
                assert not machine.tasks.actors.local, address


AnyProgram.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
TestAnyProgram = AnyProgram.TestCase
