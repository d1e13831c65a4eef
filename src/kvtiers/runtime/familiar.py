"""Tokens seen under another salt or namespace: what turns "never seen" into an answer an operator can act on.

Remembers, for the first chunks stored, a digest of the bare tokens with the namespaces and salts they were stored under. Bounded,
in memory only, and it only ever names a reason: no KV is found through it.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

from kvtiers.model.reasons import MissReason

_CHAINS_EACH = 8


class Familiar:
    """Remembers the last `memory` first chunks."""

    def __init__(self, memory: int = 16_384) -> None:
        self._memory = memory
        self._lock = threading.Lock()
        self._seen: OrderedDict[bytes, list[tuple[bytes, bytes]]] = OrderedDict()

    def remember(self, first_chunk: memoryview, namespace: bytes, salt: bytes) -> None:
        """These tokens were stored."""
        digest = hashlib.sha256(first_chunk).digest()
        with self._lock:
            chains = self._seen.setdefault(digest, [])
            self._seen.move_to_end(digest)
            if (namespace, salt) not in chains:
                chains.append((namespace, salt))
                del chains[:-_CHAINS_EACH]
            if len(self._seen) > self._memory:
                self._seen.popitem(last=False)

    def reason(self, first_chunk: memoryview, namespace: bytes, salt: bytes) -> MissReason | None:
        """Why tokens that were never seen under this namespace and salt are known all the same; None if they are not."""
        with self._lock:
            chains = list(self._seen.get(hashlib.sha256(first_chunk).digest(), ()))
        if (namespace, salt) in chains:
            return None
        if any(known == namespace for known, _ in chains):
            return MissReason.SALT_DIFFERS
        return MissReason.NAMESPACE_CHANGED if chains else None
