"""What the scheduler's side counts, for vLLM's /metrics and for the service's operator: once for a request, however often it is looked at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from kvtiers.integrations.vllm.messages import CopyReport
from kvtiers.integrations.vllm.requests import RequestState
from kvtiers.model.tiers import Tier

_MOST_TENANTS: Final = 64
_OF_COPIES: Final = ("load_seconds", "load_bytes", "store_seconds", "store_bytes")


class Counts:
    """One engine's."""

    def __init__(self, *, chunk_tokens: int, hashes_per_chunk: int) -> None:
        self._chunk_tokens = chunk_tokens
        self._hashes_per_chunk = hashes_per_chunk
        self.total: dict[str, float] = dict.fromkeys(
            (
                "loads",
                "load_failures",
                "loaded_tokens",
                "asked_tokens",
                "lapsed",
                "not_offered",
                "unread_adapters",
                *_OF_COPIES,
            ),
            0,
        )
        """Loads begun and failed, tokens loaded and asked for, leases given back as their request was not scheduled in time, chunks
        of requests that ended while too many blocks were pinned, requests that were computed as their adapter had not been read yet;
        bytes that workers have copied, and seconds in which they did."""
        self.by_tier: dict[Tier, int] = {}
        """Tokens loaded."""
        self.by_tenant: dict[str, int] = {}
        """Tokens loaded."""
        self.own = {"local_lookups": 0, "local_hits": 0, "local_hit_tokens": 0}
        """Chunks that requests have, those among them that the engine had itself, and tokens of these."""

    def asked(self, state: RequestState, tokens: int) -> None:
        """So many were looked up: a request may be staged several times before it gets its blocks."""
        self.total["asked_tokens"] += max(0, tokens - state.asked_tokens)
        state.asked_tokens = max(state.asked_tokens, tokens)

    def admitted(self, state: RequestState) -> None:
        """It has its blocks. The engine's prefix cache is the nearest tier."""
        if state.counted:
            return
        state.counted = True
        self.total["unread_adapters"] += state.adapter is None and state.may_load
        hits = state.local_tokens // self._chunk_tokens
        self.own["local_lookups"] += len(state.request.block_hashes) // self._hashes_per_chunk
        self.own["local_hits"] += hits
        self.own["local_hit_tokens"] += hits * self._chunk_tokens

    def loaded(self, state: RequestState, by_tier: Mapping[Tier, int]) -> None:
        """All workers have filled its blocks: so much was not computed."""
        self.total["loaded_tokens"] += state.loading_tokens
        for tier, tokens in by_tier.items():
            self.by_tier[tier] = self.by_tier.get(tier, 0) + tokens
        if state.tenant:
            known = state.tenant in self.by_tenant or len(self.by_tenant) < _MOST_TENANTS
            name = state.tenant if known else "(others)"
            self.by_tenant[name] = self.by_tenant.get(name, 0) + state.loading_tokens

    def copied(self, report: CopyReport) -> None:
        """What the workers' copies took."""
        for name in _OF_COPIES:
            self.total[name] += getattr(report, name)
