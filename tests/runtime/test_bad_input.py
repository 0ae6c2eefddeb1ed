"""Bad input: the right exception, a sentence that says what to do, and a cluster that goes on."""

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trio_ray as ray
from trio_ray import exceptions
from trio_ray.runtime.client import driver
from trio_ray.runtime.client.find import SECRET_VARIABLE
from trio_ray.runtime.launch.local import ClusterFile

MEGABYTE = 1 << 20
STORE = 64 * MEGABYTE


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterFile]:
    with ray.init(nodes=2, num_cpus=2, resources={"lamp": 1}, object_store_memory=STORE):
        assert driver._driver is not None and driver._driver.cluster is not None
        yield driver._driver.cluster.file


@pytest.fixture(autouse=True)
def it_goes_on(cluster: ClusterFile) -> Iterator[None]:
    yield
    assert ray.get([add.remote(i, 1) for i in range(10)], timeout=20) == list(range(1, 11))
    assert ray.get(ray.remote(resources={"lamp": 1})(lambda: "on").remote(), timeout=20) == "on"


@ray.remote
def add(*values: int) -> int:
    return sum(values)


@ray.remote
class Counter:
    def __init__(self, start: int = 0) -> None:
        self.value = start

    def add(self, amount: int = 1) -> int:
        self.value += amount
        return self.value

    @ray.method(num_returns=2)
    def pair(self) -> int:
        return 1


class Unpicklable:
    def __reduce__(self) -> Any:
        raise RuntimeError("this one stays at home")


class Bomb:
    """Pickles well; unpickling fails."""

    def __reduce__(self) -> Any:
        return int, ("not a number",)


# -- values ------------------------------------------------------------------------------------------------------


def test_unpicklable_arguments_are_named() -> None:
    with pytest.raises(TypeError, match=r"argument of add: number 1:.*stays at home"):
        add.remote(1, Unpicklable())
    with pytest.raises(TypeError, match=r"argument of .*: what:.*lock"):
        ray.remote(lambda what: what).remote(what=threading.Lock())
    with pytest.raises(TypeError, match="stays at home"):
        ray.put([1, Unpicklable()])
    counter = Counter.remote()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"add: number 0:.*stays at home"):
        counter.add.remote(Unpicklable())
    with pytest.raises(TypeError, match="stays at home"):
        Counter.remote(Unpicklable())  # type: ignore[attr-defined]
    assert ray.get(counter.add.remote()) == 1, "nothing is missing in the order of calls"


def test_unpicklable_results_and_closures_are_errors() -> None:
    kept = Unpicklable()
    with pytest.raises(TypeError, match="stays at home"):
        ray.remote(lambda: kept).remote()
    with pytest.raises(TypeError, match=r"return value.*stays at home"):
        ray.get(ray.remote(lambda: Unpicklable()).remote(), timeout=20)
    with pytest.raises(TypeError, match=r"return value.*stays at home"):
        ray.get(ray.remote(num_returns=2)(lambda: (1, Unpicklable())).remote(), timeout=20)


def test_what_cannot_be_unpickled_is_an_error_where_it_is_read() -> None:
    with pytest.raises(ValueError, match="not a number"):
        ray.get(ray.put(Bomb()))
    with pytest.raises(ValueError, match="not a number"):
        ray.get(add.remote(1, Bomb()), timeout=20)
    with pytest.raises(ValueError, match="not a number"):
        ray.get(add.remote(1, ray.put(Bomb())), timeout=20)
    with pytest.raises(exceptions.ActorDiedError, match=r"constructor of Counter.*\n(.*\n)*ValueError.*not a number"):
        ray.get(Counter.remote(Bomb()).add.remote(), timeout=20)  # type: ignore[attr-defined]
    counter = Counter.remote()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="not a number"):
        ray.get(counter.add.remote(Bomb()), timeout=20)
    assert ray.get(counter.add.remote(), timeout=20) == 1


def test_wrong_arguments_and_returns() -> None:
    @ray.remote
    def one(x: int) -> int:
        return x

    with pytest.raises(TypeError, match="argument"):
        ray.get(one.remote(1, 2), timeout=20)
    with pytest.raises(exceptions.ActorDiedError, match=r"TypeError.*argument"):
        ray.get(Counter.remote(1, 2, 3).add.remote(), timeout=20)  # type: ignore[attr-defined]
    counter = Counter.remote()  # type: ignore[attr-defined]
    with pytest.raises(AttributeError, match="no_such"):
        counter.no_such.remote()
    with pytest.raises(ValueError, match=r"pair is to return 2 values.*returned one int"):
        ray.get(counter.pair.remote(), timeout=20)
    with pytest.raises(ValueError, match="returned 3"):
        ray.get(ray.remote(num_returns=2)(lambda: (1, 2, 3)).remote(), timeout=20)


