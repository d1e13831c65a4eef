"""What the core needs to know of the configuration, in bytes and seconds. Plain values: `runtime` makes them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from kvtiers.core.remembering import Remember
from kvtiers.model.errors import KvtiersError


class WritePolicy(StrEnum):
    """When a chunk goes to a store."""

    WRITE_THROUGH = "write_through"
    """As soon as it is committed, in the background."""
    WRITE_ON_EVICT = "write_on_evict"
    """When it is pushed out of memory."""


@dataclass(frozen=True, slots=True)
class MemorySettings:
    """A tier of slots: the arena, or the GPU pool.

    `ceiling` bounds what is kept as cache. What lies above it, `capacity - ceiling`, is the staging share: loads read into
    it, and it is not part of the usage reported. A disabled CPU tier has ceiling 0: all of it is staging.
    """

    capacity: int
    ceiling: int
    low: int
    """Eviction, once begun, goes down to this many bytes."""
    policy: str = "lru"
    probation_share: float = 0.2
    """Share of the ceiling that chunks promoted from below may hold before they evict each other first."""
    idle_after_s: float | None = None
    """Chunks not touched for so long are counted as offloadable and go first."""
    whole: int | None = None
    """Bytes that usage is a share of, where only a part of them is taken for slots; None: `capacity`."""
    segments: tuple[int, ...] = ()
    """Where the ranges end that lie on one NUMA node each, the last at `capacity`: no slot crosses a border; (): one range."""

    def __post_init__(self) -> None:
        if not 0 <= self.low <= self.ceiling <= self.capacity:
            raise KvtiersError(f"0 <= low <= ceiling <= capacity must hold: {self}")
        ends = (0, *self.segments)
        if self.segments and (list(ends) != sorted(set(ends)) or ends[-1] != self.capacity):
            raise KvtiersError(f"segments must end in ascending order, the last at the capacity: {self}")

    @property
    def nominal(self) -> int:
        """What usage is a share of: the size the operator gave the tier."""
        return self.capacity if self.whole is None else self.whole

    @property
    def staging(self) -> int:
        """Bytes above the ceiling."""
        return self.capacity - self.ceiling


@dataclass(frozen=True, slots=True)
class StoreSettings:
    """A tier of records: disk, or a remote store. `capacity` None: the store bounds itself."""

    capacity: int | None
    ceiling: int | None
    low: int | None
    policy: str = "lru"
    write_policy: WritePolicy = WritePolicy.WRITE_THROUGH
    admission: str = "always"
    max_queued: int = 1000
    """Writes under way at one time."""
    max_queued_bytes: int = 1 << 30
    """Bytes of the writes under way, beyond the first one."""
    full_pause_s: float = 5.0
    """After "no space left": so long no write is tried."""
    max_write_bytes_per_s: int | None = None
    """Pace of writes, in bytes of KV; None: as fast as they go."""
    max_wait_s: float | None = None
    """A chunk that has waited so long to be written is given up until it is used again; None: it waits as long as it lies in memory."""
    remember: Remember | None = None
    """Of a store that others share: it is asked what it has, and the answers are remembered. None: it says at the start what it has."""

    def __post_init__(self) -> None:
        bounds = (self.low, self.ceiling, self.capacity)
        if any(bound is not None for bound in bounds):
            low, ceiling, capacity = (-1 if bound is None else bound for bound in bounds)
            if not 0 <= low <= ceiling <= capacity:
                raise KvtiersError(f"0 <= low <= ceiling <= capacity must hold, or all three be None: {self}")
        if self.remember is not None and self.capacity is not None:
            raise KvtiersError(f"a store that others share bounds itself: {self}")

    @property
    def owned(self) -> bool:
        """Whether this core bounds the store and decides what leaves it; False where the store does, shared with others."""
        return self.capacity is not None


@dataclass(frozen=True, slots=True)
class CoreSettings:
    """All settings of one core. A tier that is None is disabled."""

    cpu: MemorySettings
    gpu: MemorySettings | None = None
    disk: StoreSettings | None = None
    remote: StoreSettings | None = None
    write_lease_share: float = 0.25
    """Share of the arena that background writes may hold leased."""
    ghosts: int = 65_536
    """Evicted chunks that are remembered, to tell EVICTED from NEVER_SEEN and for second-touch admission."""
    max_hold: int = 256
    """Chunks handled at most in one eviction or pump, so that the runtime's mutex is held briefly."""
