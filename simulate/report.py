"""What a simulation found out: figures, a text to read, a trace to look at, plots."""

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from trio_ray.runtime.core.messages import Address, node_of
from trio_ray.runtime.core.spec import RESOURCE_UNIT, Resources
from trio_ray.simulate.cluster import ClusterSpec
from trio_ray.simulate.meter import Meter, Run

PERCENTILES = (50, 90, 95, 99)
GANTT_WORKERS = 200
"""Rows of the plot; of more workers, evenly chosen ones are shown."""


class Report(msgspec.Struct, kw_only=True):
    """The outcome of ``simulate.run``. Times are simulated seconds, sizes bytes."""

    makespan_s: float
    """From the program's begin to its end, the cluster being up already."""
    tasks: int
    """Tasks and actor calls that ran."""
    failed: int
    """Those of them that raised, or were cancelled while they ran."""
    throughput_per_s: float
    latency_s: dict[str, float]
    """From submission to the worker's report: ``mean``, ``p50``, ``p90``, ``p95``, ``p99``, ``max``."""
    utilisation: dict[str, float]
    """Part of each resource that tasks held, averaged over the makespan and all nodes; a task that waits in ``get``
    holds its CPU no longer."""
    bytes_moved: int
    """Of objects, from node to node."""
    transfers: int
    frames: int
    """Control frames from node to node."""
    frame_bytes: int
    placement: dict[str, int]
    """Why tasks ran where they did, and how many: kept where they were born, or placement's reasons."""
    tasks_by_node: dict[Address, int]
    node_process_busy: dict[str, float]
    """Part of the makespan that node processes (which schedule, keep objects, and the store) were busy: ``head``,
    ``mean``, ``max``."""
    event_log_hash: str
    """Of every message, timer and process of the run: the same for the same program, cluster, profile and seed."""
    messages: int
    """How many messages the history has."""
    nodes: int
    resources: dict[str, float]
    """Of the whole cluster."""
    policy: str
    network: str
    seed: int
    unused_costs: list[str]
    """Functions in ``costs`` that no task ran: misspelt, most likely."""
    cpu_s: float
    """Real CPU seconds that simulating took."""
    result: Any = None
    """What the program returned."""
    started_at: float = 0.0
    """When the program began, on the simulated clock (which ``runs`` are on)."""
    runs: list[Run] = []
    """Each task that ran: name, worker, start, end, resources held."""

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values; the program's result and the single runs left out."""
        names = [name for name in self.__struct_fields__ if name not in ("result", "runs")]
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> str:
        """``to_dict`` as JSON."""
        return json.dumps(self.to_dict(), indent=1)

    def __str__(self) -> str:
        shape = ", ".join(f"{amount:g} {name}" for name, amount in self.resources.items())
        title = (
            f"simulated {self.nodes:,} node{'s' * (self.nodes != 1)} ({shape}); policy {self.policy}, "
            f"network {self.network}, seed {self.seed}"
        )
        lines = [
            title,
            f"  makespan      {_seconds(self.makespan_s)}",
            f"  tasks         {self.tasks:,}" + (f" ({self.failed:,} failed)" if self.failed else ""),
            f"  throughput    {self.throughput_per_s:,.0f} tasks/s",
        ]
        if self.latency_s:
            lines.append("  latency       " + ", ".join(f"{k} {_seconds(v)}" for k, v in self.latency_s.items()))
        if self.utilisation:
            lines.append("  utilisation   " + ", ".join(f"{k} {v:.1%}" for k, v in self.utilisation.items()))
        busy = self.node_process_busy
        lines.append(f"  node process  head {busy['head']:.1%} busy, mean {busy['mean']:.1%}, max {busy['max']:.1%}")
        lines.append(f"  objects moved {_bytes(self.bytes_moved)} in {self.transfers:,} transfers")
        lines.append(f"  control       {self.frames:,} frames between nodes, {_bytes(self.frame_bytes)}")
        if self.placement:
            lines.append("  placement")
            lines += [f"    {count:>10,}  {reason}" for reason, count in self.placement.items()]
        if self.unused_costs:
            lines.append(f"  note: costs were given for {', '.join(self.unused_costs)}, which no task ran")
        lines.append(f"  event log     {self.event_log_hash} ({self.messages:,} messages)")
        lines.append(f"  simulating it took {self.cpu_s:.1f} s of CPU")
        return "\n".join(lines)

    def chrome_trace(self, path: str | Path) -> None:
        """Write the runs as a Chrome trace, for chrome://tracing or ui.perfetto.dev; a node is a process there, a
        worker a thread."""
        events: list[dict[str, Any]] = []
        nodes: dict[Address, int] = {node: index for index, node in enumerate(self.tasks_by_node)}
        for node, index in nodes.items():
            events.append({"ph": "M", "name": "process_name", "pid": index, "args": {"name": node}})
        for name, worker, start, end, held in self.runs:
            events.append(
                {
                    "ph": "X", "name": name, "cat": "task", "pid": nodes[node_of(worker)],
                    "tid": int(worker.partition("/")[2]), "ts": (start - self.started_at) * 1e6,
                    "dur": (end - start) * 1e6, "args": {n: units / RESOURCE_UNIT for n, units in held},
                }
            )  # fmt: skip
        Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")

    def plot(self, path: str | Path) -> None:
        """Draw what was in use over time, and which worker ran what when (PNG, SVG or PDF by the file's ending)."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from matplotlib.collections import PolyCollection

        figure, (above, below) = pyplot.subplots(
            2, 1, figsize=(10, 7), sharex=True, height_ratios=(1, 2), layout="constrained"
        )
        for name, total in self.resources.items():
            times, levels = self.usage(name)
            if len(times):
                above.step(times, levels / total * 100, where="post", label=f"{name} ({total:g})", linewidth=1)
        above.set_ylabel("in use (%)")
        above.set_ylim(0, 105)
        if above.has_data():
            above.legend(loc="upper right", frameon=False)
        above.set_title(
            f"{self.tasks:,} tasks on {self.nodes:,} nodes, policy {self.policy}: {_seconds(self.makespan_s)}"
        )
        workers = list(dict.fromkeys(worker for _, worker, *_ in self.runs))
        workers.sort(key=lambda worker: (node_of(worker), int(worker.partition("/")[2])))
        shown = workers[:: -(-len(workers) // GANTT_WORKERS)] if workers else []
        row = {worker: index for index, worker in enumerate(shown)}
        names = list(dict.fromkeys(name for name, *_ in self.runs))
        colours = pyplot.get_cmap("tab10")
        for index, name in enumerate(names[:10]):
            boxes = [
                [(start - self.started_at, y), (start - self.started_at, y + 0.9), (end - self.started_at, y + 0.9),
                 (end - self.started_at, y)]
                for run, worker, start, end, _ in self.runs
                if run == name and (y := row.get(worker, -1)) >= 0
            ]  # fmt: skip
            below.add_collection(PolyCollection(boxes, facecolor=colours(index), linewidth=0, label=name))
        below.set_xlim(0, self.makespan_s or 1)
        below.set_ylim(0, max(1, len(shown)))
        below.set_ylabel("worker" + (f" ({len(shown)} of {len(workers)})" if len(shown) < len(workers) else ""))
        below.set_xlabel("simulated time (s)")
        if names:
            below.legend(loc="upper right", fontsize="small")
        figure.savefig(path, dpi=120)
        pyplot.close(figure)

    def usage(self, resource: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """How much of a resource tasks held: times of change, from the program's begin, and the level from then on."""
        changes = [
            (at - self.started_at, units * sign)
            for _, _, start, end, held in self.runs
            for name, units in held
            if name == resource
            for at, sign in ((start, 1), (end, -1))
        ]
        if not changes:
            return np.empty(0), np.empty(0)
        table = np.array(changes)
        table = table[np.lexsort((table[:, 1], table[:, 0]))]
        return table[:, 0], np.cumsum(table[:, 1]) / RESOURCE_UNIT


