"""Plain actors with ``max_concurrency`` above one: their calls run in threads, begun in order."""

import queue
import threading

from trio_ray.runtime.core.spec import TaskSpec
from trio_ray.runtime.core.worker import Inputs
from trio_ray.runtime.worker.execute import Executor


def live_with_threads(executor: Executor, concurrency: int) -> None:
    """Go on as such an actor, until the node is gone (which ends the process)."""
    connection = executor.connection
    calls: queue.SimpleQueue[tuple[TaskSpec, Inputs]] = queue.SimpleQueue()
    free = threading.Semaphore(concurrency)
    idle = threading.Semaphore(0)
    started = 0

    def serve() -> None:
        while True:
            spec, inputs = calls.get()
            result = executor.run(spec, executor.template(spec), inputs, interruptible=False)
            del spec, inputs
            connection.done(result)
            del result
            idle.release()
            free.release()

    while True:
        free.acquire()
        entry = connection.next()
        while entry is None:
            connection.wait_for_tasks()
            entry = connection.next()
        calls.put(entry)
        if not idle.acquire(blocking=False):
            started += 1
            threading.Thread(target=serve, name=f"trio-ray-call-{started}", daemon=True).start()
