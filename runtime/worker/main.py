"""The life of a worker process: connect, run what comes, one task at a time, until the node is gone.

A worker that an actor moves into stays as it is for a plain one; for an actor with ``async def`` methods it goes on
under Trio, for one with ``max_concurrency`` above one it hands its calls to threads.
"""

import io
import os
import signal
import sys
from functools import partial

from trio_ray.runtime.api import context, refs
from trio_ray.runtime.api.waiting import SessionWaiting
from trio_ray.runtime.client.sync import connect
from trio_ray.runtime.core.messages import Status, TaskResult
from trio_ray.runtime.core.spec import Kind
from trio_ray.runtime.transport.handshake import Hello
from trio_ray.runtime.worker.connection import NODE_LOST, WorkerConnection, WorkerSession
from trio_ray.runtime.worker.execute import Executor


def run_worker(address: str, secret: bytes, number: int) -> None:
    """The whole life of worker ``number`` of the node at ``address``."""
    try:
        connection = connect(WorkerConnection, address, secret, Hello("worker", os.getpid(), number))
    except ConnectionError:  # the node ended meanwhile
        sys.exit(NODE_LOST)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # what tasks print is seen at once, and not lost if they are killed
    session = WorkerSession(connection)
    refs.bind(connection.core)
    refs.wait_with(SessionWaiting())
    context.set_process(session.root)
    for path in connection.welcome.sys_path:
        if path not in sys.path:
            sys.path.append(path)
    os.register_at_fork(after_in_child=partial(_forget_after_fork, connection))
    connection.start_pump()
    work(Executor(connection, session))


def _forget_after_fork(connection: WorkerConnection) -> None:
    """A process that a task forks is no worker: the connection is its parent's."""
    connection.abandon()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    context.running.set(None)
    context.set_process(None)
    refs.unbind()


def work(executor: Executor) -> None:
    """Run tasks, until the node is gone (which ends the process)."""
    connection = executor.connection
    templates = connection.worker.templates
    result: TaskResult | None = None
    while True:
        entry = connection.next(result)
        result = None
        if entry is None:
            if connection.pending:
                connection.flush()
            connection.wait_for_tasks()
            continue
        spec, inputs = entry
        del entry
        template = templates[spec.template]
        if template.is_async:
            from trio_ray.runtime.worker.asynchronous import live_as_actor, run_task

            if template.kind == Kind.ACTOR_CREATION:
                live_as_actor(executor, spec, inputs)
            else:
                run_task(executor, spec, inputs)
            continue
        result = executor.run(spec, template, inputs, interruptible=True)
        del spec, inputs
        if template.max_concurrency > 1 and template.kind == Kind.ACTOR_CREATION and result.status == Status.OK:
            from trio_ray.runtime.worker.threads import live_with_threads

            connection.done(result)
            live_with_threads(executor, template.max_concurrency)
