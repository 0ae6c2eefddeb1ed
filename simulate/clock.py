"""Trio on simulated time.

The user's coroutine runs under the real Trio, so that nurseries, cancel scopes and deadlines are the real ones. Trio's
clock is SimPy's. Trio asks its clock how long to sleep exactly when no task is runnable; that is when simulated time
may go on: SimPy runs until something wakes a task or Trio's next deadline is reached, and Trio is told to sleep not at
all. So while any Trio task can run, time stands still, and the simulation never runs beside a Trio task.

Trio shuffles its runnable tasks on purpose and wakes the members of sets, so by default no two runs are alike. It has
a switch for just this, made for Hypothesis: sort what is runnable by the tasks' numbers, and shuffle with a known
generator. The switch and the generator are private names of Trio's, as it has no public way; ``deterministic`` sets
them for the time of a simulation and puts them back.
"""

import gc
import random
from collections.abc import Iterator
from contextlib import contextmanager
from math import inf
from typing import Any

import trio
from trio._core import _run as trio_run

from trio_ray.simulate.engine import Engine

STEPS_BETWEEN_LOOKS = 2_000
"""SimPy events after which Trio gets to look for signals (Ctrl-C)."""
PASSES_BETWEEN_COLLECTIONS = 2_000
"""How often Trio lets time pass between two garbage collections."""


class SimulatedClock(trio.abc.Clock):
    """Trio's view of the simulation's clock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.failure: BaseException | None = None
        """What went wrong in the simulation itself."""
        self.stop: trio.CancelScope | None = None
        """Cancelled when the simulation cannot go on."""
        self.over = False
        """The program has ended: time goes on no more while Trio shuts down."""
        self._passes_left = PASSES_BETWEEN_COLLECTIONS

    def start_clock(self) -> None:
        """The engine's clock runs already."""

    def current_time(self) -> float:
        """Simulated seconds."""
        return self._engine.now

    def deadline_to_sleep_time(self, deadline: float) -> float:
        """Let simulated time pass up to ``deadline``, or until a Trio task is woken; never sleep for real."""
        if self.failure is None and not self.over:
            try:
                self._pass(deadline)
            except BaseException as failure:
                self.failure = failure
                if self.stop is not None:
                    self.stop.cancel()
        return 0.0 if self.failure is None or deadline < inf else 0.001

    def _pass(self, deadline: float) -> None:
        engine = self._engine
        env = engine.env
        engine.woken = False
        if deadline == inf:
            engine.check_progress()
        self._passes_left -= 1
        if not self._passes_left:
            self._passes_left = PASSES_BETWEEN_COLLECTIONS
            gc.collect()
        for _ in range(STEPS_BETWEEN_LOOKS):
            at = env.peek()
            if at == inf and deadline == inf:
                return
            if at > deadline:
                if env.now < deadline < inf:
                    env.timeout(deadline - env.now)
                    env.step()
                return
            env.step()
            if engine.woken:
                return


@contextmanager
def deterministic(seed: int) -> Iterator[None]:
    """Make Trio's scheduling a function of the seed. Not for two simulations at once in one process."""
    module: Any = trio_run
    before = module._ALLOW_DETERMINISTIC_SCHEDULING, module._r
    module._ALLOW_DETERMINISTIC_SCHEDULING, module._r = True, random.Random(f"trio {seed}")
    try:
        yield
    finally:
        module._ALLOW_DETERMINISTIC_SCHEDULING, module._r = before
