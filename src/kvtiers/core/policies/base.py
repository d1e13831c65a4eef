"""The contract of an eviction policy: which chunk leaves a tier next.

A policy orders keys; it owns no bytes and frees nothing. Keys are any hashable thing, sizes any positive number, and a key
need not have a parent: policies serve chains of chunks, but also plain key-value use. Every call is O(1) amortised unless it
says otherwise, deterministic, and gets the time from its caller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterator
from enum import Enum
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)


class Standing(Enum):
    """How a key enters."""

    ESTABLISHED = "established"
    """New work of the engine."""
    PROBATION = "probation"
    """Brought up from a slower tier: it has to be hit once more before it may push out what is established."""


class EvictionPolicy(ABC, Generic[K]):
    """Orders the keys of one tier."""

    @abstractmethod
    def insert(self, key: K, parent: K | None, nbytes: int, now: float, standing: Standing) -> None:
        """Add a key, or replace it. `parent` may be unknown to this policy, now or later."""

    @abstractmethod
    def touch(self, key: K, now: float) -> None:
        """The key was used. Of a chain, touch the last first, so that it dies from its tail. Unknown keys are ignored."""

    @abstractmethod
    def resize(self, key: K, nbytes: int) -> None:
        """The key's real size became known."""

    @abstractmethod
    def remove(self, key: K) -> None:
        """Forget the key. Unknown keys are ignored."""

    @abstractmethod
    def expedite(self, key: K) -> None:
        """The key can't be reached any more: let it go first. Unknown keys are ignored."""

    @abstractmethod
    def victim(self, now: float, may_go: Callable[[K], bool]) -> K | None:
        """The key to evict next, not removed yet; never one that has a child here, nor one that `may_go` denies.

        None if no key qualifies, or none was found within a bounded number of steps.
        """

    @abstractmethod
    def coldest_first(self) -> Iterator[K]:
        """All keys of this moment, those that would go first first. O(n log n).

        The call itself only takes a snapshot; keys may be added, used and removed, by other threads too, while it is walked.
        """

    @abstractmethod
    def idle_bytes(self, now: float) -> int:
        """Bytes of keys not touched for the idle time the policy was told of; 0 if none was. O(n)."""

    @abstractmethod
    def used_at(self, key: K) -> float | None:
        """When the key was inserted or touched last; None for an unknown key, and for one that can't be reached any more."""

    @abstractmethod
    def set_limits(self, probation_bytes: int, idle_after_s: float | None) -> None:
        """Bytes on probation before they evict each other first; seconds until a key counts as idle."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def __contains__(self, key: object) -> bool: ...

    @abstractmethod
    def check_integrity(self) -> list[str]:
        """What is wrong with the policy's own books. O(n)."""
