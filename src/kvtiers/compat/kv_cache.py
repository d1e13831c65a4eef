"""`store_kv_cache` and `lookup_kv_cache` over a `TieredCache`: KV in, KV out, from whichever tier has it.

Nothing is added here: both are calls of the cache with their answers in another form, and may be made from any thread.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from kvtiers.model.keys import TokenIds
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.results import StoreReceipt

_PATIENCE_S: Final = 60.0


class KVData(NamedTuple):
    """KV and the tokens it belongs to. A plain pair (token ids, kv) is taken as well."""

    token_ids: TokenIds
    kv: Any
    """As `TieredCache.store` takes it and `load` gives it: `[num_layers, 2, tokens, num_kv_heads, head_dim]`, or (K, V) pairs."""
    tiers: tuple[Tier, ...] = ()
    """Where each chunk came from; empty on the way in."""


class KVCacheEngine:
    """The cache under the names of the LMCache-compatible interface."""

    def __init__(self, cache: TieredCache) -> None:
        """`cache` is closed with this engine."""
        self.cache: Final = cache

    def store_kv_cache(
        self, kv_data: KVData | tuple[TokenIds, Any], *, salt: str | None = None
    ) -> StoreReceipt:
        """Keep the KV of a prompt's full chunks; returns when it has been copied, the slower tiers follow in the background.

        Raises LayoutMismatch, CacheClosed; anything else in the way is a refusal in the receipt.
        """
        token_ids, kv = kv_data[0], kv_data[1]
        return self.cache.store(token_ids, kv, salt=salt)

    def lookup_kv_cache(
        self, tokens: TokenIds, *, salt: str | None = None, timeout: float | None = None
    ) -> KVData | None:
        """The KV of the longest cached prefix, from the nearest tier of each chunk; None if there is none: compute it.

        Waits for slower tiers for `timeout` seconds at most (default `async.load_timeout_ms`); what has come by then counts.
        Raises LayoutMismatch, CacheClosed.
        """
        load = self.cache.load(tokens, salt=salt, timeout=timeout)
        loaded = load.result(None if timeout is None else timeout + _PATIENCE_S)
        if not loaded.num_tokens:
            return None
        return KVData(tokens[: loaded.num_tokens], loaded.kv, loaded.tiers)

    def close(self, timeout: float | None = None) -> bool:
        """As `TieredCache.close`."""
        return self.cache.close(timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
