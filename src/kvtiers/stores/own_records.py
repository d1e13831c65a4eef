"""Which records an instance has in a store that others share, where the store can't be asked and a write does not tell what it replaced.

Those it has written and not removed, each once, however often it was written; a million at most. Memory only; any thread.
"""

from __future__ import annotations

import threading
from typing import Final

from kvtiers.model.parts import RecordRef

_MOST: Final = 1 << 20
"""Some 80 bytes each."""


class OwnRecords:
    """The records of one instance, to be counted."""

    def __init__(self, most: int = _MOST) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._hashes: dict[int, None] = {}

    def written(self, ref: RecordRef) -> None:
        """Anew, or again."""
        with self._lock:
            self._hashes[hash(ref)] = None
            if len(self._hashes) > self._most:
                del self._hashes[next(iter(self._hashes))]

    def removed(self, ref: RecordRef) -> None:
        """By this instance; no matter if another one had written it."""
        with self._lock:
            self._hashes.pop(hash(ref), None)

    def __len__(self) -> int:
        return len(self._hashes)
