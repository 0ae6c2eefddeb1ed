"""Golden scenarios: whole interactions as text, message by message, under ``scenarios/``.

Each file is what a cluster of real machines says, in order. ``pytest tests/core/test_scenarios.py --regenerate``
writes them anew; do so only when you understand what changed, and read the difference.
"""

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from tests.core.harness import Driver, Harness, Worker, ok, template
from trio_ray.runtime.core import ids
from trio_ray.runtime.core.effects import AnyEffect, OpenWindow, Send, SendBytes
from trio_ray.runtime.core.machine import Received
from trio_ray.runtime.core.messages import (
    CreateObject,
    Function,
    Heartbeat,
    ObjectCreated,
    Output,
    References,
    SealObjects,
    Status,
    TaskResult,
    WaitObjects,
)
from trio_ray.runtime.core.spec import TaskSpec, TaskTemplate

SCENARIOS = Path(__file__).parent / "scenarios"


class Scenario(Harness):
    """A harness that remembers what each id is called."""

    def __init__(self, nodes: int, gpu_on: int) -> None:
        super().__init__(nodes=nodes, extra={gpu_on: {"GPU": 1}})
        self.names: dict[bytes, str] = {}
        self.sizes: dict[bytes, int] = {}
        self.behave = self.work
        self.log.clear()

    def put(self, driver: Driver, name: str, size: int) -> bytes:
        """The driver writes an object into its node's arena."""
        object_id = ids.put_id(driver.task_id, len(self.names))
        self.names[object_id] = name
        driver.send(CreateObject(object_id, size))
        self.run()
        driver.send(SealObjects([(object_id, ())]))
        self.run()
        return object_id

    def call(self, driver: Driver, of: TaskTemplate, result: str, size: int, *inputs: bytes) -> bytes:
        """The driver submits a task whose result has ``size`` bytes."""
        spec = driver.spec(of, *inputs)
        object_id = ids.return_id(spec.task_id, 0)
        self.names[spec.task_id] = f"{of.name}({', '.join(self.names[i] for i in inputs)})"
        self.names[object_id] = result
        self.names[of.template_id] = of.name
        self.sizes[spec.task_id] = size
        driver.submit(spec, templates=[of])
        return object_id

    def work(self, worker: Worker, spec: TaskSpec) -> TaskResult:
        """What the workers do: make a result of the size it is to have."""
        size = self.sizes[spec.task_id]
        if size <= 100:
            return ok(spec)
        node = worker.process.partition("/")[0]
        create = Received(worker.process, CreateObject(ids.return_id(spec.task_id, 0), size))
        offset = 0
        for effect in self.machines[node].step([create], self.now):
            assert isinstance(effect, Send) and isinstance(effect.message, ObjectCreated)
            offset = effect.message.offset
        return TaskResult(spec.task_id, Status.OK, (Output(b"", offset, size),), 1.0, 1.0)

    def text(self) -> list[str]:
        """What was said since the last time, one line an effect."""
        lines = [line for source, effect in self.log if (line := self.line(source, effect))]
        self.log.clear()
        return lines

    def line(self, source: str, effect: AnyEffect) -> str:
        if isinstance(effect, Send) and not isinstance(effect.message, Heartbeat):
            return f"{source:9} -> {effect.to:9}  {self.show(effect.message)}"
        if isinstance(effect, OpenWindow):
            return f"{source:9} expects    {effect.size} bytes from {effect.source} (transfer {effect.transfer})"
        if isinstance(effect, SendBytes):
            return f"{source:9} -> {effect.to:9}  {effect.size} bytes (transfer {effect.transfer})"
        return ""

    def show(self, value: object) -> str:
        """A value with ids replaced by names, and what is empty left out."""
        if isinstance(value, bytes):
            return self.names.get(value) or f"{len(value)} bytes"
        if isinstance(value, TaskSpec):
            return self.names[value.task_id]
        if isinstance(value, TaskTemplate | Function):
            return value.name
        if isinstance(value, list | tuple):
            return "[" + ", ".join(self.show(item) for item in value) + "]"
        if isinstance(value, msgspec.Struct):
            fields = [
                f"{name}={self.show(field)}"
                for name, field in ((name, getattr(value, name)) for name in value.__struct_fields__)
                if (field or isinstance(field, bool)) and field is not False and "template" not in name
            ]
            return f"{type(value).__name__}({', '.join(fields)})"
        return getattr(value, "name", None) or str(value)


