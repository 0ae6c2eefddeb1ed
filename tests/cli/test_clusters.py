"""``trio-ray up``, ``status``, ``run``, ``start`` and ``down``, as a person types them."""

import json
from collections.abc import Callable
from pathlib import Path

from tests.cli.conftest import TrioRay
from trio_ray.runtime.launch.local import is_alive

PROGRAM = """
import sys
import trio_ray

@trio_ray.remote
def square(x):
    return x * x

trio_ray.init()
print(sys.argv[1:], len(trio_ray.nodes()), sum(trio_ray.get([square.remote(i) for i in range(10)])))
"""

LAST_NODE = '''
from trio_ray.runtime.core.scheduling.policies import Policy

class LastNode(Policy):
    """Everything goes to the node that joined last."""

    def keep(self, task, node):
        return False

    def place(self, task, nodes, inputs, rng):
        return max(nodes, key=lambda node: node.position)
'''

WHERE = """
import trio_ray

@trio_ray.remote
def here():
    import os
    return os.getppid()

trio_ray.init()
print(len(set(trio_ray.get([here.remote() for _ in range(20)]))))
"""


def test_a_cluster_goes_up_runs_a_program_and_goes_down(trio_ray: TrioRay, folder: Path) -> None:
    up = trio_ray("up", "--nodes", "2", "--cpus", "1", "--json")
    assert up.returncode == 0, up.stderr
    facts = json.loads(up.stdout)
    assert len(facts["processes"]) == 2

    status = trio_ray("status", "--json")
    assert status.returncode == 0, status.stderr
    told = json.loads(status.stdout)
    assert [row["Alive"] for row in told["nodes"]] == [True, True]
    assert told["resources"] == {"CPU": 2.0}
    assert facts["address"] in trio_ray("status").stdout

    (folder / "program.py").write_text(PROGRAM)
    ran = trio_ray("run", "program.py", "--size", "3")
    assert (ran.returncode, ran.stdout) == (0, "['--size', '3'] 2 285\n"), ran.stderr

    again = trio_ray("up")
    assert again.returncode == 1 and "is up already" in again.stderr and "trio-ray down" in again.stderr

    down = trio_ray("down")
    assert down.returncode == 0 and "has ended" in down.stdout
    assert not any(is_alive(pid) for pid in facts["processes"].values())


def test_a_program_that_fails_fails_the_command(trio_ray: TrioRay, folder: Path) -> None:
    assert trio_ray("up", "--cpus", "1").returncode == 0
    (folder / "program.py").write_text("raise SystemExit(3)")
    assert trio_ray("run", "program.py").returncode == 3


def test_a_policy_of_ones_own(trio_ray: TrioRay, folder: Path) -> None:
    (folder / "mine.py").write_text(LAST_NODE)
    (folder / "where.py").write_text(WHERE)
    up = trio_ray("up", "--nodes", "3", "--cpus", "1", "--policy", "mine:LastNode")
    assert up.returncode == 0, up.stderr
    ran = trio_ray("run", "where.py")
    assert (ran.returncode, ran.stdout) == (0, "1\n"), ran.stderr
    simulated = trio_ray("simulate", "noop", "--nodes", "3", "--policy", "mine:LastNode", "--set", "tasks=30", "--json")
    assert simulated.returncode == 0, simulated.stderr
    assert max(json.loads(simulated.stdout)["tasks_by_node"].values()) == 30


def test_a_node_joins_and_others_notice(trio_ray: TrioRay) -> None:
    assert trio_ray("start", "--head", "--detach", "--cpus", "1").returncode == 0
    address = json.loads(trio_ray("status", "--json").stdout)["address"]
    joined = trio_ray("start", "--address", address, "--detach", "--cpus", "2", "--resource", "disk=1")
    assert joined.returncode == 0, joined.stderr
    told = json.loads(trio_ray("status", "--json").stdout)
    assert told["resources"] == {"CPU": 3.0, "disk": 1.0}
    assert told["policy"] == "bottom-up"
    assert len(told["processes"]) == 2
    shown = trio_ray("status").stdout
    assert "elsewhere" not in shown and "policy bottom-up" in shown
    down = trio_ray("down", "--all")
    assert down.stdout.count("has ended") == 2


def test_what_cannot_be_is_a_sentence(refused: Callable[..., str], folder: Path) -> None:
    assert "trio-ray up" in refused("status")
    assert "trio-ray up" in refused("run", __file__)
    assert "no program nowhere.py" in refused("run", "nowhere.py")
    assert "choose one of bottom-up" in refused("up", "--policy", "nonsense")
    assert "no module 'nowhere'" in refused("up", "--policy", "nowhere:Policy")
    assert "NAME=AMOUNT" in refused("up", "--resource", "disk")
    assert "-1 CPU" in refused("up", "--cpus", "-1")
    assert "--head" in refused("start")
    assert "--secret-file" in refused("start", "--address", "tcp://127.0.0.1:9")
    assert "No such option" in refused("up", "--colour")
    assert "answers to 'elsewhere:1'" in refused("status", "--address", "elsewhere:1")


def test_a_dead_address_and_a_wrong_secret(trio_ray: TrioRay, refused: Callable[..., str], folder: Path) -> None:
    (folder / "secret").write_text("00" * 32)
    assert "127.0.0.1:9" in refused("start", "--address", "tcp://127.0.0.1:9", "--secret-file", "secret", "--detach")
    assert trio_ray("start", "--head", "--detach", "--cpus", "1").returncode == 0
    address = json.loads(trio_ray("status", "--json").stdout)["address"]
    assert "secret" in refused("start", "--address", address, "--secret-file", "secret", "--detach")
    assert len(json.loads(trio_ray("status", "--json").stdout)["nodes"]) == 1


def test_down_with_nothing_to_end(trio_ray: TrioRay) -> None:
    down = trio_ray("down")
    assert down.returncode == 0 and "nothing to end" in down.stdout
