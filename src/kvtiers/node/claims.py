"""How much of the arena one process may have to write to: what it was given stays taken until it says that it has written it, or ends.

Memory that a client never hands back is lost to all engines, however long that client lives; so a process may not have all of it.
"""

from __future__ import annotations

from typing import Final

SHARE: Final = 0.5
"""Of the arena. A step's stores are a few chunks; half leaves the others theirs, and room for loads."""


class Claims:
    """What the connections of one process have open to write to, in bytes. On the control thread; any other may read."""

    def __init__(self, arena_bytes: int) -> None:
        self._most = int(arena_bytes * SHARE)
        self.nbytes = 0

    def room(self, chunk_bytes: int) -> int:
        """Bytes that it may still be given; a chunk at least if it has nothing, however small the arena is."""
        return max(self._most - self.nbytes, 0 if self.nbytes else chunk_bytes)
