"""Everything one simulation shares: the engine, the program's functions, references, strands, coroutines."""

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import trio

from trio_ray.runtime.api import refs
from trio_ray.runtime.api.waiting import SessionWaiting
from trio_ray.runtime.core.messages import Address
from trio_ray.runtime.core.node import NodeConfig
from trio_ray.simulate.cluster import ClusterSpec
from trio_ray.simulate.costs import TaskCosts
from trio_ray.simulate.engine import Engine, Host
from trio_ray.simulate.functions import Functions, SimulatedSession
from trio_ray.simulate.link import DriverLink
from trio_ray.simulate.profile import Profile
from trio_ray.simulate.references import Register
from trio_ray.simulate.strand import Strands
from trio_ray.simulate.worker import SimulatedWorker


class World:
    """A simulated cluster that runs a user's functions."""

    def __init__(
        self, cluster: ClusterSpec, costs: TaskCosts, *, profile: Profile, policy: str, seed: int, network: str,
        config: NodeConfig | None = None, engine: Callable[..., Engine] = Engine,
        elsewhere: Callable[[bytes], None] = lambda object_id: None,
    ) -> None:  # fmt: skip
        self.costs = costs
        self.functions = Functions(costs)
        self.register = Register(elsewhere)
        self.strands = Strands()
        self.engine = engine(
            cluster, profile=profile, policy=policy, seed=seed, network=network, make_worker=self._make_worker,
            config=config,
        )  # fmt: skip
        self.nursery: trio.Nursery | None = None
        """Where the coroutines of ``async def`` tasks run; None outside Trio."""

    @contextmanager
    def bound(self) -> Iterator[None]:
        """Let references be counted and awaited here; afterwards as before."""
        with refs.bound(self.register, SessionWaiting()):
            yield

    def _make_worker(self, host: Host, process: Address) -> SimulatedWorker:
        return SimulatedWorker(host, process, self)

    def spawn(self, coroutine: Callable[[], Awaitable[None]]) -> None:
        """Run a task's coroutine."""
        assert self.nursery is not None
        self.nursery.start_soon(coroutine)
        self.engine.woken = True

    def connect_driver(self) -> SimulatedSession:
        """A driver on the head node."""
        host = self.engine.hosts[0]
        link = DriverLink(host, host.new_process(), self.register)
        host.attach(link, "driver")
        session = SimulatedSession(link, self.functions)
        self.register.task(session.root, link)
        return session

    def close(self) -> None:
        """End every process, making what waits unwind, and every thread."""
        for host in self.engine.hosts:
            for process in list(host.processes.values()):
                process.end("the simulation has ended")
        self.strands.close()
