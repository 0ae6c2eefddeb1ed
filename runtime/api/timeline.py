"""The cluster's log of tasks as a Chrome trace: a record of a run, for people and for the simulator's costs."""

import json
from pathlib import Path
from typing import Any

import msgspec

TASKS = 100_000
"""How many tasks a timeline holds at most: the newest."""
SUBJECT, ARGUMENT = "timeline", str(TASKS)
"""The ``Query`` that answers with the rows."""

Events = list[dict[str, Any]]


def chrome_events(answer: bytes) -> Events:
    """The trace events of the answer to the query: nodes are its processes, workers its threads, tasks its complete
    events. Times are microseconds, from the first submission on."""
    rows: list[dict[str, Any]] = msgspec.msgpack.decode(answer)
    ran = [row for row in rows if row["started_at"] and "/" in row["process"]]
    begin = min((row["submitted_at"] for row in ran), default=0.0)
    nodes: dict[str, int] = {}
    events: Events = []
    for row in ran:
        node, _, number = row["process"].partition("/")
        if node not in nodes:
            nodes[node] = len(nodes)
            events.append({"ph": "M", "name": "process_name", "pid": nodes[node], "args": {"name": node}})
        events.append(
            {
                "ph": "X",
                "cat": "task",
                "name": row["name"],
                "pid": nodes[node],
                "tid": int(number),
                "ts": (row["started_at"] - begin) * 1e6,
                "dur": (row["ended_at"] - row["started_at"]) * 1e6,
                "args": {
                    "task_id": row["task_id"],
                    "status": row["status"],
                    "queued_us": (row["started_at"] - row["submitted_at"]) * 1e6,
                    "reason": row["reason"],
                },
            }
        )
    return events


def save(events: Events, path: str | Path) -> None:
    """Write a trace file, for chrome://tracing, ui.perfetto.dev and ``simulate.recorded``."""
    Path(path).write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}), encoding="utf-8")
