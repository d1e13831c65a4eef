"""What became of offloads: counts, last errors and latencies for each target. Any thread; bounded in targets."""

from __future__ import annotations

import threading
from typing import Any, Final

from kvtiers.runtime.latency import Histogram

_MAX_TARGETS: Final = 16
_OTHERS: Final = "(others)"
_MAX_ERROR_CHARS: Final = 500


class _Target:
    __slots__ = ("durations", "failed", "last_error", "succeeded")

    def __init__(self) -> None:
        self.succeeded = 0
        self.failed = 0
        self.last_error: str | None = None
        self.durations = Histogram()


class OffloadMetrics:
    """Counts since it was made."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._targets: dict[str, _Target] = {}

    def record_success(self, target: str, duration: float) -> None:
        """An offload to `target` took `duration` seconds."""
        with self._lock:
            entry = self._target(target)
            entry.succeeded += 1
        entry.durations.observe(duration)

    def record_failure(self, target: str, error: str | BaseException) -> None:
        """An offload to `target` failed; its first 500 characters are kept until the next one fails."""
        text = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
        with self._lock:
            entry = self._target(target)
            entry.failed += 1
            entry.last_error = text[:_MAX_ERROR_CHARS]

    def to_dict(self) -> dict[str, Any]:
        """`succeeded` and `failed` in all, and `targets` with these, `last_error` and `duration` (a histogram in seconds) each."""
        with self._lock:
            targets = {
                name: {"succeeded": entry.succeeded, "failed": entry.failed, "last_error": entry.last_error}
                for name, entry in self._targets.items()
            }
            histograms = {name: entry.durations for name, entry in self._targets.items()}
        return {
            "succeeded": sum(int(entry["succeeded"] or 0) for entry in targets.values()),
            "failed": sum(int(entry["failed"] or 0) for entry in targets.values()),
            "targets": {
                name: {**entry, "duration": histograms[name].snapshot()} for name, entry in targets.items()
            },
        }

    def _target(self, name: str) -> _Target:
        """With the lock held."""
        if name not in self._targets and len(self._targets) >= _MAX_TARGETS:
            name = _OTHERS
        return self._targets.setdefault(name, _Target())
