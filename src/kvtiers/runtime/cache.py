"""The cache as a library: one session on a node, with one model's namespace and layout.

    with TieredCache(config, layout, namespace) as cache:
        cache.store(token_ids, kv)
        loaded = cache.load(token_ids).result()

`store` copies on the caller's thread and returns; `lookup` reads memory only; `load` copies up to 8 MiB itself,
more on the cache's threads. Nothing here waits for a disk. All methods may be called from any thread.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import Any, Self

from kvtiers.config import CacheConfig
from kvtiers.core.eviction import Evicted
from kvtiers.model.errors import CacheClosed, InvalidArgument, LayoutMismatch, UnknownTier
from kvtiers.model.keys import ChunkKey, TokenIds, chunk_keys, encode_salt, encode_tokens, root_key
from kvtiers.model.layout import KVLayout
from kvtiers.model.namespace import Namespace
from kvtiers.model.parts import Parts
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.runtime.activity import Activity
from kvtiers.runtime.arguments import position, seconds, seconds_at_most_a_day, share
from kvtiers.runtime.copying import CopyOut
from kvtiers.runtime.kv_arrays import KVArrays, empty_kv, kv_arrays
from kvtiers.runtime.loads import StagedLoad
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.runtime.results import LoadedKV, Lookup, PendingLoad, StoreReceipt
from kvtiers.runtime.uninterrupted import Uninterrupted

_log = logging.getLogger(__name__)
_COPY_PATIENCE_S = 60.0
_MAX_TENANTS = 1000
_COMMIT_BYTES = 16 << 20
"""Of a store, copied before they are committed: their checksums and writes go on beside the next ones' copies. Small chunks share the
hand-over, which would cost more than it wins (docs/decisions/copying.md)."""


class TieredCache:
    """KV of one model, in up to four tiers. Close it, or use it in a `with` block; the end of the process closes it too.

    It belongs to the process that made it: in a forked child every call raises CacheClosed, and `close` does nothing.
    """

    _is_open = False

    def __init__(
        self,
        config: CacheConfig,
        layout: KVLayout,
        namespace: Namespace,
        *,
        node: CacheNode | None = None,
    ) -> None:
        """Without `node` the cache makes its own from `config`, and closes it.

        Raises DoesNotFit with what to change, DirectoryInUse, LayoutMismatch.
        """
        self.config = config
        self.layout = layout
        self.chunk_tokens = config.storage.chunk_tokens
        self.namespace = namespace.bind(layout, self.chunk_tokens)
        self._digest = self.namespace.digest
        self._owns_node = node is None
        self.node = CacheNode(plan_node(config)) if node is None else node
        try:
            self._session = self.node.open_session()
            self._space = self.node.attach(
                self._digest,
                Parts.single(layout, self.chunk_tokens),
                chunk_tokens=self.chunk_tokens,
                itemsize=layout.itemsize,
                session=self._session,
            )
        except BaseException:
            if self._owns_node:
                self.node.close(0.0)
            elif hasattr(self, "_session"):
                self.node.close_session(self._session)
            raise
        self._chunk_bytes = layout.nbytes(self.chunk_tokens)
        self._tenants: dict[str, int] = {}
        self._tenants_lock = threading.Lock()
        self._activity = Activity(partial(self.node.close_session, self._session))
        self._is_open = True
        _log.info(
            "%s: chunks of %d tokens, %.1f KiB each",
            self.namespace.model,
            self.chunk_tokens,
            self._chunk_bytes / 1024,
        )

    # --- storing ------------------------------------------------------------------------------------------------------

    def store(
        self,
        token_ids: TokenIds,
        kv: Any,
        *,
        start: int = 0,
        salt: str | None = None,
        tenant: str | None = None,
    ) -> StoreReceipt:
        """Keep the KV of the full chunks of a prompt; returns when it has been copied.

        `kv`: per layer a pair (K, V) of `[tokens, num_kv_heads, head_dim]`, or one array `[num_layers, 2, tokens, num_kv_heads,
        head_dim]`. It belongs to `token_ids[start:start + tokens]`; what comes before `start` must be cached already, or
        nothing is accepted. Raises LayoutMismatch, InvalidArgument, CacheClosed; whatever else stands in the way is a refusal in
        the receipt.
        """
        self._check_tenant(tenant)
        with Uninterrupted(), self._activity.entered():
            return self._store(token_ids, kv, start, salt, tenant)

    def _store(
        self, token_ids: TokenIds, kv: Any, start: int, salt: str | None, tenant: str | None
    ) -> StoreReceipt:
        arrays, start = kv_arrays(kv, self.layout), position(start, "start")
        have = self._count(token_ids)
        if start + arrays.tokens > have:
            raise LayoutMismatch(
                f"kv has {arrays.tokens} tokens from position {start} on, but there are {have} token ids"
            )
        step = self.chunk_tokens
        root, keys = self._chain(token_ids[: start + arrays.tokens], salt)
        first = -(-start // step)
        ticket = self.node.open_store(self._session, self._space, root, keys, first=first)
        try:
            copied: list[int] = []
            for slot in ticket.accepted:
                self.node.memory[slot.tier].write(
                    slot.slots[0], arrays, slot.index * step - start, step, self.layout
                )
                copied.append(slot.index)
                if len(copied) * self._chunk_bytes >= _COMMIT_BYTES:
                    self.node.commit(ticket, copied)
                    copied = []
            if copied:
                self.node.commit(ticket, copied)
        except BaseException:
            self.node.abort(ticket)  # what is not committed by then
            raise
        if ticket.accepted and ticket.accepted[0].index == 0:
            self.node.familiar.remember(self._first_chunk(token_ids), self._digest, _salt_digest(salt))
        self._count_tenant(tenant, len(ticket.accepted) * step)
        return self._receipt(ticket.accepted, ticket.refused, keys)

    def _receipt(
        self, accepted: list[Any], refused: list[tuple[int, Refusal]], keys: list[ChunkKey]
    ) -> StoreReceipt:
        passed_over = (Refusal.PRESENT, Refusal.IN_FLIGHT)
        taken = [keys[slot.index] for slot in accepted]
        return StoreReceipt(
            accepted=len(taken),
            accepted_tokens=len(taken) * self.chunk_tokens,
            present=sum(1 for _, refusal in refused if refusal in passed_over),
            refusal=next((refusal for _, refusal in refused if refusal not in passed_over), None),
            refusals=tuple(refused),
            _wait=lambda timeout: self.node.wait_for(self._space, taken, timeout),
        )

    # --- finding ------------------------------------------------------------------------------------------------------

    def lookup(self, token_ids: TokenIds, *, salt: str | None = None) -> Lookup:
        """How much of a prompt is cached, and where. Memory only; counts and changes nothing. Raises CacheClosed."""
        self._check_open()
        self._count(token_ids)
        _, keys = self._chain(token_ids, salt)
        match = self.node.lookup(self._space, keys)
        tokens = len(match.tiers) * self.chunk_tokens
        reason = self._why(token_ids, salt, tokens, match.stopped_by)
        return Lookup(tokens, match.tiers, match.pending, reason)

    def load(
        self, token_ids: TokenIds, *, into: Any = None, salt: str | None = None, timeout: float | None = None
    ) -> PendingLoad:
        """Bring the KV of the longest cached prefix; whatever goes wrong only makes it shorter.

        `into`: arrays as for `store`, filled from token 0 on; what stands behind the tokens loaded is undefined then. It belongs
        to the cache until `result` or `cancel` has returned. Without it: fresh host memory. `timeout` (seconds; default
        `async.load_timeout_ms`): when it ends, what is there counts. Raises InvalidArgument, CacheClosed.
        """
        patience = self.node.plan.load_timeout_s if timeout is None else seconds(timeout)
        self._count(token_ids)
        target = None if into is None else kv_arrays(into, self.layout, writable=True)
        if target is not None:
            token_ids = token_ids[: target.tokens]
        _, keys = self._chain(token_ids, salt)
        pending: PendingLoad | None = None
        try:
            with Uninterrupted():
                pending = self._begin_load(token_ids, keys, patience, salt=salt, into=into, target=target)
        except KeyboardInterrupt:  # the caller does not get it: nothing may write to its arrays any more
            if pending is not None:
                pending.cancel()
            raise
        return pending

    def _begin_load(
        self,
        token_ids: TokenIds,
        keys: list[ChunkKey],
        patience: float,
        *,
        salt: str | None,
        into: Any,
        target: KVArrays | None,
    ) -> PendingLoad:
        self._activity.enter()
        pending = PendingLoad(patience + _COPY_PATIENCE_S, on_end=self._activity.leave)
        load: StagedLoad | None = None
        copy: CopyOut | None = None
        try:
            load = self.node.open_load(self._session, self._space, keys, patience)
            copy_out = partial(self._copy_out, load, pending, token_ids=token_ids, salt=salt)
            if target is not None:
                copy = copy_out(kv=into, target=target)
                load.when_ready(copy.advance)
            load.when_answered(partial(self._deliver, load, pending, copy=copy, copy_out=copy_out))
        except BaseException as error:
            if copy is not None:
                copy.give_up()
            if load is not None:
                load.release(used=range(0))
            pending.fail(error)
            raise
        return pending

    def _copy_out(
        self,
        load: StagedLoad,
        pending: PendingLoad,
        *,
        token_ids: TokenIds,
        salt: str | None,
        kv: Any,
        target: KVArrays | None = None,
    ) -> CopyOut:
        """From a load's slots to `target`, the caller's arrays `kv`; None: to `kv`, fresh ones."""

        def why(chunks: int) -> MissReason | None:
            return self._attribute(token_ids, salt, chunks * self.chunk_tokens, load)

        def done(tiers: tuple[Tier, ...], reason: MissReason | None) -> None:
            tokens = len(tiers) * self.chunk_tokens
            brought = kv if target is not None else kv[:, :, :tokens]
            pending.succeed(LoadedKV(tokens, brought, tiers, reason))

        return CopyOut(
            node=self.node,
            load=load,
            layout=self.layout,
            chunk_tokens=self.chunk_tokens,
            target=kv_arrays(kv, self.layout, writable=True) if target is None else target,
            begin=pending.begin_copy,
            why=why,
            done=done,
            failed=pending.fail,
        )

    def _deliver(
        self,
        load: StagedLoad,
        pending: PendingLoad,
        *,
        copy: CopyOut | None,
        copy_out: Callable[..., CopyOut],
    ) -> None:
        """A load was answered: copy, release, tell. Whatever happens, `pending` gets its end and the leases go back."""
        try:
            if self.node.closing or not self._activity.is_open:
                raise CacheClosed("the cache was closed while this load was under way")
            if copy is None:
                copy = copy_out(kv=empty_kv(self.layout, len(load.tiers) * self.chunk_tokens))
        except Exception as error:  # noqa: BLE001 - a MemoryError, for one
            if copy is None:
                load.release(used=range(0))
                pending.fail(error)
            else:
                copy.give_up(error)
            return
        copy.start()

    # --- operating ----------------------------------------------------------------------------------------------------

    def flush(self, timeout: float = 30.0) -> None:
        """Wait until every accepted store has reached its tiers, and what `evict` demotes or deletes too. Raises DeadlineExceeded, InvalidArgument."""
        self.node.flush(seconds_at_most_a_day(timeout))

    def evict(self, tier: Tier | str, target_usage: float = 0.0) -> Evicted:
        """Evict from a tier down to a share of its capacity; what no slower tier has is demoted there first, in the background."""
        target_usage = share(target_usage, "target_usage")
        try:
            tier = Tier(tier)
        except ValueError:
            raise UnknownTier(f"tier {tier!r} is not one of {', '.join(Tier)}") from None
        return self.node.evict_down_to(tier, target_usage)

    def stats(self) -> dict[str, Any]:
        """Usage, hits, misses, queues and latencies, as plain values."""
        stats = self.node.stats()
        with self._tenants_lock:
            stats["tenants"] = dict(self._tenants)
        return stats

    def check_integrity(self, timeout: float = 30.0) -> list[str]:
        """Every inconsistency between index, arena, leases and disk; empty if all is well. Slow."""
        return self.node.check_integrity(seconds_at_most_a_day(timeout))

    def close(self, timeout: float | None = None) -> bool:
        """End the session, and the node if it is this cache's own; idempotent. False if something still runs at the time-out.

        Calls that come now raise CacheClosed; loads that wait for a disk are given up with it; copies under way end first. In a
        forked child nothing is done, and True returned.
        """
        timeout = self.node.plan.close_timeout_s if timeout is None else seconds_at_most_a_day(timeout)
        self._is_open = False
        if self.node.disowned:
            return True
        deadline = time.monotonic() + timeout
        with Uninterrupted():
            if self._activity.shut():
                self.node.give_up_loads(self._session)
        over = self._activity.wait_over(timeout)
        if not self._owns_node:
            return over
        return self.node.close(max(0.0, deadline - time.monotonic())) and over

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        """Collected unclosed: warn, and have the node's ticker let go. The collector's thread may hold any lock, so it takes none."""
        if not self._is_open or self.node.closing or self.node.disowned:
            return
        self.node.abandoned.add(None if self._owns_node else self._session)
        warnings.warn(f"unclosed {self!r}: call close(), or use `with`", ResourceWarning, 2, source=self)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _check_open(self) -> None:
        if not self._activity.is_open:
            raise CacheClosed("the cache is closed: open a new one")

    @staticmethod
    def _count(token_ids: TokenIds) -> int:
        try:
            return len(token_ids)
        except TypeError:  # a tensor of no dimensions has no length either
            raise LayoutMismatch(
                f"token ids must be a flat sequence of integers, got {type(token_ids).__name__}"
            ) from None

    def _chain(self, token_ids: TokenIds, salt: str | None) -> tuple[ChunkKey, list[ChunkKey]]:
        root = root_key(self._digest, salt)
        return root, chunk_keys(root, token_ids, self.chunk_tokens)

    def _first_chunk(self, token_ids: TokenIds) -> memoryview:
        return encode_tokens(token_ids[: self.chunk_tokens])

    def _why(
        self, token_ids: TokenIds, salt: str | None, tokens: int, reason: MissReason | None
    ) -> MissReason | None:
        if reason is None:
            return MissReason.PARTIAL_CHUNK if tokens < len(token_ids) else None
        if tokens == 0 and reason is MissReason.NEVER_SEEN:
            known = self.node.familiar.reason(self._first_chunk(token_ids), self._digest, _salt_digest(salt))
            return known or reason
        return reason

    def _attribute(
        self, token_ids: TokenIds, salt: str | None, tokens: int, load: StagedLoad
    ) -> MissReason | None:
        reason = self._why(token_ids, salt, tokens, load.stopped_by)
        if reason is not None and reason is not load.stopped_by:
            self.node.reattribute(load.ticket, reason)
        return reason

    @staticmethod
    def _check_tenant(tenant: object) -> None:
        if tenant is not None and not isinstance(tenant, str):
            raise InvalidArgument(f"tenant is a name or None, got {tenant!r}")

    def _count_tenant(self, tenant: str | None, tokens: int) -> None:
        if tenant is None or not tokens:
            return
        with self._tenants_lock:
            name = tenant if tenant in self._tenants or len(self._tenants) < _MAX_TENANTS else "(others)"
            self._tenants[name] = self._tenants.get(name, 0) + tokens


def _salt_digest(salt: str | None) -> bytes:
    return hashlib.sha256(encode_salt(salt)).digest()
