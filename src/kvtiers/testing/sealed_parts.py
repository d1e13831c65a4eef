"""Sealed parts made up for tests, memory to read them into, and what can happen to them. Without pytest: child processes import it fast."""

from __future__ import annotations

import hashlib
import mmap
from enum import StrEnum
from typing import Final

import numpy as np

from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import round_to_page
from kvtiers.model.parts import RecordRef
from kvtiers.records.checksum import checksum
from kvtiers.stores.base import RecordStore, SealedPart

NAMESPACE: Final = hashlib.sha256(b"kit namespace").digest()
SCRIBBLE: Final = 0xA5
"""What fresh slots are filled with."""


class Damage(StrEnum):
    """What can happen to a record behind its store's back."""

    FLIP_HEADER = "flip_header"
    """One bit of what describes the record."""
    FLIP_PAYLOAD = "flip_payload"
    FLIP_PADDING = "flip_padding"
    """One bit behind the payload (where there is padding)."""
    TRUNCATE = "truncate"
    """Its second half is gone."""
    EMPTY = "empty"
    """Nothing is left but its name."""
    REMOVE = "remove"
    SWAP = "swap"
    """Another, sound record of the same size lies under its name."""


def slot(nbytes: int) -> memoryview:
    """Page-aligned memory for a payload of `nbytes`, in whole pages, as an arena's slot: it does not start out as zeros."""
    memory = memoryview(mmap.mmap(-1, round_to_page(nbytes)))
    np.frombuffer(memory, np.uint8)[:] = SCRIBBLE
    return memory


def key_of(number: int) -> ChunkKey:
    """A chunk key for tests."""
    return ChunkKey(hashlib.sha256(b"kit key %d" % number).digest())


def make_part(
    number: int, nbytes: int, *, part: int = 0, namespace: bytes = NAMESPACE, version: int = 0
) -> SealedPart:
    """The sealed part `number`, with bytes that depend on all arguments and compress like KV: some, not much."""
    rng = np.random.default_rng([number, nbytes, part, version, namespace[0]])
    payload = slot(nbytes)
    values = np.frombuffer(payload, np.uint8)[:nbytes]
    values[:] = rng.integers(0, 256, nbytes, dtype=np.uint8)
    values[1::2] = rng.integers(60, 64, len(values[1::2]), dtype=np.uint8)  # like the exponents of bf16
    return SealedPart(
        ref=RecordRef(namespace, key_of(number), part),
        parent=key_of(number - 1),
        num_parts=part + 1,
        token_start=number * 16,
        token_count=16,
        itemsize=2,
        checksum=checksum(payload[:nbytes]),
        payload=payload[:nbytes],
    )


def reads_back(store: RecordStore, part: SealedPart) -> bool:
    """Whether the store gives the part's bytes back. Raises what the store raises."""
    out = slot(len(part.payload))
    store.read_into(part.ref, out, len(part.payload))
    return np.array_equal(
        np.frombuffer(out, np.uint8)[: len(part.payload)], np.frombuffer(part.payload, np.uint8)
    )