# -- calls -------------------------------------------------------------------------------------------------------


def test_calling_what_is_remote_directly() -> None:
    with pytest.raises(TypeError, match=r"add\.remote\("):
        add(1, 2)
    with pytest.raises(TypeError, match=r"Counter\.remote\("):
        Counter()
    counter = Counter.remote()  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match=r"add\.remote\("):
        counter.add()


@pytest.mark.parametrize("wrong", [1, None, "x", [1], [None], object()])
def test_get_of_what_is_no_reference(wrong: Any) -> None:
    with pytest.raises(ValueError, match="ObjectRef"):
        ray.get(wrong)


def test_wait_of_what_it_cannot() -> None:
    ref, other = add.remote(1), add.remote(2)
    for wrong, kind, pattern in (
        ([ref, ref], ValueError, "twice|duplicate|unique"), ([], ValueError, "empty|at least one"),
        (ref, TypeError, "list"), ([1], TypeError, "ObjectRef"),
    ):
        with pytest.raises(kind, match=pattern):
            ray.wait(wrong)  # type: ignore[arg-type]
    for count in (0, -1, 3):
        with pytest.raises(ValueError, match="num_returns"):
            ray.wait([ref, other], num_returns=count)
    with pytest.raises(ValueError, match="first_error"):
        ray.wait([ref], return_when="whenever")


def test_put_of_a_reference() -> None:
    with pytest.raises(TypeError, match="put a list that holds it"):
        ray.put(add.remote(1))


@pytest.mark.parametrize(
    ("options", "kind", "pattern"),
    [
        ({"num_cpu": 1}, ValueError, "num_cpus"),
        ({"num_cpus": -1}, ValueError, "num_cpus"),
        ({"num_cpus": "2"}, TypeError, "num_cpus"),
        ({"resources": {"CPU": 1}}, ValueError, "num_cpus"),
        ({"resources": ["lamp"]}, TypeError, "dict"),
        ({"num_returns": -1}, ValueError, "num_returns"),
        ({"max_retries": 1.5}, TypeError, "max_retries"),
        ({"scheduling_strategy": 3}, TypeError, "scheduling_strategy"),
        ({"max_restarts": 1}, ValueError, "no option of remote functions"),
    ],
)
def test_wrong_options_fail_where_they_are_declared(
    options: dict[str, Any], kind: type[Exception], pattern: str
) -> None:
    with pytest.raises(kind, match=pattern):
        ray.remote(**options)(lambda: None)
    with pytest.raises(kind, match=pattern):
        add.options(**options)


def test_an_unknown_policy_is_a_sentence() -> None:
    with pytest.raises(exceptions.TaskUnschedulableError, match=r"no-such-policy.*bottom-up"):
        ray.get(add.options(scheduling_strategy="no-such-policy").remote(1), timeout=20)
    with pytest.raises(exceptions.TaskUnschedulableError, match="no_such_module"):
        ray.get(add.options(scheduling_strategy="no_such_module:Policy").remote(1), timeout=20)


# -- resources ---------------------------------------------------------------------------------------------------


def test_what_no_node_has_is_a_sentence() -> None:
    ref = add.options(resources={"unicorn": 1}).remote(1)
    with pytest.raises(exceptions.TaskUnschedulableError, match=r"add asks for.*unicorn.*trio-ray start"):
        ray.get(ref, timeout=20)
    with pytest.raises(exceptions.TaskUnschedulableError, match=r"3 CPU.*at most 2 CPU"):
        ray.get(add.options(num_cpus=3).remote(1), timeout=20)
    with pytest.raises(exceptions.TaskUnschedulableError, match="unicorn"):
        ray.get(add.remote(ref), timeout=20)
    actor = Counter.options(num_gpus=1).remote()  # type: ignore[attr-defined]
    for _ in range(2):
        with pytest.raises(exceptions.ActorUnschedulableError, match=r"Counter asks for.*1 GPU.*trio-ray start"):
            ray.get(actor.add.remote(), timeout=20)


