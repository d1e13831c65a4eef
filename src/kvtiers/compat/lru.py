"""`TieredLRUPolicy`: which keys stay on the GPU and in CPU memory, least recently used first out. Bookkeeping only: it owns no bytes.

Over the cache's own eviction policy, so every call is O(1) amortised for each key it moves; nothing sums over all keys. The threads are
the callers'; the lock is held for bookkeeping, never while the offload hook runs.

**What `insert` returns**: every key that left a tier, in order, as (key, size, tier it left). One that left "gpu" is in `cpu_lru`
from then on; one that left "cpu" is not in CPU memory any more (it may be on the GPU, if it was in both). A key that left the GPU and
is too large for the CPU tier is listed twice. So a caller that follows the list moves the bytes of each "gpu" entry to CPU memory, and
drops those of each "cpu" entry from it.

**With an `async_offloader`** the hook moves the bytes: it is called with (key, "cpu") for each key that left the GPU and is in the CPU
tier now, and the key's GPU bytes may go when it has ended. If it fails, the key is back where it was, on the GPU, as the first to be
evicted next, which calls the hook again; it is dropped only if the GPU's capacity above the threshold is used up. A failure before
`insert` returns is in the list already (a key that is back has not left).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import ItemsView, Iterator, Mapping, ValuesView
from enum import Enum
from typing import Final, NamedTuple, TypeAlias

from kvtiers.compat.offload_hook import AsyncOffloader, OffloadHook
from kvtiers.core.policies.base import Standing
from kvtiers.core.policies.lru import LeafFirstLRU
from kvtiers.model.errors import ConfigError, OutOfMemoryError, UnknownTier
from kvtiers.model.tiers import Tier
from kvtiers.runtime.arguments import whole

_log = logging.getLogger(__name__)

_GIB: Final = 1024**3
_NOW: Final = 0.0
"""The order of use needs no clock."""
_OFFLOAD_TIMEOUT_S: Final = 60.0

Evicted: TypeAlias = tuple[str, int, str]
"""Key, size in bytes, and the tier it left."""


class _Fate(Enum):
    """What became of a key whose hook has ended."""

    MOVED = "moved"
    BACK = "back on the GPU"
    DROPPED = "dropped: the GPU has no room left"
    OVERTAKEN = "left as it is: it was moved, stored or removed meanwhile"


class _Move(NamedTuple):
    """A key on its way from the GPU to CPU memory; known by identity."""

    key: str
    nbytes: int
    token: object


class TierOrder(Mapping[str, int]):
    """Keys of one tier with their sizes in bytes, least recently used first; read-only. Walking it copies it: O(n log n)."""

    __slots__ = ("_lock", "_order", "_sizes")

    def __init__(self, lock: threading.Lock, order: LeafFirstLRU[str], sizes: dict[str, int]) -> None:
        self._lock = lock
        self._order = order
        self._sizes = sizes

    def __getitem__(self, key: str) -> int:
        return self._sizes[key]

    def __contains__(self, key: object) -> bool:
        return key in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def __iter__(self) -> Iterator[str]:
        return iter(self._snapshot())

    def items(self) -> ItemsView[str, int]:
        return self._snapshot().items()

    def values(self) -> ValuesView[int]:
        return self._snapshot().values()

    def __repr__(self) -> str:
        return f"TierOrder({self._snapshot()})"

    def _snapshot(self) -> dict[str, int]:
        with self._lock:
            return {key: self._sizes[key] for key in self._order.coldest_first()}


class _Books:
    """One tier. The policy's lock guards it."""

    def __init__(self, name: Tier, ceiling: int, lock: threading.Lock) -> None:
        self.name = name
        self.ceiling = ceiling
        self.used = 0
        self.order: LeafFirstLRU[str] = LeafFirstLRU()
        self.sizes: dict[str, int] = {}
        self.view = TierOrder(lock, self.order, self.sizes)

    def add(self, key: str, size: int) -> None:
        self.remove(key)
        self.order.insert(key, None, size, _NOW, Standing.ESTABLISHED)
        self.sizes[key] = size
        self.used += size

    def remove(self, key: str) -> bool:
        size = self.sizes.pop(key, None)
        if size is None:
            return False
        self.order.remove(key)
        self.used -= size
        return True

    def make_room(self, size: int) -> Iterator[tuple[str, int]]:
        """Remove the least recently used until `size` more bytes fit."""
        while self.used + size > self.ceiling:
            key = self.order.victim(_NOW, lambda _: True)
            if key is None:
                return
            nbytes = self.sizes[key]
            self.remove(key)
            yield key, nbytes


