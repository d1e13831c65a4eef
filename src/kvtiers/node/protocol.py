"""What engines and the service say to each other, as msgpack.

- A frame is a batch: a list of messages, so that what one engine step posts is one frame. Both sides may send at any time.
- Every message that wants an answer carries an op id, chosen by the client and never used twice on one connection. It names
  the load or store from then on: `Release`, `Commit` and `Abort` may be sent before its answer has come.
- KV bytes never cross the socket. A slot is a byte offset in the arena, whose memfd comes with `Welcome` (SCM_RIGHTS).
- Lists of keys, offsets and tiers are packed into bytes: 512 keys are decoded in 50 µs instead of being 512 objects of msgpack.

A breaking change raises `PROTOCOL_VERSION`; the two sides speak only if theirs are equal.
"""

from __future__ import annotations

from typing import Annotated, Final, TypeAlias, cast

import numpy as np
from msgspec import Meta, Struct

from kvtiers.model.keys import KEY_BYTES, ChunkKey
from kvtiers.model.tiers import Tier

PROTOCOL_VERSION: Final = 1
MAX_KEYS: Final = 16_384
"""Chunks of one request: 4 million tokens in chunks of 256."""
MAX_SLOTS: Final = 1 << 18
"""Parts of all chunks of one request; its answer names a slot for each, in 2 MiB."""
MAX_BATCH: Final = 16_384
"""Messages of one frame: of the smallest, 4 MiB would hold two million, which take a second to decode."""
MAX_TIMEOUT_MS: Final = 3_600_000

TIERS: Final = tuple(Tier)
"""A tier is one byte: its place here."""
TIER_CODE: Final = {tier: code for code, tier in enumerate(TIERS)}

Op: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 62)]
SpaceNumber: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 62)]
Size: TypeAlias = Annotated[int, Meta(ge=1, le=1 << 40)]
Small: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 20)]
Digest: TypeAlias = Annotated[bytes, Meta(min_length=32, max_length=32)]
Keys: TypeAlias = Annotated[bytes, Meta(max_length=MAX_KEYS * KEY_BYTES)]
Text: TypeAlias = Annotated[str, Meta(max_length=1000)]
EngineToken: TypeAlias = Annotated[bytes, Meta(max_length=64)]
Count: TypeAlias = Annotated[int, Meta(ge=0, le=1 << 40)]
Share: TypeAlias = Annotated[float, Meta(ge=0, le=1)]
Rate: TypeAlias = Annotated[float, Meta(ge=0)]


# --- client to service -----------------------------------------------------------------------------------------------


class Hello(Struct, tag=0, array_like=True, frozen=True):
    """The first message of a connection."""

    version: int
    name: Text = ""
    """For the service's log."""
    engine: EngineToken = b""
    """Equal for all processes of one engine: slots of one are written by the others. Empty: this process is all of it."""


class Attach(Struct, tag=1, array_like=True, frozen=True):
    """Declare a namespace and the parts of its chunks. Answered by `Attached` or `Failed`."""

    op: Op
    namespace: Digest
    parts: Annotated[list[tuple[Small, Small, Size]], Meta(min_length=1, max_length=1024)]
    """(group, rank, bytes) of each."""
    chunk_tokens: Size
    itemsize: Annotated[int, Meta(ge=1, le=16)]


class Stage(Struct, tag=2, array_like=True, frozen=True):
    """Look up the longest prefix of `keys`, bring it to the arena and lease it. Answered by `Staged` within `timeout_ms`."""

    op: Op
    space: SpaceNumber
    keys: Keys
    timeout_ms: Annotated[int, Meta(ge=0, le=MAX_TIMEOUT_MS)]


class Release(Struct, tag=3, array_like=True, frozen=True):
    """Nobody of this engine reads the slots of that load any more. No answer."""

    op: Op
    begin: Count = 0
    """The first of its chunks that were copied out: what was staged for nothing is no hit."""
    end: Count | None = None
    """The one behind the last of them; None: all it was answered with."""


class OpenStore(Struct, tag=4, array_like=True, frozen=True):
    """Slots for the chunks `keys[first:]` that no tier has; `root` is the parent of the first key. Answered by `Opened`."""

    op: Op
    space: SpaceNumber
    root: Digest
    keys: Keys
    first: Annotated[int, Meta(ge=0, le=MAX_KEYS)] = 0


class Commit(Struct, tag=5, array_like=True, frozen=True):
    """These chunks (None: all that are open) of store `store` lie in their slots, all parts of them. Answered by `Committed`."""

    op: Op
    store: Op
    indices: Annotated[list[Small], Meta(max_length=MAX_KEYS)] | None = None


