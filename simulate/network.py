"""How long messages and objects take from node to node.

A network model answers two questions. Small control messages: how long until this one has arrived? Large objects:
call me when the last byte has left, and when it has arrived. The second is a callback because in a model where
transfers share links the answer changes while they run.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import simpy

from trio_ray.simulate.cluster import NodeGroup


class Network(Protocol):
    """A model of the links between nodes, which are named by their position in the cluster."""

    def message_delay(self, source: int, to: int, size: int) -> float:
        """Seconds until a control frame of ``size`` bytes sent now arrives; frames of a pair arrive in order."""

    def transfer(self, source: int, to: int, size: int, left: Callable[[], None], arrived: Callable[[], None]) -> None:
        """Move ``size`` bytes of an object, and call when they have ``left`` and ``arrived``."""


class Instant:
    """Everything arrives at once: what remains is the control plane's and the tasks' own time."""

    def __init__(self, env: simpy.Environment, groups: Sequence[NodeGroup]) -> None:
        self._env = env

    def message_delay(self, source: int, to: int, size: int) -> float:
        """No time at all."""
        return 0.0

    def transfer(self, source: int, to: int, size: int, left: Callable[[], None], arrived: Callable[[], None]) -> None:
        """Leaves and arrives at this very moment."""
        after(self._env, 0.0, left)
        after(self._env, 0.0, arrived)


class Simple:
    """Latency, and a private link each way for each node into a core that never is the bottleneck.

    Objects queue first-come first-served for the sender's link and for the receiver's; bytes flow through (the
    receiver's end is busy while the sender's is), so that an uncontended transfer takes ``latency + size /
    bandwidth``. Control frames queue among themselves only: on a real link they travel between an object's chunks,
    so that a large transfer delays them hardly.
    """

    def __init__(self, env: simpy.Environment, groups: Sequence[NodeGroup]) -> None:
        self._env = env
        self._latency = [group.latency_s / 2 for group in groups]
        self._rate = [group.bandwidth_bytes_per_s for group in groups]
        self._frames_out = [0.0] * len(groups)
        """When each node's link has sent the control frames it was given."""
        self._frames_in = [0.0] * len(groups)
        self._objects_out = [0.0] * len(groups)
        self._objects_in = [0.0] * len(groups)

    def message_delay(self, source: int, to: int, size: int) -> float:
        """Latency, plus the time on the slower link, after the frames before it."""
        now = self._env.now
        return self._pass(now, source, to, size, self._frames_out, self._frames_in)[1] - now

    def transfer(self, source: int, to: int, size: int, left: Callable[[], None], arrived: Callable[[], None]) -> None:
        """As ``message_delay``, after the objects before it."""
        now = self._env.now
        sent, received = self._pass(now, source, to, size, self._objects_out, self._objects_in)
        after(self._env, sent - now, left)
        after(self._env, received - now, arrived)

    def _pass(
        self, now: float, source: int, to: int, size: int, out: list[float], into: list[float]
    ) -> tuple[float, float]:
        """When the last byte has left and when it has arrived."""
        latency = self._latency[source] + self._latency[to]
        begun = max(now, out[source])
        sent = out[source] = begun + size / self._rate[source]
        received = into[to] = max(max(begun + latency, into[to]) + size / self._rate[to], sent + latency)
        return sent, received


NETWORKS: dict[str, Callable[[simpy.Environment, Sequence[NodeGroup]], Network]] = {
    "instant": Instant,
    "simple": Simple,
}
"""By the names that ``simulate.run(network=…)`` takes."""


def make_network(name: str, env: simpy.Environment, groups: Sequence[NodeGroup]) -> Network:
    """The model of this name; ``groups`` holds the group of each node. Raises ValueError for an unknown name."""
    if name not in NETWORKS:
        raise ValueError(f"there is no network model {name!r}; choose one of {', '.join(NETWORKS)}")
    return NETWORKS[name](env, groups)


def after(env: simpy.Environment, delay: float, call: Callable[[], None]) -> None:
    """Call ``call`` in ``delay`` simulated seconds: one SimPy event, and no generator to resume."""
    env.timeout(max(0.0, delay)).callbacks.append(lambda _: call())