def make_report(
    cluster: ClusterSpec, meter: Meter, *, started_at: float, ended_at: float, node_busy_s: list[float], result: object,
    event_log_hash: str, messages: int, policy: str, network: str, seed: int, unused_costs: list[str], cpu_s: float,
) -> Report:  # fmt: skip
    """Work the figures out."""
    makespan = ended_at - started_at
    totals: dict[str, int] = {}
    for info, _ in cluster.each():
        for name, units in info.resources:
            totals[name] = totals.get(name, 0) + units
    totals = {name: units for name, units in totals.items() if name in ("CPU", "GPU") or units}
    held: dict[str, float] = {}
    for busy in meter.busy.values():
        for name, amount in busy.items():
            held[name] = held.get(name, 0.0) + amount
    latencies = np.asarray(meter.latencies)
    latency = {}
    if len(latencies):
        latency["mean"] = float(latencies.mean())
        latency |= {f"p{p}": float(v) for p, v in zip(PERCENTILES, np.percentile(latencies, PERCENTILES), strict=True)}
        latency["max"] = float(latencies.max())
    span = makespan or float("inf")
    placed = sum(meter.reasons.values())
    reasons = sorted(meter.reasons.items(), key=lambda item: (-item[1], item[0]))
    kept = max(0, meter.tasks - placed)
    return Report(
        makespan_s=makespan,
        tasks=meter.tasks,
        failed=meter.failed,
        throughput_per_s=meter.tasks / span,
        latency_s=latency,
        utilisation={name: held.get(name, 0.0) / (units * span) for name, units in sorted(totals.items())},
        bytes_moved=meter.bytes_moved,
        transfers=meter.transfers,
        frames=meter.frames,
        frame_bytes=meter.frame_bytes,
        placement=({"kept at its node, or sent to its actor": kept} if kept else {}) | dict(reasons),
        tasks_by_node=dict(sorted(meter.placed.items())),
        node_process_busy={
            "head": node_busy_s[0] / span,
            "mean": sum(node_busy_s) / len(node_busy_s) / span,
            "max": max(node_busy_s) / span,
        },
        event_log_hash=event_log_hash,
        messages=messages,
        nodes=cluster.nodes,
        resources={name: units / RESOURCE_UNIT for name, units in sorted(totals.items())},
        policy=policy,
        network=network,
        seed=seed,
        unused_costs=unused_costs,
        cpu_s=cpu_s,
        result=result,
        started_at=started_at,
        runs=meter.runs,
    )


def _seconds(value: float) -> str:
    if value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    if value < 1:
        return f"{value * 1e3:.3g} ms"
    return f"{value:,.4g} s" if value < 100 else f"{value:,.1f} s"


def _bytes(value: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:,.3g} TB"


__all__ = ["Report", "Resources", "make_report"]
