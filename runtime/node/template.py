"""The template: a small process from which workers are forked, in milliseconds, with what they need imported.

It is forked off before the node process starts Trio, has one thread, and does nothing but fork, reap and report. On
its control socket it reads ``S <number>`` (start a worker) and writes ``P <number> <pid>`` and ``X <number> <status>``
(a worker ended, with its wait status). When the socket closes, the node is gone, and so are all workers.
"""

import ctypes
import io
import os
import select
import signal
import socket
import sys
from collections.abc import Callable
from typing import NoReturn

PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def die_with_parent() -> None:
    """Be killed by the kernel when the parent process ends, however it ends."""
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def run_template(control: socket.socket, run_worker: Callable[[int], None]) -> NoReturn:
    """Serve the node until it is gone. ``run_worker(number)`` is a worker's whole life."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(line_buffering=True)  # what a task printed is seen even if its worker is killed next
    numbers: dict[int, int] = {}
    pending = b""
    poll = select.poll()
    poll.register(control, select.POLLIN)
    poll.register(wake_read, select.POLLIN)
    while True:
        for fd, _ in poll.poll():
            if fd == wake_read:
                try:
                    os.read(wake_read, 4096)
                except BlockingIOError:
                    pass
                _reap(control, numbers)
                continue
            try:
                data = control.recv(4096)
            except ConnectionResetError:  # the node was killed with reports of ours unread
                data = b""
            if not data:
                _end(numbers)
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                _start(int(line[2:]), control, numbers, run_worker, (wake_read, wake_write))


def _start(
    number: int, control: socket.socket, numbers: dict[int, int], run_worker: Callable[[int], None],
    wake: tuple[int, int],
) -> None:  # fmt: skip
    parent = os.getpid()
    pid = os.fork()
    if pid:
        numbers[pid] = number
        _own_group(pid)
        _tell(control, f"P {number} {pid}\n")
        return
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        _own_group(0)
        die_with_parent()
        if os.getppid() != parent:
            os._exit(0)
        control.close()
        for fd in wake:
            os.close(fd)
        run_worker(number)
        status = 0
    except SystemExit as leave:
        status = leave.code if isinstance(leave.code, int) else 0 if leave.code is None else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)


def _own_group(pid: int) -> None:
    # Both the template and the worker itself do it, so that it is done whichever runs first.
    try:
        os.setpgid(pid, pid)
    except OSError:
        pass  # it has ended already


def _reap(control: socket.socket, numbers: dict[int, int]) -> None:
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        pid = ended.si_pid
        _kill_group(pid)  # while it is a zombie, its number cannot be anybody else's
        _, status = os.waitpid(pid, 0)
        number = numbers.pop(pid, None)
        if number is not None:
            _tell(control, f"X {number} {status}\n")


def _kill_group(pid: int) -> None:
    """End a worker and what processes it started, but for those that took a session of their own."""
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass


def _tell(control: socket.socket, line: str) -> None:
    try:
        control.sendall(line.encode())
    except OSError:
        pass  # the node is gone: the next read says so


def _end(numbers: dict[int, int]) -> NoReturn:
    for pid in numbers:
        _kill_group(pid)
    os._exit(0)
