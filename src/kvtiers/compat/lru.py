"""`TieredLRUPolicy`: which keys stay on the GPU and in CPU memory, least recently used first out. Bookkeeping only: it owns no bytes.

Over the cache's own eviction policy, so every call is O(1) amortised for each key it moves; nothing sums over all keys. The threads are
the callers'; the lock is held for bookkeeping, never while the offload hook runs.

**What `insert` returns**: every key that left a tier, in order, as (key, size, tier it left). One that left "gpu" is in `cpu_lru`
now; one that left "cpu" is in no tier any more. A key that left the GPU and is too large for the CPU tier is listed twice. So a caller
that acts on the list moves the bytes of each "gpu" entry, then drops those of each "cpu" entry.

**With an `async_offloader`** the hook moves the bytes: it is called with (key, "cpu") for each key that left the GPU and is in the CPU
tier now, and the key's GPU bytes may go when it has ended. If it fails, at once or later, the key is back where it was, on the GPU,
as the first to be evicted next, which calls the hook again; it is dropped only if the GPU's capacity above the threshold is used up.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections.abc import Awaitable, Callable, ItemsView, Iterator, Mapping, ValuesView
from concurrent.futures import Future
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

from kvtiers.compat.errors import UnknownTier
from kvtiers.compat.loop_thread import LoopThread
from kvtiers.core.policies.base import Standing
from kvtiers.core.policies.lru import LeafFirstLRU
from kvtiers.model.errors import CacheClosed, ConfigError, KvtiersError, LayoutMismatch, OutOfMemoryError
from kvtiers.model.tiers import Tier

_log = logging.getLogger(__name__)

_GIB: Final = 1024**3
_NOW: Final = 0.0
"""The order of use needs no clock."""
_MAX_OFFLOADS: Final = 1000
_OFFLOAD_TIMEOUT_S: Final = 60.0
_CLOSE_S: Final = 5.0

Evicted: TypeAlias = tuple[str, int, str]
"""Key, size in bytes, and the tier it left."""


class AsyncOffloader(Protocol):
    """Moves the bytes of a key to another tier; `AsyncOffloadEngine` with a `source` is one. May be a plain function, too."""

    def offload(self, key: str, tier: str, /) -> Awaitable[object] | None:
        """Begin, and end when they are there. What it raises counts as a failure."""
        ...


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
        self._offload_timeout_s = offload_timeout_s
        self._lock = threading.Lock()
        self._gpu = _Books(Tier.GPU, int(self.gpu_capacity * eviction_threshold), self._lock)
        self._cpu = _Books(Tier.CPU, int(self.cpu_capacity * eviction_threshold), self._lock)
        self._moving: dict[str, object] = {}
        """A token for each key whose hook has not ended; a key that meanwhile left or came back has another, or none."""
        self._offloads: set[asyncio.Future[object] | Future[object]] = set()
        self._background: LoopThread | None = None

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

        Raises UnknownTier; OutOfMemoryError if it can never fit, LayoutMismatch for a negative size: then nothing has changed.
        """
        books = self._books(tier)
        if size < 0:
            raise LayoutMismatch(f"a size is at least 0 bytes, got {size} for {key!r}")
        if size > books.ceiling:
            raise OutOfMemoryError(
                f"{key!r} has {size} bytes, the {books.name} tier keeps {books.ceiling} "
                f"(its capacity times eviction_threshold={self.threshold}): it never fits; give the tier more"
            )
        with self._lock:
            self._moving.pop(key, None)
            books.remove(key)
            if books is self._gpu:
                evicted, demoted = self._make_room_on_gpu(size)
            else:
                evicted, demoted = [(k, n, str(Tier.CPU)) for k, n in self._make_room_in_cpu(size)], []
            books.add(key, size)
            calls = [(k, n, self._moving[k]) for k, n in demoted if k in self._moving]
        for victim, nbytes, token in calls:
            self._offload_to_cpu(victim, nbytes, token)
        return self._after_refusals(evicted, calls) if calls else evicted

    def _after_refusals(self, evicted: list[Evicted], calls: list[tuple[str, int, object]]) -> list[Evicted]:
        """Set right what hooks that failed at once have changed: keys put back have not left, keys dropped have left both."""
        with self._lock:
            refused = {key: nbytes for key, nbytes, _ in calls if key not in self._cpu.sizes}
            back = {key for key in refused if key in self._gpu.sizes}
        kept = [entry for entry in evicted if entry[0] not in back or entry[2] != Tier.GPU]
        return kept + [(key, nbytes, str(Tier.CPU)) for key, nbytes in refused.items() if key not in back]

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
        """End the thread that drives the hook for callers without an event loop, if there is one."""
        background = self._background
        if background is not None:
            background.close(_CLOSE_S)

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

    def _make_room_on_gpu(self, size: int) -> tuple[list[Evicted], list[tuple[str, int]]]:
        """Returns what left a tier, and what has to be moved to the CPU's."""
        evicted: list[Evicted] = []
        demoted: list[tuple[str, int]] = []
        for key, nbytes in self._gpu.make_room(size):
            evicted.append((key, nbytes, str(Tier.GPU)))
            if self._cpu.sizes.get(key) == nbytes:  # a copy is there already
                self._cpu.order.touch(key, _NOW)
                continue
            self._moving.pop(key, None)
            self._cpu.remove(key)
            if nbytes > self._cpu.ceiling:
                evicted.append((key, nbytes, str(Tier.CPU)))
                continue
            evicted += [(k, n, str(Tier.CPU)) for k, n in self._make_room_in_cpu(nbytes)]
            self._cpu.add(key, nbytes)
            if self.async_offloader is not None:
                self._moving[key] = object()
                demoted.append((key, nbytes))
        return evicted, demoted

    def _make_room_in_cpu(self, size: int) -> Iterator[tuple[str, int]]:
        for key, nbytes in self._cpu.make_room(size):
            self._moving.pop(key, None)
            yield key, nbytes

    def _offload_to_cpu(self, key: str, nbytes: int, token: object) -> None:
        """Call the hook and see to it that its end is heard of, with or without an event loop on this thread."""
        offloader = self.async_offloader
        if offloader is None:  # taken away meanwhile
            return
        ended = partial(self._offload_ended, key, nbytes, token)
        if len(self._offloads) >= _MAX_OFFLOADS:
            ended(KvtiersError(f"{_MAX_OFFLOADS} offloads are under way already"))
            return
        try:
            outcome = offloader.offload(key, str(Tier.CPU))
            if inspect.isawaitable(outcome):
                self._follow(outcome, ended)
            else:
                ended(None)
        except Exception as error:  # noqa: BLE001 - the hook is other people's code; it is logged and counted
            ended(error)

    def _follow(self, outcome: Awaitable[object], ended: Callable[[BaseException | None], None]) -> None:
        async def bounded() -> object:
            async with asyncio.timeout(self._offload_timeout_s):
                return await outcome

        try:
            asyncio.get_running_loop()
        except RuntimeError:
            with self._lock:
                if self._background is None:
                    self._background = LoopThread("lru-offload")
                background = self._background
            try:
                task: asyncio.Future[object] | Future[object] = background.start(bounded)
            except CacheClosed:
                if inspect.iscoroutine(outcome):
                    outcome.close()
                raise
        else:
            task = asyncio.ensure_future(bounded())
        with self._lock:
            self._offloads.add(task)
        task.add_done_callback(partial(self._task_ended, ended))

    def _task_ended(self, ended: Callable[[BaseException | None], None], task: Any) -> None:
        with self._lock:
            self._offloads.discard(task)
        ended(CacheClosed("its event loop was closed") if task.cancelled() else task.exception())

    def _offload_ended(self, key: str, nbytes: int, token: object, error: BaseException | None) -> None:
        with self._lock:
            current = self._moving.get(key) is token
            if current:
                del self._moving[key]
            if error is None:
                return
            self.offload_failures += 1
            if current:
                self._cpu.remove(key)
                if key not in self._gpu.sizes and self._gpu.used + nbytes <= self.gpu_capacity:
                    self._gpu.add(key, nbytes)
                    self._gpu.order.expedite(key)
            where = "stays on the GPU" if key in self._gpu.sizes else "is dropped: the GPU has no room left"
        _log.warning(
            "%r was not offloaded to CPU memory and %s: %s: %s", key, where, type(error).__name__, error
        )