class Abort(Struct, tag=6, array_like=True, frozen=True):
    """Nobody of this engine writes to what is still open of that store any more. No answer."""

    store: Op


class Settled(Struct, tag=7, array_like=True, frozen=True):
    """No slot that an earlier connection of this process was given is in use any more. No answer."""

    connection: Op


class Report(Struct, tag=8, array_like=True, frozen=True):
    """What an engine tells about itself, for the operator. No answer."""

    gpu_usage: Share
    """Share of the engine's own KV blocks in use."""
    prefill_tokens_per_s: Rate
    local_lookups: Count = 0
    """Chunks, since the last report, for which its own prefix cache was consulted."""
    local_hits: Count = 0
    """Chunks among them that it had."""
    local_hit_tokens: Count = 0


class GetStats(Struct, tag=9, array_like=True, frozen=True):
    """Answered by `Stats`."""

    op: Op


class Alive(Struct, tag=10, array_like=True, frozen=True):
    """Nothing to say, but leases to keep. No answer."""


class Detach(Struct, tag=12, array_like=True, frozen=True):
    """Nothing more is asked of that namespace; what is open of it goes on. No answer."""

    space: SpaceNumber


class Goodbye(Struct, tag=11, array_like=True, frozen=True):
    """The client ends, and nobody uses a slot it was given any more. The service closes the connection."""


Request: TypeAlias = (
    Hello
    | Attach
    | Detach
    | Stage
    | Release
    | OpenStore
    | Commit
    | Abort
    | Settled
    | Report
    | GetStats
    | Alive
    | Goodbye
)


# --- service to client -----------------------------------------------------------------------------------------------


class Welcome(Struct, tag=64, array_like=True, frozen=True):
    """Answers `Hello`. The arena's memfd comes with the first byte of its frame."""

    version: int
    connection: Op
    """Names this connection (`Settled`)."""
    arena: Digest
    """Names the arena: random, made anew by each service."""
    arena_bytes: Size
    lease_timeout_ms: Annotated[int, Meta(ge=1, le=MAX_TIMEOUT_MS)]
    """A client that holds slots and is silent for so long is taken for stopped."""


class Attached(Struct, tag=65, array_like=True, frozen=True):
    """Answers `Attach`."""

    op: Op
    space: SpaceNumber


class Staged(Struct, tag=66, array_like=True, frozen=True):
    """Answers `Stage`: `offsets` (u64 little-endian, one for each part of each chunk), `tiers` (a byte for each chunk)."""

    op: Op
    offsets: bytes
    tiers: bytes
    stopped_by: str | None
    """A `MissReason`; None if every key was found."""


class Opened(Struct, tag=67, array_like=True, frozen=True):
    """Answers `OpenStore`: u32 indices of the chunks taken, u64 offsets of their parts, and the others with the reason."""

    op: Op
    indices: bytes
    offsets: bytes
    refused: list[tuple[int, int, str]]
    """Runs of refused chunks: first index, count, `Refusal`."""


class Committed(Struct, tag=68, array_like=True, frozen=True):
    """Answers `Commit`: the chunks can be hit."""

    op: Op


class Stats(Struct, tag=69, array_like=True, frozen=True):
    """Answers `GetStats`, as JSON."""

    op: Op
    json: bytes


class Failed(Struct, tag=70, array_like=True, frozen=True):
    """Answers whatever could not be done."""

    op: Op
    reason: str


class Farewell(Struct, tag=71, array_like=True, frozen=True):
    """The service closes this connection, and why. Reconnecting makes sense if `again`."""

    reason: str
    again: bool


Answer: TypeAlias = Welcome | Attached | Staged | Opened | Committed | Stats | Failed | Farewell


def join_keys(keys: list[ChunkKey] | tuple[ChunkKey, ...]) -> bytes:
    """Keys as a message carries them."""
    return b"".join(keys)


def split_keys(packed: bytes) -> list[ChunkKey]:
    """The reverse. Raises ValueError if it is not a whole number of keys."""
    if len(packed) % KEY_BYTES:
        raise ValueError(f"{len(packed)} bytes are no whole number of keys of {KEY_BYTES} bytes")
    # 512 in 9 µs; slicing takes 47, calling ChunkKey for each as much again
    return cast("list[ChunkKey]", np.frombuffer(packed, f"V{KEY_BYTES}").tolist() if packed else [])
