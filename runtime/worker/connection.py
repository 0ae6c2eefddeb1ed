"""A worker's connection: the client's, and the tasks that come over it."""

import os
import signal
import sys
import threading

from trio_ray.runtime.api.session import Session
from trio_ray.runtime.client.sync import INTERRUPTED, SyncConnection
from trio_ray.runtime.core.messages import AnyMessage, TaskResult
from trio_ray.runtime.core.spec import TaskSpec
from trio_ray.runtime.core.worker import Inputs, WorkerCore
from trio_ray.runtime.transport.blocking import BlockingLink

NODE_LOST = 75
"""Exit code of a worker whose node is gone."""


class WorkerConnection(SyncConnection):
    """A ``SyncConnection`` with a ``WorkerCore``, and the end of it is the end of the process.

    The node may want a running task ended. A plain function that runs in the main thread is ended by SIGINT: its
    handler raises KeyboardInterrupt if that very task still runs (``running_id``) and the main thread is not inside a
    message to or from the node, where it would tear the link; then it is raised as soon as the thread is out.
    """

    def __init__(self, link: BlockingLink) -> None:
        super().__init__(link)
        self.worker = WorkerCore(self.core, self._adopt)
        self.running_id = b""
        """The task that runs in the main thread and may be interrupted."""
        self.on_tasks = self._nothing
        """Called, with no lock held, after something arrived (set by async and threaded actors)."""
        self._main = threading.get_ident()
        self._inside = 0
        """The main thread is within a send or a read."""
        self._due = False
        """An interrupt came while it was."""
        signal.signal(signal.SIGINT, self._on_interrupt)

    def _nothing(self) -> None:
        pass

    def take(self) -> list[AnyMessage]:
        return self.worker.take()

    def receive(self, messages: list[AnyMessage]) -> None:
        self.worker.receive(messages)

    @property
    def pending(self) -> bool:
        return self.worker.pending

    # -- tasks ---------------------------------------------------------------------------------------------------

    def next(self, done: TaskResult | None = None) -> tuple[TaskSpec, Inputs] | None:
        """Begin the next task, if there is one here; ``done`` has just ended."""
        worker = self.worker
        with self.lock:
            if done is None:
                return worker.next()
            send = worker.done(done, done.started_at + done.duration_s)
            entry = None if send else worker.next()
        if not send:
            self.flush_some_time()  # if the next task is a long one
            return entry
        self.flush()
        return self.next()

    def done(self, result: TaskResult) -> None:
        """A task ended; its result is sent when it is time."""
        with self.lock:
            send = self.worker.done(result, result.started_at + result.duration_s)
        if send:
            self.flush()
        else:
            self.flush_some_time()  # if the next task is a long one

    def wait_for_tasks(self) -> None:
        """Block until there is a task to begin."""
        parked = threading.Lock()
        parked.acquire()
        self.lead(lambda: bool(self.worker.queue or self.core.failure), parked, None)

    def wait_begins(self) -> None:
        with self.lock:
            self.worker.wait_begins()

    def wait_ends(self) -> None:
        with self.lock:
            self.worker.wait_ends()
        self.flush_soon()

    # -- interrupts ----------------------------------------------------------------------------------------------

    def flush(self) -> None:
        if threading.get_ident() != self._main:
            super().flush()
            return
        self._inside += 1
        try:
            super().flush()
        finally:
            self._inside -= 1
        self._raise_due()

    def read_now(self) -> None:
        if threading.get_ident() == self._main:
            self._inside += 1
            try:
                super().read_now()
            finally:
                self._inside -= 1
            self._pass_on()
            self._raise_due()
        else:
            super().read_now()
            self._pass_on()

    def _pass_on(self) -> None:
        if self.running_id and self.running_id in self.worker.interrupted:
            signal.pthread_kill(self._main, signal.SIGINT)
        self.on_tasks()

    def begins(self, task_id: bytes) -> None:
        """The task is to run in the main thread; raises KeyboardInterrupt if it was to be ended before it began."""
        self.running_id = task_id
        if self.worker.interrupted:
            self._interrupt_once()

    def _interrupt_once(self) -> None:
        if self.running_id and self.running_id in self.worker.interrupted:
            self.running_id = b""  # a task that goes on nevertheless is not told again: its process will be killed
            raise KeyboardInterrupt

    def _raise_due(self) -> None:
        if self._due and not self._inside:
            self._due = False
            self._interrupt_once()

    def _on_interrupt(self, number: int, frame: object) -> None:
        if self._inside:
            self._due = True
        else:
            self._interrupt_once()

    def _lost(self, reason: str) -> None:
        if reason == INTERRUPTED:
            print(f"worker process {os.getpid()} ends: {reason}", file=sys.stderr, flush=True)
        os._exit(NODE_LOST)


class WorkerSession(Session):
    """A worker's session: its async tasks lend their CPU out while they wait."""

    def __init__(self, connection: WorkerConnection) -> None:
        super().__init__(connection)
        self._worker = connection.worker

    def wait_begins(self) -> None:
        self._worker.wait_begins()

    def wait_ends(self) -> None:
        self._worker.wait_ends()
