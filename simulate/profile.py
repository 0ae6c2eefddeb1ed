"""What things cost on a machine: the table that simulated CPU time is charged from.

``trio-ray calibrate`` measures a machine and writes its profile as JSON; ``default_profile.json`` beside this file is
one that was measured so, for who has not calibrated. All times are seconds of CPU, all sizes bytes.
"""

import json
from functools import cache
from importlib.resources import files
from math import isfinite
from pathlib import Path

import msgspec

PROFILE_VERSION = 1


class ProfileError(ValueError):
    """A profile that cannot be used; the sentence says why and what to do."""


class KindCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one kind of message costs: a fixed part, and a part for each item (task, result, object) it carries."""

    step_message_s: float = 2e-6
    """Handling it in a machine's step."""
    step_item_s: float = 2e-6
    encode_message_s: float = 1e-6
    encode_item_s: float = 3e-7
    decode_message_s: float = 1e-6
    decode_item_s: float = 4e-7
    message_bytes: float = 32.0
    """On the wire, payloads left out."""
    item_bytes: float = 48.0


class ClientCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a driver's process (or a task that submits tasks) spends."""

    submit_s: float = 6e-6
    """For each task: pickling its arguments, making ids and references, encoding its part of the frame."""
    get_s: float = 4e-6
    """For each value it reads."""
    put_s: float = 1e-5
    """For each object it puts, bytes left out."""
    frame_s: float = 1e-5
    """For each frame sent or received."""
    byte_s: float = 2e-10
    """For each byte written to or read from the object store (a copy)."""
    submit_batch: int = 128
    """How many tasks a client that submits in a loop puts into a frame."""


class WorkerCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a worker process spends beside the function itself."""

    task_s: float = 1.2e-5
    """For each task: decoding, looking up, calling, pickling the result."""
    frame_s: float = 1.5e-5
    """For each batch of tasks received, and each batch of results sent."""
    start_s: float = 0.006
    """Forking it from the template until it has connected. Forks of one node follow each other."""


class LinkCost(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a node process spends on its links, and how long a frame is under way within a machine."""

    send_frame_s: float = 8e-6
    receive_frame_s: float = 1.2e-5
    byte_s: float = 3e-10
    """For each byte of a control frame, copied into and out of the socket."""
    unix_latency_s: float = 2.5e-5
    """From a process to its node or back, beyond the CPU time of both: waking the reader."""
    stream_bytes_per_s: float = 2e9
    """How fast one node process can push an object's bytes through a socket, whatever the link can do."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A machine's costs, and which machine it was."""

    version: int = PROFILE_VERSION
    """Of this format."""
    step_s: float = 1.5e-6
    """A machine's step beside its messages, which is also what a timer costs."""
    kinds: dict[str, KindCost] = {}
    """By message class; ``*`` stands for all others, which without it cost ``KindCost()``."""
    client: ClientCost = ClientCost()
    worker: WorkerCost = WorkerCost()
    link: LinkCost = LinkCost()
    measured_at: str = ""
    """Date and time, ISO 8601."""
    machine: dict[str, str] = {}
    """Processor, cores, kernel, Python and library versions."""
    spread: dict[str, float] = {}
    """Interquartile range over median of the repeated measurements, by what was measured: how far to trust them."""

    def kind(self, name: str) -> KindCost:
        """The costs of a message class."""
        return self.kinds.get(name) or self.kinds.get("*") or UNKNOWN_KIND

    def save(self, path: str | Path) -> None:
        """Write it as JSON."""
        Path(path).write_text(json.dumps(msgspec.to_builtins(self), indent=1) + "\n", encoding="utf-8")


UNKNOWN_KIND = KindCost()


def free_profile() -> Profile:
    """A machine on which the control plane costs nothing: for tests, and to see what remains of a program then."""
    nothing = dict.fromkeys(KindCost.__struct_fields__, 0.0)
    return Profile(
        step_s=0.0, kinds={"*": KindCost(**nothing)},
        client=ClientCost(submit_s=0, get_s=0, put_s=0, frame_s=0, byte_s=0),
        worker=WorkerCost(task_s=0, frame_s=0, start_s=0),
        link=LinkCost(send_frame_s=0, receive_frame_s=0, byte_s=0, unix_latency_s=0, stream_bytes_per_s=1e18),
    )  # fmt: skip


def load_profile(path: str | Path) -> Profile:
    """Read a profile file. Raises ``ProfileError`` if it is missing, corrupt, or of another version."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(
            f"the cost profile {path} cannot be read ({error}); write one with `trio-ray calibrate --out {path}`"
        ) from None
    return _parse(text, str(path))


@cache
def default_profile() -> Profile:
    """The profile that comes with the package."""
    return _parse((files(__package__) / "default_profile.json").read_text(encoding="utf-8"), "default_profile.json")


def _parse(text: str, where: str) -> Profile:
    again = f"measure this machine again with `trio-ray calibrate --out {where}`"
    try:
        plain = json.loads(text)
    except ValueError as error:
        raise ProfileError(f"the cost profile {where} is corrupt: it is not JSON ({error}); {again}") from None
    version = plain.get("version") if isinstance(plain, dict) else None
    if version != PROFILE_VERSION:
        raise ProfileError(
            f"the cost profile {where} has version {version!r}, and this trio-ray reads version {PROFILE_VERSION}; "
            + again
        )
    try:
        profile = msgspec.convert(plain, Profile)
    except msgspec.ValidationError as error:
        raise ProfileError(f"the cost profile {where} is corrupt: {error}; {again}") from None
    for name, value in _figures(msgspec.to_builtins(profile)):
        if not isfinite(value) or value < 0:
            raise ProfileError(f"the cost profile {where} is corrupt: {name} is {value}, which no cost can be; {again}")
    if profile.link.stream_bytes_per_s == 0 or profile.client.submit_batch == 0:
        raise ProfileError(f"the cost profile {where} is corrupt: a rate or a batch size is 0; {again}")
    return profile


def _figures(plain: dict[str, object], prefix: str = "") -> list[tuple[str, float]]:
    """All numbers of nested tables, with dotted names."""
    found: list[tuple[str, float]] = []
    for name, value in plain.items():
        if isinstance(value, dict):
            found += _figures(value, f"{prefix}{name}.")
        elif isinstance(value, int | float):
            found.append((prefix + name, float(value)))
    return found
