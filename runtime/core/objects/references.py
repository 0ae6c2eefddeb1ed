"""What this node tells the control store about references, and in which order.

The rule that makes counting safe: whatever drops a reference leaves this node only after every reference that this
node had announced before is counted. A reference handed from one holder to the next is so never uncounted in
between: the receiver's node announces its own hold, waits for the acknowledgement, and only then lets go of the
container or reports the task finished, which is what kept the object alive until then.
"""

from collections import deque

from trio_ray.runtime.core.effects import AnyEffect, Send
from trio_ray.runtime.core.ids import shard_of
from trio_ray.runtime.core.messages import HoldObjects, control_address


class HoldLedger:
    """Batches the node's holds; ``flush`` once at the end of each step."""

    def __init__(self, shards: int) -> None:
        self._shards = shards
        self._number = 0
        self._added: list[bytes] = []
        self._born: list[bytes] = []
        self._removed: list[bytes] = []
        self._unacknowledged: dict[int, None] = {}
        self._held_back: deque[tuple[int, list[bytes], list[AnyEffect]]] = deque()
        """Removals and effects, each with the last number that must be acknowledged before they may leave."""

    def add(self, object_id: bytes) -> None:
        """This node now holds the object."""
        self._added.append(object_id)

    def claim(self, object_id: bytes) -> None:
        """This node, which holds the object, owns it; said once it may be known elsewhere."""
        self._born.append(object_id)

    def remove(self, object_id: bytes) -> None:
        """This node no longer holds the object."""
        self._removed.append(object_id)

    @property
    def adding(self) -> bool:
        """Whether this step announced a hold."""
        return bool(self._added or self._born)

    def acknowledge(self, number: int) -> None:
        """The control store has counted the batch ``number``."""
        self._unacknowledged.pop(number, None)

    def flush(self, after_adds: list[AnyEffect]) -> list[AnyEffect]:
        """What may leave now: this step's additions, and every removal and ``after_adds`` whose turn has come."""
        effects: list[AnyEffect] = []
        if self._added or self._born:
            born = dict(self._by_shard(self._born))
            batches = {shard: (added, born.pop(shard, [])) for shard, added in self._by_shard(self._added)}
            batches.update({shard: ([], those) for shard, those in born.items()})
            for shard, (added, those) in batches.items():
                self._number += 1
                self._unacknowledged[self._number] = None
                effects.append(Send(control_address(shard), HoldObjects(self._number, added, [], those)))
            self._added, self._born = [], []
        if self._removed or after_adds:
            self._held_back.append((self._number, self._removed, after_adds))
            self._removed = []
        oldest = next(iter(self._unacknowledged), self._number + 1)
        while self._held_back and self._held_back[0][0] < oldest:
            _, removed, then = self._held_back.popleft()
            for shard, ids in self._by_shard(removed):
                effects.append(Send(control_address(shard), HoldObjects(0, [], ids)))
            effects += then
        return effects

    def _by_shard(self, object_ids: list[bytes]) -> list[tuple[int, list[bytes]]]:
        if self._shards == 1:
            return [(0, object_ids)] if object_ids else []
        split: dict[int, list[bytes]] = {}
        for object_id in object_ids:
            split.setdefault(shard_of(object_id, self._shards), []).append(object_id)
        return list(split.items())
