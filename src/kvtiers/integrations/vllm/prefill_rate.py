"""How fast an engine computes prompts, from the steps it makes. Pure; its caller tells it the time."""

from __future__ import annotations

from collections import deque
from typing import Final

_MOST_WEIGHT: Final = 0.3
"""Of the newest step."""
_LEAST_TOKENS: Final = 64
"""Fewer in a step are mostly decoding, and their number says nothing of prefill."""


class PrefillRate:
    """Tokens a second, over the steps that are mostly prefill.

    An engine begins the next step as soon as it may have one more under way: with one at a time when a step has ended; with
    asynchronous scheduling, which has two, when the one before the last has. So a step is computed in the interval at the end of
    which the `in_flight`-th one after it begins.
    """

    def __init__(self, in_flight: int = 1) -> None:
        """`in_flight`: steps that the engine has under way at most."""
        self.tokens_per_s = 0.0
        """0 until one was seen."""
        self._steps: deque[int] = deque([0] * in_flight, maxlen=in_flight)
        self._began = 0.0

    def step(self, tokens: int, now: float) -> None:
        """A step with so many tokens begins."""
        ended, elapsed = self._steps[0], now - self._began
        if ended >= _LEAST_TOKENS and elapsed > 0:
            seen = ended / elapsed
            known = self.tokens_per_s
            self.tokens_per_s = seen if not known else known + _MOST_WEIGHT * (seen - known)
        self._steps.append(tokens)
        self._began = now
