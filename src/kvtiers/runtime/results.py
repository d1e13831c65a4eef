"""What the library's calls give back."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from kvtiers.model.errors import CacheClosed, DeadlineExceeded
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.runtime.arguments import seconds, seconds_at_most_a_day
from kvtiers.runtime.uninterrupted import Uninterrupted


@dataclass(frozen=True, slots=True)
class Lookup:
    """What a load would find at this moment."""

    num_tokens: int
    """Tokens from the start that are cached."""
    tiers: tuple[Tier, ...]
    """Nearest tier of each chunk."""
    pending: int
    """Chunks among them that are being read at this moment."""
    stopped_by: MissReason | None
    """Why it is not more; None if every token is covered."""


@dataclass(frozen=True, slots=True)
class LoadedKV:
    """What a load brought."""

    num_tokens: int
    """Tokens from the start whose KV is in `kv`; the rest has to be computed."""
    kv: Any
    """`into`, or a fresh array `[num_layers, planes, num_tokens, num_kv_heads, head_dim]` (bf16 and fp8 as unsigned integers)."""
    tiers: tuple[Tier, ...]
    """Where each chunk came from."""
    stopped_by: MissReason | None
    """Why it is not more; None if every token is covered."""


@dataclass(frozen=True, slots=True)
class StoreReceipt:
    """What became of a store. Its KV was copied already: the caller may reuse its memory."""

    accepted: int
    """Chunks taken; they can be hit from now on."""
    accepted_tokens: int
    present: int
    """Chunks passed over: a tier has them, or another store is bringing them."""
    refusal: Refusal | None
    """Why the store ended before the last full chunk; None if it did not."""
    refusals: tuple[tuple[int, Refusal], ...]
    """Every chunk not taken, by its index."""
    _wait: Callable[[float], bool] = field(repr=False)

    def wait(self, timeout: float) -> None:
        """Wait until the accepted chunks have reached the tiers that are to have them. Raises DeadlineExceeded.

        What a tier failed to take counts as ended too: it stays in memory, and `stats()` counts the failure.
        """
        if not self._wait(seconds_at_most_a_day(timeout)):
            raise DeadlineExceeded(
                f"the chunks had not reached their tiers after {timeout} s; they still may"
            )


class PendingLoad:
    """A load under way. `result` gives what came; it is complete by the load's deadline plus the time to copy."""

    __slots__ = (
        "_cancelled",
        "_copying",
        "_done",
        "_error",
        "_lock",
        "_on_end",
        "_patience",
        "_pid",
        "_result",
        "_stop",
    )

    def __init__(self, patience: float, on_end: Callable[[], None] | None = None) -> None:
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._on_end = on_end
        self._patience = patience
        self._pid = os.getpid()
        self._cancelled = False
        self._copying = False
        self._stop: Callable[[], None] | None = None
        self._result: LoadedKV | None = None
        self._error: BaseException | None = None

    def done(self) -> bool:
        """Whether `result` returns at once."""
        return self._done.is_set()

    def result(self, timeout: float | None = None) -> LoadedKV:
        """Wait for it (default: a minute past the load's deadline). Raises DeadlineExceeded, InvalidArgument, or what went wrong."""
        patience = self._patience if timeout is None else seconds(timeout)
        self._check_process()
        if not self._done.is_set() and not self._done.wait(patience):
            raise DeadlineExceeded(
                "the load has not ended and may still write to its arrays; call result again, or cancel() and compute the prompt"
            )
        if self._error is not None:
            raise self._error
        assert self._result is not None  # set before the event
        return self._result

    def cancel(self, timeout: float = 10.0) -> None:
        """Give the load up; when this returns nothing writes to its arrays any more. `result` then raises, if it had not ended.

        A copy that has begun is waited for. Raises DeadlineExceeded if it had not ended at the time-out.
        """
        timeout = seconds_at_most_a_day(timeout)
        self._check_process()
        with Uninterrupted():
            with self._lock:
                self._cancelled = True
                copying, stop = self._copying, self._stop
            if stop is not None:
                stop()
        if copying and not self._done.wait(timeout):
            raise DeadlineExceeded(
                "the load is being copied and had not ended: its arrays may still be written to"
            )
        self.fail(CacheClosed("this load was cancelled"))

    def _check_process(self) -> None:
        """In a forked child nobody brings what had not come at the fork, and locks may be held for ever."""
        if os.getpid() != self._pid and not self._done.is_set():
            raise CacheClosed(
                f"this load belongs to the parent process {self._pid}; open a cache in the child, with a disk path of its own"
            )

    def begin_copy(self, stop: Callable[[], None] | None = None) -> bool:
        """For the cache: whether the caller's arrays may be written to from now on. `stop`: end a copy that waits for more to come."""
        with self._lock:
            self._copying, self._stop = not self._cancelled, stop
            return self._copying

    def succeed(self, result: LoadedKV) -> None:
        """For the cache: it is there. What was said first holds."""
        self._end(result, None)

    def fail(self, error: BaseException) -> None:
        """For the cache: it can't be. What was said first holds."""
        self._end(None, error)

    def _end(self, result: LoadedKV | None, error: BaseException | None) -> None:
        with Uninterrupted():
            with self._lock:
                if self._done.is_set():
                    return
                self._result, self._error, self._stop = result, error, None
                self._done.set()
            on_end, self._on_end = self._on_end, None
            if on_end is not None:
                on_end()
