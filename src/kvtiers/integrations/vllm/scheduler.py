"""The scheduler's side: stages what a request needs, answers when it lies in the arena, offers what was computed.

Every call is cheap and none waits: what was posted goes out, and what has arrived is taken, in `NodeClient.step`.

    on_new_request ─▶ stage ─ … (None, False) … ─▶ (n, True) ─▶ load job ─▶ workers ─▶ leases go back
    each step: chunks that are computed by now ─▶ `Stores`
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Final, NamedTuple

from kvtiers.integrations.vllm.adapters import Adapters
from kvtiers.integrations.vllm.counts import Counts
from kvtiers.integrations.vllm.messages import ChunkCopy, CopyReport, LoadJob, StepJobs
from kvtiers.integrations.vllm.plan import EnginePlan
from kvtiers.integrations.vllm.requests import Phase, Request, RequestState, Wishes
from kvtiers.integrations.vllm.stores import BlockPool, Stores
from kvtiers.model.keys import KEY_BYTES, ChunkKey
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.node.client import GRACE_S, NodeClient
from kvtiers.node.handles import Attachment, Load

_log = logging.getLogger(__name__)

_NOTHING: Final = (0, False)
_LATER: Final = (None, False)
_NONE: Final = range(0)
_MOST_GONE: Final = 1024
_PASSING: Final = frozenset(
    {MissReason.TIER_OPEN, MissReason.NO_SLOT, MissReason.STAGING_TIMEOUT, MissReason.IN_FLIGHT}
)
_PASSES_S: Final = 0.25
"""What was missed a shorter time ago is missed still."""
_HOLD_S: Final = 20.0
"""How long leases wait for their request to be scheduled, from the end of the time that staging may take."""


class _Held(NamedTuple):
    """Leases that workers read by."""

    load: Load
    used: range
    """Those of its chunks that they copy; once something of one was not filled, those before it, which the engine keeps."""
    chunks: list[ChunkCopy]
    """The same, with their blocks."""

    def without(self, bad: frozenset[int]) -> _Held:
        """What is left of it if these blocks were not filled."""
        good = next(
            (i for i, chunk in enumerate(self.chunks) if not bad.isdisjoint(chunk.blocks)), len(self.chunks)
        )
        return self._replace(used=self.used[:good], chunks=self.chunks[:good])


class SchedulerSide:
    """One engine's requests."""

    def __init__(
        self,
        client: NodeClient,
        plan: EnginePlan,
        *,
        load_timeout_s: float,
        max_pinned_share: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._plan = plan
        self._load_timeout = load_timeout_s
        self._clock = clock
        self._epoch = 0
        self._adapters = Adapters()
        self._pool: BlockPool | None = None
        self._looked = False
        self._states: dict[str, RequestState] = {}
        self._loading: dict[str, _Held] = {}
        """By request, also of aborted ones."""
        self._new_loads: list[LoadJob] = []
        self._staged: deque[tuple[float, Load, RequestState]] = deque()
        """Loads by the time they lapse; most have been used or given back."""
        self._gone: dict[ChunkKey, bool] = {}
        """First chunks of prompts whose start the cache has lost and no request is left to offer it."""
        self._stores = Stores(
            client,
            world_size=plan.world_size,
            max_pinned=max(plan.blocks_per_chunk, int(plan.num_blocks * max_pinned_share)),
            clock=clock,
        )
        self._space = self._attach(plan)
        self._root = ChunkKey(plan.namespace.digest)
        self.counts = Counts(chunk_tokens=plan.chunk_tokens, hashes_per_chunk=plan.hashes_per_chunk)

    @property
    def stores(self) -> Stores:
        """What is on its way into the cache."""
        return self._stores

    @property
    def ready(self) -> bool:
        """Whether the service knows this engine's namespace."""
        return self._space.ready

    @property
    def error(self) -> str | None:
        """Why the service does not take the namespace."""
        return self._space.error

    def bind(self, pool: BlockPool) -> None:
        """The engine's blocks."""
        self._pool = pool
        self._stores.bind(pool)

    # --- loading ------------------------------------------------------------------------------------------------------

    def on_new_request(self, request: Request) -> None:
        """Stage at the first sight of it, long before it is scheduled."""
        self._hear()
        may_load, may_store, tenant = Wishes.of(request.kv_transfer_params)
        state = RequestState(request, self._epoch, may_load, may_store, tenant=tenant)
        self._states[request.request_id] = state
        if request.lora_request is not None:
            state.asked = self._adapters.ask(request.lora_request)
            if state.asked is None:
                state.may_load = state.may_store = False
            else:
                state.adapter = state.asked.key
        self._stage(state, self._own_chunks(request))

    def matched(self, request: Request, local_tokens: int) -> tuple[int | None, bool]:
        """Tokens beyond the engine's own that lie in the arena; (None, False) while that is being found out.

        Asked again and again while a request waits, with `local_tokens` that may change; changes nothing that counts.
        """
        state = self._states.get(request.request_id)
        if state is None:
            return _NOTHING
        own = local_tokens // self._plan.chunk_tokens
        state.local_tokens = local_tokens
        if state.phase is Phase.DONE:
            self._begin_again(state, own)
        if request.skip_reading_prefix_cache or not state.may_load:
            return _NOTHING
        if not self._has_keys(state):
            return _NOTHING if state.adapter is None else self._later(state)
        lost = state.load is not None and self._is_lost(state.load)
        if own < state.first or lost or self._may_have_passed(state):
            self._let_go(state)
            state.phase = Phase.NEW
        if state.phase is Phase.NEW:
            self._stage(state, own)  # what was staged before is gone, or begins too late
        if state.load is None:
            return _NOTHING
        if not state.load.done and not self._looked:
            self._looked = True  # for all that wait, once in each step of the engine's
            self._client.step()
        if not state.load.done:
            return self._later(state)
        state.until = None
        beyond = self._staged_tokens(state) - local_tokens
        return (beyond, True) if beyond > 0 else _NOTHING

    def allocated(self, request: Request, blocks: Sequence[int], external_tokens: int) -> None:
        """The request has its blocks: load `external_tokens` into them, or nothing."""
        state = self._states.get(request.request_id)
        if state is None or (state.phase is Phase.LOADING and not external_tokens):
            return  # that is the second call, once its load has ended
        load, state.load = state.load, None
        state.phase, state.until = Phase.DONE, None
        self.counts.admitted(state)
        self._take_as_kept(state, state.local_tokens // self._plan.chunk_tokens - 1)
        if load is None:
            return
        if not external_tokens:
            self._client.release(load, used=_NONE)
            return
        begin, end = state.local_tokens, state.local_tokens + external_tokens
        chunks = self._copies(load, state.first, blocks, begin, end)
        state.phase = Phase.LOADING
        state.sources = load.tiers
        self._take_as_kept(state, end // self._plan.chunk_tokens)
        first_used = begin // self._plan.chunk_tokens - state.first
        self._loading[request.request_id] = _Held(load, range(first_used, first_used + len(chunks)), chunks)
        self._new_loads.append(LoadJob(request.request_id, load.arena, chunks))
        state.loading_tokens = external_tokens
        self.counts.total["loads"] += 1

    def sources(self, request: Request, external_tokens: int) -> dict[Tier, int]:
        """The tokens of its load by the tier they came from."""
        state = self._states.get(request.request_id)
        if state is None:
            return {}
        size = self._plan.chunk_tokens
        begin, end = state.local_tokens, state.local_tokens + external_tokens
        found: dict[Tier, int] = {}
        for index, tier in enumerate(state.sources, state.first):
            tokens = min(end, (index + 1) * size) - max(begin, index * size)
            if tokens > 0:
                found[tier] = found.get(tier, 0) + tokens
        return found

    def not_filled(self, blocks: Iterable[int]) -> None:
        """Some worker could not fill these. It may come before the others have ended."""
        bad = frozenset(blocks)
        for request_id, held in self._loading.items():
            left = held.without(bad)
            if len(left.used) == len(held.used):
                continue
            self._loading[request_id] = left  # no key is added: the walk goes on
            state = self._states.get(request_id)
            if state is not None and not state.load_failed:
                self.counts.total["load_failures"] += 1
                state.load_failed = True
                state.offered, state.taken_as_kept = 0, False  # what it computes instead is offered again

    def loaded(self, request_ids: Iterable[str]) -> None:
        """No worker touches these requests' blocks any more."""
        for request_id in request_ids:
            held = self._loading.pop(request_id, None)
            if held is None:
                continue
            state = self._states.get(request_id)
            self._client.release(held.load, used=_NONE if state is None else held.used)
            if state is not None:
                state.phase = Phase.DONE
                if not state.load_failed:
                    self.counts.loaded(state, self.sources(state.request, state.loading_tokens))

    # --- storing ------------------------------------------------------------------------------------------------------

    def begin_step(self, scheduled: Iterable[str], block_ids: Callable[[str], Sequence[int]]) -> StepJobs:
        """What the workers are to begin with this step. `block_ids`: of a request that is scheduled in it."""
        self._hear()
        for request_id in scheduled:
            state = self._states.get(request_id)
            if state is not None and self._computed_chunks(state) > state.offered:
                self._offer(state, block_ids(request_id))
        self._let_lapse()
        self._client.step()
        self._looked = False
        jobs = StepJobs(self._new_loads, self._stores.take_jobs())
        self._new_loads = []
        return jobs

    def copied(self, report: CopyReport) -> None:
        """What workers have copied to the arena."""
        self._stores.copied(report)
        self.counts.copied(report)
        self._client.step()

    def finished(self, request: Request, blocks: Sequence[int]) -> None:
        """The request is over, its blocks are about to be let go: the last of them are offered, and pinned before."""
        state = self._states.pop(request.request_id, None)
        if state is None:
            return
        if self._computed_chunks(state) > state.offered:
            self._offer(state, blocks)
            self.counts.total["not_offered"] += max(0, self._computed_chunks(state) - state.offered)
        if state.load is not None:
            self._let_go(state)
            self._client.step()  # it may be the engine's last for a long time

    def reset(self, epoch: int) -> None:
        """From now on nothing from before is found by this engine. What others have stored stays theirs."""
        self._client.detach(self._space)
        self._epoch = epoch
        self._plan = self._plan.with_epoch(epoch)
        self._space = self._attach(self._plan)
        self._root = ChunkKey(self._plan.namespace.digest)
        for state in self._states.values():
            self._let_go(state)
            if state.phase in (Phase.NEW, Phase.STAGING):
                state.epoch, state.offered = epoch, 0  # nothing of it is computed
        self._hear()

    def close(self) -> None:
        """Say goodbye, unless workers may still copy: then the end of the engine's processes says that nobody does any more."""
        self._adapters.close()
        if self._loading or self._stores.busy:
            _log.info(
                "ending while copies are under way: their slots are free when every process of the engine is gone"
            )
            return
        self._client.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """A namespace whose answer lies unread takes no chunks: what is asked for or offered before it was heard would be lost."""
        if not self._space.ready:
            self._client.step()

    def _attach(self, plan: EnginePlan) -> Attachment:
        return self._client.attach(
            plan.namespace.digest, plan.parts, chunk_tokens=plan.chunk_tokens, itemsize=plan.itemsize
        )

    def _has_keys(self, state: RequestState) -> bool:
        """Whether its keys are what they should be: its adapter's files, if it has one, were looked at since it came."""
        asked = state.asked
        if asked is None:
            return state.adapter is not None
        if not asked.answered:
            return False
        state.asked, before, state.adapter = None, state.adapter, asked.key
        if state.adapter is None:
            state.may_load = state.may_store = False
        if state.adapter != before:
            self._let_go(state)
            state.phase = Phase.NEW if state.phase is Phase.STAGING else state.phase
        return state.adapter is not None

    def _may_have_passed(self, state: RequestState) -> bool:
        """Whether its miss was for want of something that may be there by now: then it is staged once more, in the time it may wait."""
        load, now = state.load, self._clock()
        if load is None or not load.done or load.stopped_by not in _PASSING or state.staged_again:
            return False
        if now - state.staged_at < _PASSES_S or (state.until is not None and now >= state.until):
            return False
        state.staged_again = True
        return True

    def _later(self, state: RequestState) -> tuple[int | None, bool]:
        """Ask again, but not for longer than a request may wait in its turn."""
        now = self._clock()
        if state.until is None:
            state.until = now + self._load_timeout + GRACE_S
        return _LATER if now < state.until else _NOTHING

    def _stage(self, state: RequestState, own: int) -> None:
        """Ask for the chunks behind the engine's own, so that nothing is brought up that nobody needs."""
        request, plan = state.request, self._plan
        state.phase, state.first = Phase.STAGING, 0
        if not state.may_load or state.load_failed or request.skip_reading_prefix_cache:
            return
        if state.adapter is None:
            state.phase = Phase.NEW
            return
        keys = self._keys(state, len(request.block_hashes) // plan.hashes_per_chunk)[own:]
        state.first = own
        if not keys:
            return
        now = state.staged_at = self._clock()
        state.load = self._client.stage(self._space, keys, deadline=now + self._load_timeout)
        self._staged.append((now + self._load_timeout + _HOLD_S, state.load, state))
        self.counts.asked(state, len(keys) * plan.chunk_tokens)
        self._client.step()

    def _begin_again(self, state: RequestState, own: int) -> None:
        """It was preempted, or its load has failed: nothing of it is computed any more."""
        if state.epoch != self._epoch:
            state.epoch, state.offered = self._epoch, 0
        state.staged_again, state.asked_tokens = False, 0
        self._stage(state, own)

    def _own_chunks(self, request: Request) -> int:
        """Chunks from the start that the engine's own blocks hold at this moment; never all of a prompt, whose last token is computed."""
        pool, plan, found = self._pool, self._plan, 0
        if pool is None:
            return 0
        for last in range(plan.hashes_per_chunk - 1, len(request.block_hashes), plan.hashes_per_chunk):
            if pool.get_cached_block(request.block_hashes[last], [plan.group]) is None:
                break
            found += 1
        return min(found, (request.num_tokens - 1) // plan.chunk_tokens)

    def _is_lost(self, load: Load) -> bool:
        """Whether it has chunks in the arena of a service that is gone: no worker could read them."""
        return load.num_chunks > 0 and self._client.view(load.arena, 0, 0) is None

    def _let_go(self, state: RequestState) -> None:
        """Of what was staged for it and not used: it is staged anew if it is asked about again."""
        load, state.load = state.load, None
        if load is not None:
            state.phase = Phase.NEW
            self._client.release(load, used=_NONE)

    def _let_lapse(self) -> None:
        """Requests that wait long for their turn don't keep others' chunks out of memory; they are staged again when it comes."""
        now = self._clock()
        while self._staged and now > self._staged[0][0]:
            _, load, state = self._staged.popleft()
            if state.load is load:
                self.counts.total["lapsed"] += load.num_chunks > 0  # a miss is forgotten as well
                self._let_go(state)

    def _staged_tokens(self, state: RequestState) -> int:
        load = state.load
        return 0 if load is None else (state.first + load.num_chunks) * self._plan.chunk_tokens

    def _copies(
        self, load: Load, first_chunk: int, blocks: Sequence[int], begin: int, end: int
    ) -> list[ChunkCopy]:
        """What lies between two tokens, both at the border of a block."""
        plan, copies = self._plan, []
        block, last = begin // plan.block_tokens, -(-end // plan.block_tokens)
        while block < last:
            index, first = divmod(block, plan.blocks_per_chunk)
            until = min(last, (index + 1) * plan.blocks_per_chunk)
            copies.append(
                ChunkCopy(
                    tuple(map(int, load.offsets[index - first_chunk])), first, tuple(blocks[block:until])
                )
            )
            block = until
        return copies

    def _computed_chunks(self, state: RequestState) -> int:
        """Chunks whose KV was computed in steps before this one, and may be kept."""
        if not state.may_store or state.epoch != self._epoch or state.phase is not Phase.DONE:
            return 0
        if not self._has_keys(state):
            return 0
        request = state.request
        tokens = request.num_computed_tokens - request.num_output_placeholders
        return min(
            tokens // self._plan.chunk_tokens, len(request.block_hashes) // self._plan.hashes_per_chunk
        )

    def _offer(self, state: RequestState, blocks: Sequence[int]) -> None:
        per_chunk, upto = self._plan.blocks_per_chunk, self._computed_chunks(state)
        upto = min(upto, len(blocks) // per_chunk)
        chunks = {
            index: tuple(blocks[index * per_chunk : (index + 1) * per_chunk])
            for index in range(state.offered, upto)
        }
        if chunks:
            keys = self._keys(state, upto)
            broken = partial(self._lacks_the_start, state, keys[0])
            state.offered += self._stores.offer(self._space, self._root, keys, chunks, broken)

    def _take_as_kept(self, state: RequestState, chunks: int) -> None:
        """So many chunks from the start came from the cache, or the engine has them, and offered them once.

        Of those that it has, the last is offered all the same: the service looks at what comes before it, and says if that is gone.
        """
        start = self._keys(state, 1) if chunks > state.offered else []
        if start and not self._gone.pop(start[0], False):
            state.offered, state.taken_as_kept = chunks, True

    def _lacks_the_start(self, state: RequestState, start: ChunkKey) -> None:
        """The cache has evicted what the engine still has: it is offered by this request, or by the next one that begins so."""
        if not state.taken_as_kept:
            return  # the service has refused it a moment ago
        state.offered, state.taken_as_kept = 0, False
        if self._states.get(state.request.request_id) is not state:
            self._gone[start] = True
            if len(self._gone) > _MOST_GONE:
                del self._gone[next(iter(self._gone))]

    def _keys(self, state: RequestState, chunks: int) -> list[ChunkKey]:
        """A chunk's key is the hash of its last block, which covers all tokens before it, salt and images; and its adapter's weights."""
        per_chunk, hashes, adapter = self._plan.hashes_per_chunk, state.request.block_hashes, state.adapter
        if adapter is None:
            return []
        return [_key(hashes[(index + 1) * per_chunk - 1], adapter) for index in range(chunks)]


def _key(block_hash: bytes, adapter: bytes) -> ChunkKey:
    if len(block_hash) == KEY_BYTES and not adapter:
        return ChunkKey(block_hash)
    return ChunkKey(hashlib.sha256(adapter + block_hash).digest())
