"""Caches that can be hurt: small ones, with a disk that fails on command and guards that lose patience in tenths of a second.

For tests of whatever stands on a `CacheNode`. The parts are the real ones; only the `FaultyStore` between the guard and the disk,
and the figures, differ from what `plan_node` makes of a configuration.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from kvtiers.config import CacheConfig
from kvtiers.core.settings import MemorySettings, StoreSettings
from kvtiers.model.namespace import Namespace
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import NodePlan, plan_node
from kvtiers.stores.guard import BreakerState, GuardPolicy
from kvtiers.testing.cache_oracle import SMALL_CHUNK, SMALL_LAYOUT, CacheOracle
from kvtiers.testing.faulty_store import FaultyStore

MIB: Final = 1 << 20
SLOT: Final = 12_288
"""Bytes that a chunk of `SMALL_LAYOUT` takes in the arena."""
RECORD: Final = 16_384
"""Bytes that it takes on the disk, uncompressed."""

IMPATIENT: Final = GuardPolicy(
    max_retries=1,
    base_delay_s=0.001,
    read_deadline_s=0.3,
    write_deadline_s=0.3,
    failures_to_open=3,
    probe_after_s=0.05,
    probe_after_max_s=0.2,
)
"""Opens the breaker after .3 s without an answer, and asks again soon."""


def namespace(name: str = "a-model") -> Namespace:
    """A namespace for tests."""
    return Namespace(model=name, fingerprint=f"fingerprint of {name}", engine="tests")


def small_config(path: Path | None = None, values: Mapping[str, Any] | None = None) -> CacheConfig:
    """1 MiB of arena (64 chunks and room to stage 21), 64 MiB of disk under `path` (None: no disk). `values`: settings by dotted key below `storage` or `async`."""
    storage: dict[str, Any] = {
        "chunk_tokens": SMALL_CHUNK,
        "cpu": {"buffer_size": "1Mi", "eviction_threshold": 0.75, "huge_pages": "off", "numa_aware": False},
    }
    if path is not None:
        storage["disk"] = {"enabled": True, "path": str(path), "max_size": "64Mi", "min_free_space": 0}
    tree: dict[str, Any] = {"storage": storage, "async": {"load_timeout_ms": 20_000, "close_timeout_s": 20}}
    for key, value in (values or {}).items():
        *above, last = key.split(".")
        below: dict[str, Any] = tree if above and above[0] == "async" else storage
        for step in above:
            below = below.setdefault(step, {})
        below[last] = value
    return CacheConfig.from_mapping(tree, environ={})


class Chaos(NamedTuple):
    """A node, its disk, and one session on it with the oracle that knows what it may answer."""

    node: CacheNode
    disk: FaultyStore
    cache: TieredCache
    oracle: CacheOracle


def faulty_plan(
    plan: NodePlan,
    *,
    guard: GuardPolicy = IMPATIENT,
    cpu: MemorySettings | None = None,
    disk: Mapping[str, Any] | None = None,
) -> tuple[NodePlan, FaultyStore]:
    """The plan with its disk made faulty and its guard impatient. `disk`: fields of `StoreSettings` to change."""
    store = plan.stores[Tier.DISK]
    faulty = FaultyStore(store.store)
    core = plan.core
    if cpu is not None:
        core = replace(core, cpu=cpu)
    settings = core.disk
    assert isinstance(settings, StoreSettings)
    core = replace(core, disk=replace(settings, **{"full_pause_s": 0.1, **(disk or {})}))
    stores = {Tier.DISK: replace(store, store=faulty, guard=guard)}
    return replace(plan, core=core, stores=stores), faulty


def chaos(path: Path, values: Mapping[str, Any] | None = None, **changes: Any) -> Chaos:
    """A small cache on a faulty disk. `changes`: as for `faulty_plan`. Whoever asked closes the node."""
    config = small_config(path, values)
    plan, disk = faulty_plan(plan_node(config), **changes)
    node = CacheNode(plan)
    try:
        cache = TieredCache(config, SMALL_LAYOUT, namespace(), node=node)
    except BaseException:
        node.close(0.0)
        raise
    return Chaos(node, disk, cache, CacheOracle(namespace()))


@contextmanager
def chaos_bench(path: Path) -> Iterator[Callable[..., Chaos]]:
    """Gives what makes caches as `chaos(path, …)` does. At the end disks are healed, the audits have nothing to say, all is closed."""
    made: list[Chaos] = []

    def make(values: Mapping[str, Any] | None = None, **changes: Any) -> Chaos:
        made.append(chaos(path, values, **changes))
        return made[-1]

    yield make
    open_ones = [one for one in made if not one.node.closing]
    for one in open_ones:
        one.disk.heal()
    stuck = [str(one.disk) for one in open_ones if not works_again(one.node)]
    problems = [problem for one in open_ones for problem in one.node.check_integrity()]
    for one in made:
        one.cache.close()
        one.node.close()
    assert stuck == []
    assert problems == []


def wait_until(condition: Callable[[], bool], timeout: float = 30.0, *, every: float = 0.01) -> bool:
    """Whether it comes true in time; asked again and again."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() >= deadline:
            return False
        time.sleep(every)
    return True


def works_again(node: CacheNode, timeout: float = 30.0) -> bool:
    """Wait until no breaker is open and the core has been told so."""
    return wait_until(
        lambda: all(
            guard.state is BreakerState.CLOSED and node.stats()["tiers"][tier]["up"]
            for tier, guard in node.guards.items()
        ),
        timeout,
    )
