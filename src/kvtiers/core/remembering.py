"""What was learnt of a shared store a little while ago: which chunks are there, and which keys are not.

Others write to such a store and remove from it, so both are true for a while only. Nothing is served on the strength of this: a chunk
believed to be there is read and verified before anybody is told of it. Forgetting a chunk means no more than asking again, and a chunk
that is still used and has meanwhile been lost there is written anew.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from kvtiers.core.index import Chunk, Space
from kvtiers.model.errors import KvtiersError
from kvtiers.model.keys import ChunkKey


@dataclass(frozen=True, slots=True)
class Remember:
    """For how long, and how much."""

    there_s: float = 60.0
    absent_s: float = 2.0
    most: int = 65_536
    """Chunks believed to be there, and keys believed not to be; of both the oldest are forgotten first."""

    def __post_init__(self) -> None:
        if self.there_s <= 0 or self.absent_s < 0 or self.most < 1:
            raise KvtiersError(f"there_s and most must be above 0, absent_s at least 0: {self}")


class Remembered:
    """The books of one store."""

    def __init__(self, settings: Remember) -> None:
        self._settings = settings
        self._there: OrderedDict[Chunk, float] = OrderedDict()
        self._absent: OrderedDict[tuple[Space, ChunkKey], float] = OrderedDict()

    def there(self, chunk: Chunk, now: float) -> None:
        """It is, at this moment."""
        self._absent.pop((chunk.space, chunk.key), None)
        self._there[chunk] = now + self._settings.there_s
        self._there.move_to_end(chunk)

    def absent(self, space: Space, key: ChunkKey, now: float) -> None:
        """It is not, at this moment."""
        self._absent[space, key] = now + self._settings.absent_s
        self._absent.move_to_end((space, key))
        while self._absent and (
            len(self._absent) > self._settings.most or next(iter(self._absent.values())) <= now
        ):
            self._absent.popitem(last=False)

    def is_absent(self, space: Space, key: ChunkKey, now: float) -> bool:
        """Whether it was not there a moment ago."""
        return self._absent.get((space, key), now) > now

    def forget(self, chunk: Chunk) -> None:
        """Nothing is known of it any more."""
        self._there.pop(chunk, None)

    def stale(self, now: float, most: int) -> list[Chunk]:
        """At most so many chunks of which too long ago something was learnt, or that are too many; they are forgotten with this."""
        taken: list[Chunk] = []
        while self._there and len(taken) < most:
            chunk, until = next(iter(self._there.items()))
            if until > now and len(self._there) <= self._settings.most:
                break
            del self._there[chunk]
            taken.append(chunk)
        return taken

    def __len__(self) -> int:
        return len(self._there)