class TieredLRUPolicy:
    """LRU over two tiers: what is evicted from the GPU goes to CPU memory, what is evicted there is gone."""

    def __init__(
        self,
        gpu_capacity_gb: float,
        cpu_capacity_gb: float,
        eviction_threshold: float = 0.8,
        *,
        async_offloader: AsyncOffloader | None = None,
        offload_timeout_s: float = _OFFLOAD_TIMEOUT_S,
    ) -> None:
        """Capacities in GiB; each tier is filled up to `eviction_threshold` of its own. Raises ConfigError."""
        problems = [
            f"{name} must be {what}, got {value}"
            for name, value, good, what in (
                ("gpu_capacity_gb", gpu_capacity_gb, gpu_capacity_gb >= 0, "at least 0"),
                ("cpu_capacity_gb", cpu_capacity_gb, cpu_capacity_gb >= 0, "at least 0"),
                (
                    "eviction_threshold",
                    eviction_threshold,
                    0 < eviction_threshold <= 1,
                    "above 0 and at most 1",
                ),
                ("offload_timeout_s", offload_timeout_s, offload_timeout_s > 0, "above 0"),
            )
            if not good
        ]
        if problems:
            raise ConfigError(problems, source="TieredLRUPolicy")
        self.gpu_capacity: Final = int(gpu_capacity_gb * _GIB)
        self.cpu_capacity: Final = int(cpu_capacity_gb * _GIB)
        self.threshold: Final = eviction_threshold
        self.async_offloader = async_offloader
        self.offload_failures = 0
        """Calls of the hook that failed."""
        self._lock = threading.Lock()
        self._gpu = _Books(Tier.GPU, int(self.gpu_capacity * eviction_threshold), self._lock)
        self._cpu = _Books(Tier.CPU, int(self.cpu_capacity * eviction_threshold), self._lock)
        self._moving: dict[str, object] = {}
        """A token for each key in the CPU tier whose hook has not ended."""
        self._hook = OffloadHook(offload_timeout_s)

    # --- the policy ---------------------------------------------------------------------------------------------------

    @property
    def gpu_lru(self) -> TierOrder:
        """Key → size, least recently used first."""
        return self._gpu.view

    @property
    def cpu_lru(self) -> TierOrder:
        """Key → size, least recently used first."""
        return self._cpu.view

    def access(self, key: str, tier: str) -> None:
        """The key was used; one that is not there is ignored. Raises UnknownTier."""
        books = self._books(tier)
        with self._lock:
            books.order.touch(key, _NOW)

    def insert(self, key: str, size: int, tier: str) -> list[Evicted]:
        """Add a key as most recently used, or give it a new size; returns what left a tier (see the module).

        Raises UnknownTier; OutOfMemoryError if it can never fit, InvalidArgument for what is no size: then nothing has changed.
        """
        books = self._books(tier)
        size = whole(size, f"the size of {key!r} is a whole number of bytes", 0)
        if size > books.ceiling:
            raise OutOfMemoryError(
                f"{key!r} has {size} bytes, the {books.name} tier keeps {books.ceiling} "
                f"(its capacity times eviction_threshold={self.threshold}): it never fits; give the tier more"
            )
        with self._lock:
            books.remove(key)
            if books is self._gpu:
                evicted, moves = self._make_room_on_gpu(size)
            else:
                self._moving.pop(key, None)
                evicted, moves = list(self._make_room_in_cpu(size)), []
            books.add(key, size)
            moves = [move for move in moves if self._moving.get(move.key) is move.token]
        for move in moves:
            self._offload_to_cpu(move, evicted)
        return evicted

    def remove(self, key: str, tier: str) -> bool:
        """Forget a key, for whoever deletes its bytes; False if it was not there. Raises UnknownTier."""
        books = self._books(tier)
        with self._lock:
            if books is self._cpu:
                self._moving.pop(key, None)
            return books.remove(key)

    def usage(self, tier: str) -> int:
        """Bytes of the keys in a tier. O(1)."""
        return self._books(tier).used

    def close(self) -> None:
        """End the thread that drives the hook for callers without an event loop, if there is one; idempotent."""
        self._hook.close()

    def check_integrity(self) -> list[str]:
        """What is wrong with the books; empty if nothing is. O(n)."""
        with self._lock:
            problems = [*self._gpu.order.check_integrity(), *self._cpu.order.check_integrity()]
            problems += [
                f"{books.name}: usage, sizes and order differ"
                for books in (self._gpu, self._cpu)
                if books.used != sum(books.sizes.values()) or len(books.order) != len(books.sizes)
            ]
            problems += [
                f"{key!r} is on its way to a tier it is not in"
                for key in self._moving
                if key not in self._cpu.sizes
            ]
        return problems

    # --- inside -------------------------------------------------------------------------------------------------------

    def _books(self, tier: str) -> _Books:
        if tier == Tier.GPU:
            return self._gpu
        if tier == Tier.CPU:
            return self._cpu
        raise UnknownTier(f"no tier {tier!r} in this policy: it has 'gpu' and 'cpu'")

    def _make_room_on_gpu(self, size: int) -> tuple[list[Evicted], list[_Move]]:
        """Returns what left a tier, and what has to be moved to the CPU's."""
        evicted: list[Evicted] = []
        moves: list[_Move] = []
        for key, nbytes in self._gpu.make_room(size):
            evicted.append((key, nbytes, str(Tier.GPU)))
            if self._cpu.sizes.get(key) == nbytes:  # a copy is there already, or on its way
                self._cpu.order.touch(key, _NOW)
                continue
            self._moving.pop(key, None)
            self._cpu.remove(key)
            if nbytes > self._cpu.ceiling:
                evicted.append((key, nbytes, str(Tier.CPU)))
                continue
            evicted += self._make_room_in_cpu(nbytes)
            self._cpu.add(key, nbytes)
            if self.async_offloader is not None:
                move = _Move(key, nbytes, object())
                self._moving[key] = move.token
                moves.append(move)
        return evicted, moves

    def _make_room_in_cpu(self, size: int) -> Iterator[Evicted]:
        for key, nbytes in self._cpu.make_room(size):
            self._moving.pop(key, None)
            yield key, nbytes, str(Tier.CPU)

    def _offload_to_cpu(self, move: _Move, evicted: list[Evicted]) -> None:
        """Call the hook; if it fails at once, set `evicted` right."""
        offloader = self.async_offloader
        if offloader is None:  # taken away meanwhile
            return
        fates: list[_Fate] = []
        going = self._hook.call(
            offloader, move.key, str(Tier.CPU), lambda error: fates.append(self._settle(move, error))
        )
        if going:
            return
        if fates == [_Fate.BACK]:
            evicted.remove((move.key, move.nbytes, str(Tier.GPU)))
        elif fates == [_Fate.DROPPED]:
            evicted.append((move.key, move.nbytes, str(Tier.CPU)))

    def _settle(self, move: _Move, error: BaseException | None) -> _Fate:
        """A hook has ended."""
        key = move.key
        with self._lock:
            current = self._moving.get(key) is move.token
            if current:
                del self._moving[key]
            if error is None:
                return _Fate.MOVED
            self.offload_failures += 1
            fate = _Fate.OVERTAKEN
            if current:
                self._cpu.remove(key)
                fate = self._put_back(key, move.nbytes)
        _log.warning(
            "%r was not offloaded to CPU memory (%s: %s) and is %s",
            key,
            type(error).__name__,
            error,
            fate.value,
        )
        return fate

    def _put_back(self, key: str, nbytes: int) -> _Fate:
        if key in self._gpu.sizes:
            return _Fate.BACK
        if self._gpu.used + nbytes > self.gpu_capacity:
            return _Fate.DROPPED
        self._gpu.add(key, nbytes)
        self._gpu.order.expedite(key)
        return _Fate.BACK
