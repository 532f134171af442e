"""What clients of `/v1/responses` have asked to be kept (`store: true`), within bounds.

Owned by the service, in the memory of the front process: a restart forgets it all. Beyond the
bounds the least recently used goes. An owner's responses exist for nobody else.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import orjson

Item: TypeAlias = Mapping[str, Any]  # as `openai.types.responses.ResponseItem`

MAX_STORED = 4096  # responses: a few hundred conversations of a dozen turns
# Bytes as JSON; as Python's objects a few times as much, so this is about 256 MiB of a process
# that has gigabytes of engines beside it.
MAX_STORED_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A finished response and what it answered."""

    response: Mapping[str, Any]
    before: Sequence[Item]  # of the turns before it
    given: Sequence[Item]  # by its own request

    @property
    def input(self) -> list[Item]:
        """All that the model was given, the instructions left out."""
        return [*self.before, *self.given]

    @property
    def conversation(self) -> list[Item]:
        """What a next turn continues."""
        return [*self.before, *self.given, *self.response["output"]]


class ResponseStore:
    """Responses by owner and id."""

    def __init__(self, most: int = MAX_STORED, most_bytes: int = MAX_STORED_BYTES) -> None:
        self._most = most
        self._most_bytes = most_bytes
        self._kept: OrderedDict[tuple[str, str], tuple[StoredResponse, int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def bytes(self) -> int:
        """Of all that is kept. Turns that two responses share count for each of them."""
        return self._bytes

    def keep(self, owner: str, stored: StoredResponse) -> None:
        """Keep it, and let go of what was not used for longest. What exceeds all bytes is not kept.

        Takes some milliseconds for each megabyte.
        """
        whole = {"response": stored.response, "input": stored.input}
        size = len(orjson.dumps(whole))
        if size > self._most_bytes:
            return
        self._kept[owner, stored.response["id"]] = stored, size
        self._bytes += size
        while len(self._kept) > self._most or self._bytes > self._most_bytes:
            _, (_, freed) = self._kept.popitem(last=False)
            self._bytes -= freed

    def get(self, owner: str, id: str) -> StoredResponse | None:
        """The response of that name, which is used by that."""
        if (owner, id) not in self._kept:
            return None
        self._kept.move_to_end((owner, id))
        return self._kept[owner, id][0]

    def delete(self, owner: str, id: str) -> bool:
        """Forget it. Returns whether it was there."""
        found = self._kept.pop((owner, id), None)
        if found is None:
            return False
        self._bytes -= found[1]
        return True

    def items(self, owner: str, ids: Set[str]) -> dict[str, Item]:
        """The items of those names in any of the owner's responses. One pass over all of them,
        however many are asked for.
        """
        found: dict[str, Item] = {}
        for (who, _), (stored, _) in reversed(self._kept.items()):
            if len(found) == len(ids):
                break
            if who == owner:
                found |= {item["id"]: item for item in stored.conversation if item["id"] in ids}
        return found
