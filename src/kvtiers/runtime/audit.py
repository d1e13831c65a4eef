"""The whole audit: the core's books, the bytes in memory against their checksums, the index against the stores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

from kvtiers.core.core import Core
from kvtiers.core.index import MemoryCopy, MemoryState
from kvtiers.model.errors import StoreError
from kvtiers.model.parts import RecordRef
from kvtiers.model.tiers import Tier
from kvtiers.runtime.offload import OffloadEngine
from kvtiers.stores.guard import Guard

T = TypeVar("T")


class Audited(Protocol):
    """What is audited: a node, as far as this page needs it."""

    @property
    def engine(self) -> OffloadEngine:
        """Reads what lies in memory."""
        ...

    @property
    def guards(self) -> Mapping[Tier, Guard]:
        """The stores."""
        ...

    def inspect(self, look: Callable[[Core], T]) -> T:
        """Read the core under its mutex."""
        ...


def audit(node: Audited) -> list[str]:
    """Every inconsistency, as a sentence. Reads all of the arena, and what has a checksum in the GPU pool; walks the disk."""
    problems = node.inspect(lambda core: core.check_integrity())
    problems += _check_memory(node)
    for tier, guard in node.guards.items():
        problems += _check_store(node, tier, guard)
    return problems


def _check_memory(node: Audited) -> list[str]:
    problems = []
    for copy in node.inspect(_sealed):
        parts = copy.chunk.space.parts
        slots, sums = copy.slots, copy.checksums
        if parts is None or len(slots) != len(parts):
            continue
        right = node.engine.checksums(copy.tier, slots, copy.chunk.space.id) == sums
        # if it was evicted meanwhile its slot may be somebody else's by now
        if not right and not node.inspect(lambda _, copy=copy: copy.detached):  # type: ignore[misc]
            problems.append(
                f"{copy.tier}: the bytes of chunk {copy.chunk.key.hex()[:12]} are not those that were committed"
            )
    return problems


def _sealed(core: Core) -> list[MemoryCopy]:
    copies = [copy for tier in (Tier.GPU, Tier.CPU) for copy in core.copies(tier)]
    return [copy for copy in copies if copy.state is MemoryState.READY and copy.checksums]


def _check_store(node: Audited, tier: Tier, guard: Guard) -> list[str]:
    problems = [f"{tier}: {problem}" for problem in guard.check()]
    if node.inspect(lambda core: core.is_shared(tier)):
        return (
            problems  # others write there and take from it: what was learnt of it need not be true any more
        )
    known = node.inspect(lambda core: core.order_of_use(tier))
    refs = [RecordRef(namespace, key, part) for namespace, key, parts in known for part in range(parts)]
    try:
        found = guard.exists(refs)
    except StoreError as error:
        return [*problems, f"{tier}: can't be compared with the index: {error}"]
    problems += [
        f"{tier}: the index has part {ref.part} of chunk {ref.key.hex()[:12]}, the store does not"
        for ref, there in zip(refs, found, strict=True)
        if not there
    ]
    records, in_doubt = guard.usage().records, sum(node.inspect(lambda core: core.parts_in_doubt(tier)))
    if not len(refs) <= records <= len(refs) + in_doubt:
        problems.append(f"{tier}: the index has {len(refs)} records, the store {records}")
    return problems
