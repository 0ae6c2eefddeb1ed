"""Commands that start, look at, use and stop real clusters."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from trio_ray.runtime.cli.output import console, print_json, stop, stopping_on

if TYPE_CHECKING:
    from trio_ray.runtime.launch.local import ClusterFile, LocalCluster

LOOK_EVERY_S = 0.2
"""How often a node in the foreground is looked after."""

Cpus = Annotated[float | None, typer.Option(help="CPUs of each node; by default its share of this machine's.")]
Gpus = Annotated[float, typer.Option(help="GPUs of each node.")]
Resource = Annotated[
    list[str] | None, typer.Option("--resource", metavar="NAME=AMOUNT", help="A custom resource of each node.")
]
Policy = Annotated[str, typer.Option(help="Scheduling policy: a name, or module:Class for one of your own.")]
Port = Annotated[int, typer.Option(help="TCP port of the head; 0: any free one.")]
WsPort = Annotated[int, typer.Option(help="Port for drivers over WebSocket; 0: any free one, -1: none.")]
Host = Annotated[str, typer.Option(help="What to listen on.")]
Insecure = Annotated[bool, typer.Option("--insecure", help="Allow listening beyond this machine without TLS.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]
Address = Annotated[str, typer.Option(help="Which cluster: its name or address; by default the newest of yours here.")]


def up(
    nodes: Annotated[int, typer.Option(min=1, help="Node processes.")] = 1,
    cpus: Cpus = None,
    gpus: Gpus = 0.0,
    resource: Resource = None,
    policy: Policy = "bottom-up",
    port: Port = 0,
    ws_port: WsPort = -1,
    host: Host = "127.0.0.1",
    insecure: Insecure = False,
    as_json: Json = False,
) -> None:
    """Start a cluster of real node processes on this machine, in the background."""
    from trio_ray.runtime.launch import local

    for file in local.clusters():
        if file.detached and file.head.pid:
            stop(f"A cluster is up already at {file.head.tcp}; use it, or end it with `trio-ray down` first.")
    cores = os.cpu_count() or 1
    each = cpus if cpus is not None else float(max(1, cores // nodes))
    cluster = _begin(
        nodes=nodes, resources=_amounts(each, gpus, resource), policy=policy, port=port, ws_port=ws_port, host=host,
        insecure=insecure,
    )  # fmt: skip
    with stopping_on(local.StartError), console(stderr=True).status(f"starting {nodes} node{'s' * (nodes > 1)}"):
        file = cluster.finish()
    if as_json:
        print_json(_facts(file))
        return
    out = console()
    out.print(f"[bold green]A cluster of {nodes} node{'s' * (nodes > 1)} is up[/] at [bold]{file.head.tcp}[/]")
    if file.head.ws:
        out.print(f"  over WebSocket   {file.head.ws}")
    out.print(f"  each node has    {_shape(file.head.resources)}")
    out.print(f"  policy           {file.policy}")
    out.print(f"  secret           {local.secret_file(file)}")
    out.print("Run a program on it with [bold]trio-ray run script.py[/]; end it with [bold]trio-ray down[/].")


def status(address: Address = "auto", as_json: Json = False) -> None:
    """Show the running cluster: its nodes, their resources, what is in use."""
    import trio_ray

    file = _choose(address)
    with stopping_on(ConnectionError, ValueError, trio_ray.exceptions.RayError), trio_ray.init(file.name):
        rows, total, free = trio_ray.nodes(), trio_ray.cluster_resources(), trio_ray.available_resources()
    if as_json:
        print_json(_facts(file) | {"nodes": rows, "resources": total, "available": free})
        return
    from rich.table import Table

    pids = {node.removeprefix("n:"): str(pid) for node, pid in _processes(file).items()}
    table = Table("node", "process", "address", "state", "resources", box=None, pad_edge=False, header_style="bold")
    for row in rows:
        state = "[green]alive[/]" if row["Alive"] else "[red]dead[/]"
        table.add_row(
            row["NodeID"], pids.get(row["NodeID"], "elsewhere"), row["NodeManagerAddress"], state,
            _shape(row["Resources"]),
        )  # fmt: skip
    out = console()
    age = time.strftime("%H:%M:%S", time.gmtime(time.time() - file.started_at))
    out.print(f"[bold]{file.head.tcp}[/], policy {file.policy}, up for {age}")
    out.print(table)
    used = ", ".join(f"{total[name] - free.get(name, 0.0):g} of {total[name]:g} {name}" for name in total)
    out.print(f"in use: {used or 'nothing'}")


def down(everything: Annotated[bool, typer.Option("--all", help="End all of your clusters here.")] = False) -> None:
    """End the cluster that runs in the background."""
    from trio_ray.runtime.launch import local

    files = [file for file in local.clusters() if file.detached]
    if not files:
        local.sweep()
        console().print("No cluster runs in the background; there is nothing to end.")
        return
    # Nodes that joined go with the cluster that they joined, before it; one of its own stays unless all are to go.
    first = files[0]
    for file in reversed(files if everything else [file for file in files if file.head.tcp == first.head.tcp]):
        with console(stderr=True).status(f"ending {len(file.nodes)} node processes"):
            local.stop_cluster(file)
        console().print(f"The {_cluster_or_node(file)} at {file.head.tcp} has ended.")


def start(
    head: Annotated[bool, typer.Option("--head", help="Start the head of a new cluster.")] = False,
    address: Annotated[str, typer.Option(help="Join the cluster whose head listens here: tcp://host:port.")] = "",
    secret_file: Annotated[
        Path | None, typer.Option(help="The cluster's secret, copied from the head's machine.", show_default=False)
    ] = None,
    cpus: Cpus = None,
    gpus: Gpus = 0.0,
    resource: Resource = None,
    policy: Policy = "bottom-up",
    port: Port = 0,
    ws_port: WsPort = -1,
    host: Host = "127.0.0.1",
    insecure: Insecure = False,
    detach: Annotated[bool, typer.Option("--detach", help="In the background; `trio-ray down` ends it.")] = False,
) -> None:
    """Start one node on this machine: the head of a new cluster, or one that joins a cluster."""
    from trio_ray.runtime.launch import local

    if head == bool(address):
        stop("Say either --head, to start a new cluster, or --address tcp://host:port, to join one.")
    resources = _amounts(cpus if cpus is not None else float(os.cpu_count() or 1), gpus, resource)
    if head:
        cluster = _begin(
            nodes=1, resources=resources, policy=policy, port=port, ws_port=ws_port, host=host, insecure=insecure,
            detached=detach,
        )  # fmt: skip
        with stopping_on(local.StartError):
            file = cluster.finish()
        node = file.head
    else:
        with stopping_on(local.StartError, ValueError):
            cluster = local.LocalCluster.join(
                _tcp(address), _secret(address, secret_file), resources=resources, host=host, port=port,
                insecure=insecure, detached=detach, log=True, sys_path=[str(Path.cwd())],
            )  # fmt: skip
        file = cluster.file
        node = file.nodes[0]
    out = console()
    name = node.node.removeprefix("n:")
    out.print(f"[bold green]The node {name} is up[/] at [bold]{node.tcp}[/] ({_shape(resources)})")
    if head:
        out.print(f"Others join with [bold]trio-ray start --address {node.tcp} --secret-file FILE[/],")
        out.print(f"where FILE is a copy of {local.secret_file(file)}")
    if detach:
        return
    out.print("Ctrl-C ends it.")
    _look_after(cluster, node.pid)


def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="The program; what follows is passed on to it.")],
    address: Address = "auto",
) -> None:
    """Run a program on the running cluster."""
    if not script.is_file():
        stop(f"There is no program {script}; name a Python file.")
    file = _choose(address)
    environment = os.environ | {"TRIO_RAY_ADDRESS": file.name}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, str(script), *context.args], environment)


def _begin(**options: Any) -> "LocalCluster":
    """A local cluster that is starting; logs go to files."""
    from trio_ray.runtime.core.scheduling.policies import load
    from trio_ray.runtime.launch import local

    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    with stopping_on(ValueError, local.StartError):
        load(options["policy"])
        return local.LocalCluster.begin(**{"detached": True, "log": True, "sys_path": [here], **options})


def _choose(address: str) -> "ClusterFile":
    """A running cluster of this machine: the newest in the background, unless ``address`` says which."""
    from trio_ray.runtime.launch import local

    files = local.clusters()
    if address != "auto":
        file = local.find(address)
        if file is None:
            known = ", ".join(file.head.tcp for file in files) or "none"
            stop(f"No cluster of yours on this machine answers to {address!r}; running: {known}.")
        return file
    if not files:
        stop("No cluster of yours runs on this machine; start one with `trio-ray up`.")
    return next((file for file in files if file.detached), files[0])


def _look_after(cluster: "LocalCluster", pid: int) -> NoReturn:
    """Stay until the node ends or the person ends it; leave nothing behind."""
    from trio_ray.runtime.launch import local

    def end(number: int, frame: object) -> NoReturn:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, end)
    try:
        while local.is_alive(pid):
            time.sleep(LOOK_EVERY_S)
        stop("The node has ended.")
    except KeyboardInterrupt:
        console().print("ending")
        raise typer.Exit(0) from None
    finally:
        cluster.stop()


def _amounts(cpus: float, gpus: float, named: list[str] | None) -> dict[str, float]:
    amounts = {"CPU": cpus}
    if gpus:
        amounts["GPU"] = gpus
    for text in named or []:
        name, equals, amount = text.partition("=")
        try:
            amounts[name] = float(amount)
        except ValueError:
            equals = ""
        if not equals or not name:
            stop(f"{text!r} is no resource; write NAME=AMOUNT, such as fast_disk=1.")
    for name, units in amounts.items():
        if units < 0:
            stop(f"A node cannot have {units:g} {name}; amounts are 0 or more.")
    return amounts


def _tcp(address: str) -> str:
    return address if "://" in address else f"tcp://{address}"


def _secret(address: str, path: Path | None) -> str:
    """The secret of the cluster to join: from the file, or known because its head runs here."""
    from trio_ray.runtime.launch import local

    if path is None:
        file = local.find(_tcp(address))
        if file is None:
            stop("Name the cluster's secret with --secret-file; `trio-ray up` and `start --head` say where it is.")
        return file.secret
    try:
        secret = path.read_text().strip()
        bytes.fromhex(secret)
    except (OSError, ValueError) as error:
        stop(f"The secret file {path} cannot be read: {error}.")
    return secret


def _facts(file: "ClusterFile") -> dict[str, Any]:
    return {
        "name": file.name, "address": file.head.tcp, "websocket": file.head.ws, "policy": file.policy,
        "started_at": file.started_at, "processes": _processes(file),
    }  # fmt: skip


def _processes(file: "ClusterFile") -> dict[str, int]:
    """The node processes of a cluster on this machine, also those that joined it later."""
    from trio_ray.runtime.launch import local

    files = [file, *(other for other in local.clusters() if other.head.tcp == file.head.tcp)]
    return {process.node: process.pid for known in files for process in known.nodes}


def _cluster_or_node(file: "ClusterFile") -> str:
    return "cluster" if file.head.pid else "node that joined the cluster"


def _shape(amounts: dict[str, float]) -> str:
    return ", ".join(f"{amount:g} {name}" for name, amount in amounts.items())
