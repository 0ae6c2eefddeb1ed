"""The node's side of the template: asks for workers, learns how they ended, kills them."""

import os
import signal
import socket
from collections.abc import Callable

import trio


def describe(status: int) -> str:
    """A wait status as a person would say it."""
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    code = os.WEXITSTATUS(status)
    return f"exit code {code}" if code else ""


class WorkerPool:
    """Workers by number."""

    def __init__(self, control: socket.socket, ended: Callable[[int, str], None]) -> None:
        control.setblocking(False)
        self._control = trio.socket.from_stdlib_socket(control)
        self._raw = control
        self._ended = ended
        self.pids: dict[int, int] = {}

    def start(self, number: int) -> None:
        """Ask for a worker; its link, or ``ended``, follows."""
        self._raw.sendall(f"S {number}\n".encode())

    def stop(self, number: int, *, kill: bool) -> None:
        """End a worker: with ``kill`` at once, else as a polite request."""
        pid = self.pids.get(number)
        if pid is not None:
            try:
                os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
            except ProcessLookupError:
                pass  # its end is being reported

    def kill_all(self) -> None:
        """End every worker at once; the template sees to what they started."""
        for number in list(self.pids):
            self.stop(number, kill=True)

    async def run(self) -> None:
        """Listen to the template until it is gone."""
        pending = b""
        while True:
            data = await self._control.recv(4096)
            if not data:
                raise RuntimeError("the worker template process ended; this node cannot go on")
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                what, number, figure = line.split()
                if what == b"P":
                    self.pids[int(number)] = int(figure)
                else:
                    self.pids.pop(int(number), None)
                    self._ended(int(number), describe(int(figure)))