ADD = template("add", resources={"GPU": 1})
MAKE = template("make", resources={"GPU": 1})


def figure_7a() -> list[str]:
    """Figure 7a of the paper: a task is sent to where it can run, and what it lacks is fetched.

    A driver on n:0 has a there and b on n:1, where the only GPU is; add(a, b) needs it.
    """
    scenario = Scenario(nodes=2, gpu_on=1)
    driver = scenario.driver(0)
    a = scenario.put(driver, "a", 5000)
    b = scenario.call(driver, MAKE, "b", 7000)
    scenario.run()
    scenario.log.clear()
    scenario.call(driver, ADD, "c", 9000, a, b)
    scenario.run()
    return scenario.text()


def figure_7b() -> list[str]:
    """Figure 7b of the paper: a get of an object that does not exist yet.

    A driver on n:0 has submitted add(), which runs on n:1; one on n:2 has been given the reference c and waits for it.
    The object table calls n:2 back when c exists, and n:2 fetches it.
    """
    scenario = Scenario(nodes=3, gpu_on=1)
    first, second = scenario.driver(0), scenario.driver(2)
    scenario.hold = True
    c = scenario.call(first, ADD, "c", 9000)
    scenario.run()
    scenario.log.clear()
    second.send(References([c], []))
    second.send(WaitObjects([c]))
    scenario.run()
    waiting = scenario.text()
    scenario.hold = False
    scenario.run()
    return [*waiting, "(add ends)", *scenario.text()]


def freeing() -> list[str]:
    """A reference is lent to a task on another node, and its owner drops it meanwhile; the last to let go frees it."""
    scenario = Scenario(nodes=2, gpu_on=1)
    driver = scenario.driver(0)
    a = scenario.put(driver, "a", 5000)
    scenario.hold = True
    result = scenario.call(driver, ADD, "c", 10, a)
    scenario.run()
    scenario.log.clear()
    driver.send(References([], [a]))
    scenario.run()
    dropped = scenario.text()
    scenario.hold = False
    scenario.run()
    ended = scenario.text()
    driver.send(References([], [result]))
    scenario.run()
    return ["(the driver drops a)", *dropped, "(add ends)", *ended, "(the driver drops c)", *scenario.text()]


def no_such_node() -> list[str]:
    """A task that asks for what no node has: placement waits a second for one to join, then says why not."""
    scenario = Scenario(nodes=2, gpu_on=1)
    driver = scenario.driver(0)
    scenario.call(driver, template("huge", num_cpus=64), "c", 10)
    scenario.run()
    asked = scenario.text()
    scenario.advance(1.0)
    return [*asked, "(a second later)", *scenario.text()]


EVERY = [figure_7a, figure_7b, freeing, no_such_node]


@pytest.mark.parametrize("scenario", EVERY, ids=lambda scenario: scenario.__name__)
def test_scenario(scenario: Callable[[], list[str]], request: pytest.FixtureRequest) -> None:
    path = SCENARIOS / f"{scenario.__name__}.txt"
    title = "".join(f"# {line.strip()}".rstrip() + "\n" for line in (scenario.__doc__ or "").strip().splitlines())
    text = title + "\n" + "\n".join(line.rstrip() for line in scenario()) + "\n"
    if request.config.getoption("--regenerate"):
        path.write_text(text)
    assert text == path.read_text(), "the interaction changed; if that is meant, regenerate the file and read it"
