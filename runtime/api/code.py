"""Functions and classes on their way to workers.

A function is pickled once, when it is first called remotely, and named by its content. A worker that unpickled it
remembers the name, so that a function that calls itself remotely, or is passed on, is never pickled again.
"""

import pickle
import sys
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from trio_ray.runtime.api import serialize
from trio_ray.runtime.core.ids import content_id
from trio_ray.runtime.core.messages import Function

_loaded: "WeakKeyDictionary[Any, Function]" = WeakKeyDictionary()
"""What this process unpickled, by the function or class that came out."""
_seen_paths: set[tuple[str, ...]] = set()


class Code:
    """A function or class, pickled at most once in this process.

    It travels inside other functions' globals and closures: as its bytes if it was pickled before, otherwise as the
    function itself (which ends the recursion of functions that refer to each other).
    """

    __slots__ = ("_pickling", "_target", "function", "name")

    def __init__(self, target: Any, function: Function | None = None) -> None:
        self._target = target
        self.function = function
        """The row for the function table, once pickled."""
        self.name: str = function.name if function is not None else getattr(target, "__qualname__", repr(target))
        self._pickling = False

    @property
    def target(self) -> Any:
        """The function or class itself."""
        if self._target is None:
            assert self.function is not None
            self._target = load(self.function)
        return self._target

    def export(self) -> Function:
        """The row for the function table. Raises TypeError with a sentence if it cannot be pickled."""
        if self.function is None:
            known = _loaded.get(self._target)
            if known is None:
                self._pickling = True
                try:
                    code = serialize.pickle_code(self._target)
                finally:
                    self._pickling = False
                pickled = pickle.dumps((_paths(), code), 5)
                known = Function(content_id(pickled), self.name, pickled)
            self.function = known
        return self.function

    def __reduce__(self) -> tuple[Any, ...]:
        if self.function is None and not self._pickling and self._target not in _loaded:
            self.export()
        function = self.function or _loaded.get(self._target)
        if function is not None:
            return Code, (None, function)
        return Code, (self._target,)


def _paths() -> tuple[str, ...]:
    """Where this process finds modules that another may not: the script's directory and the like."""
    found = []
    for entry in sys.path:
        path = Path(entry or ".").absolute()
        if path.is_dir() and not path.is_relative_to(sys.prefix) and not path.is_relative_to(sys.base_prefix):
            found.append(str(path))
    return tuple(found)


def load(function: Function) -> Any:
    """The function or class of a row of the function table."""
    paths, code = pickle.loads(function.pickled)
    if paths not in _seen_paths:
        _seen_paths.add(paths)
        sys.path += [path for path in paths if path not in sys.path]
    target = pickle.loads(code)
    try:
        _loaded[target] = function
    except TypeError:  # a callable that cannot be referred to weakly
        pass
    return target
