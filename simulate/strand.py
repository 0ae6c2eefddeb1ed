"""Threads for functions that wait: exactly one runs at a time, and each hands over at a known point.

A plain task function that calls ``get`` inside must keep its Python stack while simulated time passes. So it runs on a
*strand*: a thread that the simulation resumes and that hands control back when it finishes or waits. The simulation
never runs while a strand does, hence the interleaving is the simulation's alone, and as deterministic.

Handing over and back costs some 30 µs, so functions that plainly cannot wait (``is_leaf``) are called directly.
"""

import builtins
import threading
from collections.abc import Callable
from types import CodeType

PURE_BUILTINS = frozenset(
    {"abs", "all", "any", "bin", "bool", "bytes", "chr", "dict", "divmod", "enumerate", "filter", "float", "frozenset",
     "hash", "hex", "int", "isinstance", "len", "list", "map", "max", "min", "ord", "pow", "range", "repr", "reversed",
     "round", "set", "slice", "sorted", "str", "sum", "tuple", "type", "zip"}
)  # fmt: skip
"""Calling these neither waits nor can be noticed if it is done again."""


class Abandoned(BaseException):
    """Raised in a strand that waits when its process has ended or the simulation closes: it unwinds."""


class MustWait(BaseException):
    """Raised by a wait outside any strand, in a function that was taken for a leaf: it is run again, on a strand."""


class Strand:
    """One thread, which runs one piece of work after the other."""

    def __init__(self) -> None:
        self._go = threading.Lock()
        self._back = threading.Lock()
        self._go.acquire()
        self._back.acquire()
        self._work: Callable[[], None] | None = None
        self._error: BaseException | None = None
        self._abandoned = False
        self._interrupted = False
        self.finished = True
        self._thread = threading.Thread(target=self._loop, name="simulated task", daemon=True)
        self._thread.start()

    def begin(self, work: Callable[[], None]) -> bool:
        """Run a piece of work; True when it finished, False when it waits."""
        self._work = work
        self.finished = False
        return self.resume()

    def resume(self) -> bool:
        """Go on where it waits; True when the work finished, False when it waits again. Raises what it raised."""
        self._go.release()
        self._back.acquire()
        error, self._error = self._error, None
        if error is not None:
            raise error
        return self.finished

    def wait(self) -> None:
        """In the strand: hand over to the simulation until it resumes this strand. Raises ``Abandoned``, or
        ``KeyboardInterrupt`` as in a real worker whose task is cancelled."""
        if not self._abandoned:
            self._back.release()
            self._go.acquire()
        self._check()

    def _check(self) -> None:
        if self._abandoned:
            raise Abandoned
        if self._interrupted:
            self._interrupted = False
            raise KeyboardInterrupt

    def interrupt(self) -> None:
        """The work is to get a ``KeyboardInterrupt`` where it waits, when it is resumed."""
        self._interrupted = True

    def abandon(self) -> None:
        """Make work that waits unwind; whatever it raises or waits for then is ignored."""
        self._abandoned = True
        try:
            if not self.finished:
                self.resume()
        except BaseException:
            pass
        self._abandoned = False

    def close(self) -> None:
        """End the thread."""
        if not self.finished:
            self.abandon()
        self._work = None
        self._go.release()
        self._thread.join(timeout=1.0)

    def _loop(self) -> None:
        current.strand = self
        while True:
            self._go.acquire()
            work, self._work = self._work, None
            if work is None:
                return
            try:
                work()
            except Abandoned:
                pass
            except BaseException as error:
                self._error = error
            self.finished = True
            del work
            self._back.release()


class _Current(threading.local):
    strand: Strand | None = None


current = _Current()
"""The strand this thread is, if it is one."""


class Strands:
    """All strands of a simulation; those that have finished are used again."""

    def __init__(self) -> None:
        self._free: list[Strand] = []
        self._all: list[Strand] = []

    def take(self) -> Strand:
        """A strand with nothing to do."""
        if self._free:
            return self._free.pop()
        strand = Strand()
        self._all.append(strand)
        return strand

    def give_back(self, strand: Strand) -> None:
        """The strand has finished."""
        self._free.append(strand)

    def close(self) -> None:
        """End all threads, making those that wait unwind."""
        for strand in self._all:
            strand.close()
        self._all.clear()
        self._free.clear()


def is_leaf(function: object) -> bool:
    """Whether a function plainly neither waits nor does anything but compute: its code names nothing but harmless
    built-ins. A wrong yes costs nothing but time: what waits after all is run again, on a strand."""
    code = getattr(function, "__code__", None)
    return isinstance(code, CodeType) and not code.co_freevars and _pure(code, getattr(function, "__globals__", {}))


def _pure(code: CodeType, names: dict[str, object]) -> bool:
    for name in code.co_names:
        if name not in PURE_BUILTINS or name in names or not hasattr(builtins, name):
            return False
    return all(_pure(inner, names) for inner in code.co_consts if isinstance(inner, CodeType))
