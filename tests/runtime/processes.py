"""What is left of clusters, seen from outside."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from trio_ray.runtime.core.messages import Answer, AnyMessage, Query
from trio_ray.runtime.launch import local
from trio_ray.runtime.launch.local import ClusterFile
from trio_ray.runtime.transport.blocking import BlockingLink
from trio_ray.runtime.transport.handshake import Hello


def processes(node: str) -> set[int]:
    """The node process of a node, its template and its workers: all bear the node's name in their command line."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if node.encode() in words and local.is_alive(int(entry.name)):
                found.add(int(entry.name))
    return found


def everything(file: ClusterFile) -> set[int]:
    """All processes of a cluster."""
    return set().union(*(processes(node.node) for node in file.nodes))


def eventually(holds: Callable[[], bool], limit_s: float = 10.0) -> None:
    """Wait until something that happens in another process has."""
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


def enter(file: ClusterFile, address: str | None = None) -> BlockingLink:
    """A bare driver's link to the head."""
    hello = Hello("driver", os.getpid(), shares_memory=address is None)
    return BlockingLink.connect(address or file.head.unix, bytes.fromhex(file.secret), hello)


def ask(link: BlockingLink, subject: str, argument: str = "") -> object:
    """The answer to a query."""
    link.send([Query(1, subject, argument)])
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        messages: list[AnyMessage] = link.receive(1.0)[0]
        for message in messages:
            if isinstance(message, Answer):
                assert not message.error, message.error
                return msgspec.msgpack.decode(message.body)
    raise AssertionError("no answer")


def is_quiet(link: BlockingLink) -> bool:
    """Whether the link's node has no task, no actor and no object."""
    counters: Any = ask(link, "node")
    return not any(counters[name] for name in ("actors", "queued", "running", "tasks", "objects", "store_used"))
