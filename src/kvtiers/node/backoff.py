"""When to try again: exponential, with jitter, so that many engines do not come back in one instant."""

from __future__ import annotations

import random
from typing import Final

FIRST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 5.0
_MANY: Final = 16


class Backoff:
    """Pauses between tries; `succeeded` begins anew."""

    def __init__(
        self, rng: random.Random, *, first_s: float = FIRST_PAUSE_S, longest_s: float = LONGEST_PAUSE_S
    ) -> None:
        self._rng = rng
        self._first_s = first_s
        self._longest_s = longest_s
        self._failures = 0

    def pause(self) -> float:
        """Seconds to wait after one more failure: between half and all of what the number of failures allows."""
        longest = min(self._longest_s, self._first_s * 2.0**self._failures)
        self._failures = min(self._failures + 1, _MANY)
        return longest * (0.5 + self._rng.random() / 2)

    def succeeded(self) -> None:
        """The next pause is the shortest again."""
        self._failures = 0

    def hopeless(self) -> None:
        """Trying soon would end the same: the longest pauses from now on."""
        self._failures = _MANY
