"""Why a lookup stopped, why a store was refused: two closed lists.

A new member needs a reason in docs/decisions/. The values are the labels that metrics and JSON show.
"""

from __future__ import annotations

from enum import StrEnum


class MissReason(StrEnum):
    """Why a prefix match ended where it did."""

    NEVER_SEEN = "never_seen"
    """No tier holds the chunk and nothing is remembered of it."""
    EVICTED = "evicted"
    """It was here; capacity pushed it out."""
    EXPIRED = "expired"
    """Its time to live ran out."""
    QUOTA = "quota"
    """Its tenant's share is used up."""
    NOT_ADMITTED = "not_admitted"
    """The admission policy keeps only what was asked for before."""
    IN_FLIGHT = "in_flight"
    """It is being stored at this moment."""
    STAGING_TIMEOUT = "staging_timeout"
    """A slower tier had it, but did not deliver before the deadline."""
    NO_SLOT = "no_slot"
    """A slower tier has it, but the staging share had no room to read it into."""
    TIER_OPEN = "tier_open"
    """The only tier that has it is out of order (its breaker is open)."""
    CORRUPT = "corrupt"
    """What lay there failed its checksum; it was removed and heals with the next store."""
    NAMESPACE_CHANGED = "namespace_changed"
    """The tokens are known under another namespace: model, layout, dtype or format differ."""
    SALT_DIFFERS = "salt_differs"
    """The tokens are known under another cache salt."""
    CHEAPER_TO_RECOMPUTE = "cheaper_to_recompute"
    """Loading would take longer than prefilling again."""
    GROUP_STATE_MISSING = "group_state_missing"
    """A part of the chunk (a KV group or a rank) is missing."""
    PARTIAL_CHUNK = "partial_chunk"
    """The remaining tokens do not fill a chunk: everything that can be cached was found."""
    DISABLED = "disabled"
    """No tier is enabled."""


class Refusal(StrEnum):
    """Why a chunk was not accepted for storing."""

    PRESENT = "present"
    """A tier has it already; nothing to do."""
    IN_FLIGHT = "in_flight"
    """Another store of the same chunk is under way."""
    QUOTA = "quota"
    """Its tenant's share is used up."""
    NO_SLOT = "no_slot"
    """No slot is free and nothing may be evicted right now."""
    QUEUE_FULL = "queue_full"
    """The queue or the lease share of background writes is full."""
    NOT_ADMITTED = "not_admitted"
    """The admission policy keeps only what was asked for before."""
    CHAIN_BROKEN = "chain_broken"
    """An earlier chunk of the prefix was not accepted, so this one could never be found."""
    TIER_OPEN = "tier_open"
    """The only tier that could take it is out of order."""
    CLOSED = "closed"
    """The cache is closing."""
    DISABLED = "disabled"
    """No tier is enabled."""
