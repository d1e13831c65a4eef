"""A paged engine without a model, for the two sides of the vLLM connector: scheduler, block pool and ranks, stepped by a test.

It makes the calls that vLLM's scheduler and workers make, in their order. The KV of a block is drawn from its hash, its rank and the
weights' version, so after every step each block that a request counts as computed is compared, byte by byte, on every rank.
"""

from __future__ import annotations

import hashlib
import pickle
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from kvtiers.integrations.vllm.messages import CopyReport
from kvtiers.integrations.vllm.scheduler import SchedulerSide
from kvtiers.node.client import GRACE_S, NodeClient
from kvtiers.testing.paged_blocks import BLOCK_TOKENS, RANKS, PagedPool, PagedRequest, Rank, paged_plan

TOKENS_A_STEP: Final = 40


class PagedEngine:
    """Scheduler, pool and ranks. `skew` is added to the clock of everything in it."""

    def __init__(
        self,
        socket: Path,
        *,
        num_blocks: int = 48,
        load_timeout_s: float = 10.0,
        max_pinned_share: float = 0.5,
    ) -> None:
        self.plan = paged_plan(num_blocks)
        self.skew = 0.0
        self.weights = 0
        self.load_timeout_s = load_timeout_s
        token = hashlib.sha256(str(id(self)).encode()).digest()

        def client(name: str) -> NodeClient:
            return NodeClient(socket, name=name, engine=token, clock=self.clock)

        self.client = client("scheduler")
        self.side = SchedulerSide(
            self.client,
            self.plan,
            load_timeout_s=load_timeout_s,
            max_pinned_share=max_pinned_share,
            clock=self.clock,
        )
        self.ranks = [Rank(rank, self.plan, client(f"rank {rank}")) for rank in range(RANKS)]
        self.pool = PagedPool(num_blocks, self._scribble)
        self.side.bind(self.pool)
        self.waiting: list[PagedRequest] = []
        self.running: list[PagedRequest] = []
        self.refuse_blocks = False
        """Requests that wait get no blocks."""
        self.seen: dict[int, set[tuple[bytes, ...]]] = {}
        """Chains of block hashes of all requests, by version of the weights."""
        self.loaded_tokens = 0
        self.preemptions = 0
        """For want of blocks."""
        self._aborted: dict[str, PagedRequest] = {}
        self._arrived: set[str] = set()
        self._failed: set[str] = set()
        self._ranks_done: dict[str, int] = {}
        self._asked: dict[str, tuple[int, float]] = {}

    def clock(self) -> float:
        """Monotonic, with leaps."""
        return time.monotonic() + self.skew

    # --- what a test does -------------------------------------------------------------------------------------------------

    def connect(self, timeout: float = 30.0) -> PagedEngine:
        """Step until the service knows the namespace and every rank is connected. AssertionError if not in time."""
        deadline = time.monotonic() + timeout
        while not (self.side.ready and all(rank.link.connected for rank in self.ranks)):
            assert time.monotonic() < deadline, "no connection in time"
            self.step()
            time.sleep(0.002)
        return self

    def add(self, request: PagedRequest) -> PagedRequest:
        """A new request."""
        self.waiting.append(request)
        self.side.on_new_request(request)
        return request

    def abort(self, request: PagedRequest) -> None:
        """The client went away."""
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)
        if request.remote and request.request_id not in self._arrived:
            self.side.finished(request, request.blocks)
            self._aborted[request.request_id] = request  # workers may still write
            return
        self._arrived.discard(request.request_id)
        self._failed.discard(request.request_id)
        self._finish(request)

    def preempt(self, request: PagedRequest) -> None:
        """It lost its blocks, and waits again."""
        self.running.remove(request)
        self._free(request)
        request.num_computed_tokens = 0
        self.waiting.insert(0, request)

    def reset(self) -> bool:
        """New weights. False, and nothing happened, while blocks are in use."""
        for request in reversed(self.running[:]):
            self.preempt(request)
        if not self.pool.reset():
            return False
        self.weights += 1
        self.side.reset(self.weights)
        return True

    def step(self) -> None:
        """Schedule, compute on every rank, take the outcome, and look at every block."""
        scheduled = self._schedule()
        by_id = {request.request_id: request for request in self.running}
        jobs = self.side.begin_step(list(scheduled), lambda request_id: by_id[request_id].blocks[:])
        message = pickle.dumps(jobs)
        report, bad = CopyReport(), set[int]()
        for request_id, count in scheduled.items():
            by_id[request_id].num_computed_tokens += count
        done: list[str] = []
        for rank in self.ranks:
            theirs = pickle.loads(message)  # noqa: S301 - our own
            rank.worker.begin_loads(theirs)
            for request_id, count in scheduled.items():
                self._compute(rank, by_id[request_id], count)
            rank.worker.begin_stores(theirs)
            loaded, not_filled = rank.worker.take_loaded()
            bad |= not_filled
            for request_id in loaded:
                self._ranks_done[request_id] = self._ranks_done.get(request_id, 0) + 1
                assert self._ranks_done[request_id] <= RANKS, "a load was reported twice"
                if self._ranks_done[request_id] == RANKS:
                    del self._ranks_done[request_id]
                    done.append(request_id)
            report.add(rank.worker.take_report() or CopyReport())
        self._update(scheduled, done, bad, report)
        self.check()

    def check(self) -> None:
        """Every block that counts as computed has the right bytes, and every reference is somebody's. AssertionError."""
        for request in [*self.running, *self.waiting]:
            if request.remote and request.request_id not in self._arrived:
                continue
            for place in range(request.num_computed_tokens // BLOCK_TOKENS):
                self._check_block(request.blocks[place], request.block_hashes[place])
        for block_hash, block in self.pool.cached.items():
            self._check_block(block, block_hash)
        owners = [*self.running, *self.waiting, *self._aborted.values()]
        held = sum(len(request.blocks) for request in owners)
        assert self.pool.references == held + self.side.stores.pinned

    def drain(self, timeout: float = 30.0) -> None:
        """Step until every request has ended and nothing is pinned. AssertionError if that does not come in time."""
        deadline = time.monotonic() + timeout
        while (
            self.running
            or self.waiting
            or self._aborted
            or self.side.stores.busy
            or self.side.stores.settling
        ):
            assert time.monotonic() < deadline, (
                f"stuck: {self.waiting} {self._aborted} {self.side.stores.busy}"
            )
            self.step()
            time.sleep(0.001)
        assert self.side.stores.pinned == 0
        assert self.pool.references == 0
        assert not self.side._loading
        assert not self.side._states

    def close(self) -> None:
        """End the ranks' threads and say goodbye."""
        for rank in self.ranks:
            rank.link.gate.set()
        ended = [rank.worker.close() for rank in self.ranks]
        assert all(ended)
        self.side.close()
        for rank in self.ranks:
            rank.link.client.close()

    # --- inside -----------------------------------------------------------------------------------------------------------

    def _schedule(self) -> dict[str, int]:
        budget, scheduled, preempted = TOKENS_A_STEP, dict[str, int](), False
        for request in self.running[:]:
            if request not in self.running:
                continue
            count = min(budget, request.num_tokens - request.num_computed_tokens)
            while count and not self._grow(request, request.num_computed_tokens + count):
                if self.side.stores.frees_blocks:
                    self._admit(scheduled, budget)
                    return scheduled
                self.preemptions += 1
                victim = self.running[-1]
                preempted = True
                budget += scheduled.pop(victim.request_id, 0)
                self.preempt(victim)
                if victim is request:
                    count = 0
            if count:
                scheduled[request.request_id] = count
                budget -= count
        if not preempted:
            self._admit(scheduled, budget)
        return scheduled

    def _admit(self, scheduled: dict[str, int], budget: int) -> None:
        for request in self.waiting[:]:
            if request.remote and not self._arrive(request):
                continue
            if not budget:
                break
            local: list[int] = []
            external = 0
            if request.num_computed_tokens == 0:
                local = self._local_hit(request)
                answer = self._ask(request, len(local) * BLOCK_TOKENS)
                if answer is None:
                    continue
                external = answer
            computed = request.num_computed_tokens + len(local) * BLOCK_TOKENS + external
            assert computed <= request.num_tokens
            count = 0 if external else min(budget, request.num_tokens - computed)
            if self.refuse_blocks or not self._grow(request, computed + count, local):
                break
            self.side.allocated(request, request.blocks[:], external)
            request.num_computed_tokens = computed
            if external:
                request.remote = True
                self.loaded_tokens += external
                continue
            self.waiting.remove(request)
            self.running.append(request)
            scheduled[request.request_id] = count
            budget -= count

    def _ask(self, request: PagedRequest, local_tokens: int) -> int | None:
        """Tokens beyond; None while it is being found out, which must not last."""
        before = self.clock()
        answer, asynchronous = self.side.matched(request, local_tokens)
        assert asynchronous == bool(answer)
        if answer is not None:
            self._asked.pop(request.request_id, None)
            return answer
        load = id(self.side._states[request.request_id].load)
        known, since = self._asked.get(request.request_id, (load, self.clock()))
        if known != load:
            since = self.clock()
        self._asked[request.request_id] = (load, since)
        assert before <= since + self.load_timeout_s + GRACE_S, "it waits past its deadline"
        return None

    def _arrive(self, request: PagedRequest) -> bool:
        if request.request_id not in self._arrived:
            return False
        self._arrived.remove(request.request_id)
        request.remote = False
        if request.request_id in self._failed:
            self._failed.remove(request.request_id)
            if not request.num_computed_tokens:
                self._free(request)
        self._keep(request)
        request.num_computed_tokens = min(request.num_computed_tokens, request.num_tokens - 1)
        return True

    def _local_hit(self, request: PagedRequest) -> list[int]:
        if request.skip_reading_prefix_cache:
            return []
        found: list[int] = []
        for block_hash in request.block_hashes[: (request.num_tokens - 1) // BLOCK_TOKENS]:
            if block_hash not in self.pool.cached:
                break
            found.append(self.pool.cached[block_hash])
        return found

    def _grow(self, request: PagedRequest, tokens: int, local: Sequence[int] = ()) -> bool:
        """Blocks for so many tokens, the first of them `local`; all or nothing."""
        missing = -(-tokens // BLOCK_TOKENS) - len(request.blocks) - len(local)
        self.pool.touch([self.pool.blocks[block] for block in local])
        fresh = self.pool.allocate(max(0, missing))
        if fresh is None:
            self.pool.free_blocks(self.pool.blocks[block] for block in reversed(local))
            return False
        request.blocks += [*local, *fresh]
        return True

    def _compute(self, rank: Rank, request: PagedRequest, count: int) -> None:
        begin, end = request.num_computed_tokens - count, request.num_computed_tokens
        for place in range(begin // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)):
            full = (place + 1) * BLOCK_TOKENS <= end
            rank.compute(request.blocks[place], request.block_hashes[place] if full else None, self.weights)

    def _update(
        self, scheduled: Mapping[str, int], done: Sequence[str], bad: set[int], report: CopyReport
    ) -> None:
        for request in self.waiting:
            if request.remote and request.request_id not in self._arrived:
                self._truncate(request, bad)
        for request in [one for one in self.running if one.request_id in scheduled]:
            self._keep(request)
            if request.num_computed_tokens == request.num_tokens:
                request.extend([1_000_000 + request.num_tokens])
                request.generated += 1
            self._see(request)
            if request.generated >= request.max_new:
                self.running.remove(request)
                self._finish(request)
        if bad:
            self.side.not_filled(bad)
        self.side.loaded(done)
        self.side.copied(report)
        for request_id in done:
            aborted = self._aborted.pop(request_id, None)
            if aborted is None:
                self._arrived.add(request_id)
            else:
                self._free(aborted)

    def _truncate(self, request: PagedRequest, bad: set[int]) -> None:
        computed = -(-request.num_computed_tokens // BLOCK_TOKENS)
        for place, block in enumerate(request.blocks[:computed]):
            if block in bad:
                request.num_computed_tokens = place * BLOCK_TOKENS
                self._failed.add(request.request_id)
                return

    def _keep(self, request: PagedRequest) -> None:
        for place in range(request.num_computed_tokens // BLOCK_TOKENS):
            self.pool.keep(request.blocks[place], request.block_hashes[place])

    def _see(self, request: PagedRequest) -> None:
        self.seen.setdefault(self.weights, set()).add(tuple(request.block_hashes))

    def _finish(self, request: PagedRequest) -> None:
        self._see(request)
        self.side.finished(request, request.blocks[:])
        self._free(request)

    def _free(self, request: PagedRequest) -> None:
        self.pool.free_blocks(self.pool.blocks[block] for block in reversed(request.blocks))
        request.blocks.clear()

    def _scribble(self, block: int) -> None:
        for rank in self.ranks:
            rank.scribble(block)

    def _check_block(self, block: int, block_hash: bytes) -> None:
        for rank in self.ranks:
            assert rank.holds(block, block_hash, self.weights), f"rank {rank.rank}: block {block} is wrong"