def test_a_put_that_is_too_large_loses_nothing() -> None:
    kept = [ray.put(np.full(MEGABYTE, i, dtype=np.uint8)) for i in range(4)]
    with pytest.raises(exceptions.ObjectStoreFullError, match=r"no room for.*object_store_memory"):
        ray.put(np.zeros(STORE + 1, dtype=np.uint8))
    more = []
    with pytest.raises(exceptions.ObjectStoreFullError, match="no room"):
        for _ in range(100):
            more.append(ray.put(np.ones(8 * MEGABYTE, dtype=np.uint8)))
    assert 5 <= len(more) <= 8
    with pytest.raises(exceptions.ObjectStoreFullError, match="no room"):
        add.remote(1, np.ones(8 * MEGABYTE))  # type: ignore[arg-type]
    assert [int(ray.get(ref)[-1]) for ref in kept] == [0, 1, 2, 3]
    del more
    assert int(ray.get(ray.put(np.ones(32 * MEGABYTE, dtype=np.uint8))).sum()) == 32 * MEGABYTE


def test_a_result_that_is_too_large_is_an_error() -> None:
    with pytest.raises(exceptions.ObjectStoreFullError, match="no room"):
        ray.get(ray.remote(lambda: np.zeros(STORE + 1, dtype=np.uint8)).remote(), timeout=20)

    @ray.remote
    def put_too_much() -> str:
        try:
            ray.put(np.zeros(STORE + 1, dtype=np.uint8))
        except exceptions.ObjectStoreFullError:
            return "caught"
        return "not caught"

    assert ray.get(put_too_much.remote(), timeout=20) == "caught"


# -- addresses ---------------------------------------------------------------------------------------------------

INIT = """
import sys, trio_ray as ray
for call in sys.argv[1:]:
    try:
        eval(call)
    except Exception as error:
        print(type(error).__name__, error)
    else:
        print("it started")
"""


def said(*calls: str, **environment: str) -> list[str]:
    """What these calls raise in another process, which is part of no cluster."""
    lines = subprocess.run(
        [sys.executable, "-c", INIT, *calls], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, timeout=30,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment}, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert len(lines) == len(calls), lines
    return lines


def test_dead_addresses_are_sentences(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        dead = f"127.0.0.1:{server.getsockname()[1]}"
    secret = tmp_path / "secret"
    secret.write_text("00" * 32)
    calls = [f"ray.init({address!r})" for address in (dead, f"tcp://{dead}", f"ws://{dead}")]
    for line in said(*calls, **{SECRET_VARIABLE: str(secret)}):
        assert line.startswith("ConnectionError no cluster answers at") and dead in line
    (line,) = said("ray.init('tcp://nowhere.invalid:1234')", **{SECRET_VARIABLE: str(secret)})
    assert line.startswith("ConnectionError") and "nowhere.invalid" in line
    first, second = said("ray.init('no such thing')", "ray.init('ftp://there:1')")
    assert first.startswith("ValueError") and "no such thing" in first
    assert second.startswith("ValueError") and "tcp" in second


def test_wrong_secrets_are_sentences(cluster: ClusterFile, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    join = f"ray.init({cluster.head.tcp!r})"
    elsewhere = {"XDG_RUNTIME_DIR": str(tmp_path), SECRET_VARIABLE: str(secret)}
    (line,) = said(join, **elsewhere)
    assert line.startswith("ConnectionError") and str(secret) in line and "No such file" in line
    secret.write_text("00" * 32)
    (line,) = said(join, **elsewhere)
    assert line.startswith("AuthenticationError") and "use the secret file of the same cluster" in line
    secret.write_text("this is no secret")
    (line,) = said(join, **elsewhere)
    assert line.startswith("ConnectionError") and "cannot be read" in line


def test_clusters_that_cannot_be_are_sentences() -> None:
    wrong = {
        "policy='no-such-policy'": ("StartError", "no-such-policy"),
        "num_cpus=-1": ("ValueError", "num_cpus"),
        "nodes=0": ("ValueError", "nodes"),
        "nodes=1.5": ("ValueError", "nodes"),
        "labels={'a': 1}": ("ValueError", "labels"),
        "object_store_memory=-5": ("ValueError", "object_store_memory"),
        "object_store_memory=10**15": ("StartError", "ask for a smaller one"),
        "runtime_env={'pip': []}": ("ValueError", "runtime_env"),
        "policy='os:path'": ("StartError", "policy"),
    }
    lines = said(*[f"ray.init({options})" for options in wrong])
    for line, (kind, pattern) in zip(lines, wrong.values(), strict=True):
        assert line.startswith(kind) and pattern in line, line
