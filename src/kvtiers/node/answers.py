"""From a message to what its asker sees. Everything is checked first: a slot's view, made later, is trusted.

Whatever makes no sense raises ProtocolError, and the load or store is left as it was.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np

from kvtiers.model.layout import PAGE_BYTES
from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.node.framing import ProtocolError
from kvtiers.node.handles import Granted, Load, Offsets, Store
from kvtiers.node.mapped_arena import MappedArena
from kvtiers.node.protocol import TIERS, Opened, Staged

Reason = TypeVar("Reason", MissReason, Refusal)


def fill_load(load: Granted, answer: Staged, arena: MappedArena) -> None:
    """The chunks that can be copied out."""
    if not isinstance(load, Load):
        raise ProtocolError("a store was answered like a load")
    offsets = _offsets(answer.offsets, len(answer.tiers), load.space.parts, arena)
    tiers = tuple(_tier(code) for code in answer.tiers)
    stopped_by = None if answer.stopped_by is None else _reason(MissReason, answer.stopped_by)
    load.tiers, load.stopped_by = tiers, stopped_by
    _grant(load, offsets, arena)


def fill_store(store: Granted, answer: Opened, arena: MappedArena) -> None:
    """The chunks that can be written, and why the others can't."""
    if not isinstance(store, Store) or len(answer.indices) % 4:
        raise ProtocolError("a load was answered like a store, or half an index")
    indices = tuple(np.frombuffer(answer.indices, "<u4").tolist())
    offsets = _offsets(answer.offsets, len(indices), store.space.parts, arena)
    refused = [(first, count, _reason(Refusal, why)) for first, count, why in answer.refused]
    store.indices, store.open, store.refused = indices, set(indices), refused
    _grant(store, offsets, arena)


def _grant(handle: Granted, offsets: Offsets, arena: MappedArena) -> None:
    handle.offsets = offsets
    handle.done = True
    if len(offsets):
        handle.arena = arena.id
    else:
        handle.closed = True  # nothing to give back


def _offsets(packed: bytes, chunks: int, parts: Parts, arena: MappedArena) -> Offsets:
    """`[chunks, parts]`: whole, inside the arena, on pages."""
    if len(packed) != 8 * len(parts) * chunks:
        raise ProtocolError(f"{len(packed)} bytes of offsets for {chunks} chunks of {len(parts)} parts")
    offsets: Offsets = np.frombuffer(packed, dtype="<u8").reshape(-1, len(parts))
    room = [arena.nbytes - part.slot_bytes for part in parts]
    if chunks and (
        min(room) < 0 or (offsets > np.array(room, np.uint64)).any() or (offsets % PAGE_BYTES).any()
    ):
        raise ProtocolError("a slot outside the arena")
    return offsets


def _tier(code: int) -> Tier:
    try:
        return TIERS[code]
    except IndexError:
        raise ProtocolError(f"there is no tier number {code}") from None


def _reason(kind: type[Reason], value: str) -> Reason:
    try:
        return kind(value)
    except ValueError:
        raise ProtocolError(f"{value!r} is no {kind.__name__}") from None
