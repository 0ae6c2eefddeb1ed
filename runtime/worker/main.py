"""The life of a worker process: connect, run what comes, one task at a time, until the node is gone.

A worker that an actor moves into stays as it is for a plain one; for an actor with ``async def`` methods it goes on
under Trio, for one with ``max_concurrency`` above one it hands its calls to threads.
"""

import os
import sys

from trio_ray.runtime.api import context, refs
from trio_ray.runtime.api.waiting import SessionWaiting
from trio_ray.runtime.client.sync import connect
from trio_ray.runtime.core.messages import Status
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
    session = WorkerSession(connection)
    refs.bind(connection.core)
    refs.wait_with(SessionWaiting())
    context.set_process(session.root)
    for path in connection.welcome.sys_path:
        if path not in sys.path:
            sys.path.append(path)
    connection.start_pump()
    work(Executor(connection, session))


def work(executor: Executor) -> None:
    """Run tasks, until the node is gone (which ends the process)."""
    connection = executor.connection
    while True:
        entry = connection.next()
        if entry is None:
            if connection.pending:
                connection.flush()
            connection.wait_for_tasks()
            continue
        spec, inputs = entry
        template = executor.template(spec)
        if template.is_async:
            from trio_ray.runtime.worker.asynchronous import live_as_actor, run_task

            if template.kind == Kind.ACTOR_CREATION:
                live_as_actor(executor, spec, inputs)
            else:
                del entry
                run_task(executor, spec, inputs)
            continue
        del entry
        result = executor.run(spec, inputs, interruptible=True)
        del spec, inputs
        connection.done(result)
        if template.kind == Kind.ACTOR_CREATION and template.max_concurrency > 1 and result.status == Status.OK:
            from trio_ray.runtime.worker.threads import live_with_threads

            live_with_threads(executor, template.max_concurrency)
