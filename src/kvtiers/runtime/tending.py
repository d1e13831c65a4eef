"""What has to be done now and then: deadlines, breakers, health, space, and comparing the disk with the index.

Two daemon threads. The ticker touches memory only, so it is never late because of a disk; what needs I/O (a breaker's probe, a
check-up, the order of use at close) is a job on the store's own pool. The other thread compares: at once after the start, then
every ten minutes, as others may put files into the directory, or take ours. These later walks rest 19 times as long as they work.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import islice
from typing import Protocol, TypeVar

from kvtiers.core.core import Core
from kvtiers.core.messages import (
    Chunkmark,
    News,
    OpId,
    Priority,
    Recovered,
    RecoveryEnded,
    SpaceLow,
    SpaceReport,
    StoreDown,
    StoreUp,
    Vanished,
)
from kvtiers.model.errors import StoreError, StoreUnavailable
from kvtiers.model.parts import RecordRef
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.offload import OffloadEngine
from kvtiers.runtime.plan import NodePlan
from kvtiers.runtime.pools import Job
from kvtiers.stores.base import DamagedRecord, StoredRecord
from kvtiers.stores.guard import BreakerState, Guard

_log = logging.getLogger(__name__)
T = TypeVar("T")

_BATCH = 256
_BUSY_TICK_S = 0.05
_IDLE_TICK_S = 0.5
_SPACE_EVERY_S = 1.0
_WALK_EVERY_S = 600.0
_REST = 19.0
"""After each step of a later walk, times what the step took: 5 % of one core at most."""
_NO_OP = OpId(0)


class Tended(Protocol):
    """What is tended: a node, as far as this page needs it."""

    @property
    def engine(self) -> OffloadEngine:
        """Runs what needs I/O."""
        ...

    def tell(self, news: Sequence[News]) -> None:
        """Pass news on to the core."""
        ...

    def tick(self) -> float | None:
        """Let time pass; returns the next load's deadline."""
        ...

    def inspect(self, look: Callable[[Core], T]) -> T:
        """Read the core under its mutex."""
        ...

    def let_go_of_abandoned(self) -> None:
        """Close what was collected unclosed."""
        ...


class Tender:
    """The background of one node."""

    def __init__(
        self, node: Tended, guards: Mapping[Tier, Guard], plan: NodePlan, clock: Callable[[], float]
    ) -> None:
        self._node = node
        self._guards = guards
        self._plan = plan
        self._clock = clock
        self._wake = threading.Event()
        self._stopping = threading.Event()
        self._space_at = float("-inf")
        self._health_at = clock() + plan.health_check_s
        self._telling = threading.Lock()
        self._down: set[Tier] = set()
        """Stores that were said to be out of order."""
        self._restarts = dict.fromkeys(plan.shared, 0)
        """Of the engines of shared stores, as far as what they were known to hold was forgotten."""
        self._asked: set[tuple[Tier, Callable[[Tier], None]]] = set()
        """Work on the stores' pools that has not ended yet: on a hung disk it must not pile up."""
        self._ticker = threading.Thread(target=self._tick_loop, name="kvtiers-ticker", daemon=True)
        self._reconciler = threading.Thread(target=self._reconcile, name="kvtiers-reconcile", daemon=True)
        self.reconciled = threading.Event()
        """Set when the stores have been compared with the index."""

    def start(self) -> None:
        """Learn what the stores hold (from their logs, fast), then start the threads."""
        with _no_garbage_collection():
            for tier, guard in self._guards.items():
                records = (_recovered(tier, record) for record in guard.recover())
                for batch in _batches(records, _BATCH):
                    self._node.tell(batch)
        self._report_space()
        for tier in self._plan.shared:
            self._ask(tier, self._greet)
        self._ticker.start()
        self._reconciler.start()

    def wake(self) -> None:
        """A load is waiting: look at the deadlines again."""
        self._wake.set()

    def stop(self, timeout: float) -> None:
        """End both threads; daemons, if they do not end in time."""
        deadline = time.monotonic() + timeout
        self._stopping.set()
        self._wake.set()
        for thread in (self._ticker, self._reconciler):
            if thread.ident is not None:
                thread.join(max(0.05, deadline - time.monotonic()))

    def remember_order(self, timeout: float) -> None:
        """Have the stores keep the order of use for the next start; on their own threads, for as long as `timeout`."""
        done: list[threading.Event] = []
        for tier, guard in self._guards.items():
            order = self._node.inspect(lambda core, tier=tier: core.order_of_use(tier))  # type: ignore[misc]
            refs = [
                RecordRef(namespace, key, part) for namespace, key, parts in order for part in range(parts)
            ]
            ended = threading.Event()

            def remember(
                guard: Guard = guard, refs: list[RecordRef] = refs, ended: threading.Event = ended
            ) -> None:
                try:
                    guard.remember(refs)
                except StoreError as error:
                    _log.warning(
                        "the order of use of %s is not kept for the next start: %s", guard.name, error
                    )
                finally:
                    ended.set()

            if self._node.engine.run_on(tier, Job(_NO_OP, Priority.LOAD, remember, ended.set)):
                done.append(ended)
        deadline = time.monotonic() + timeout
        for ended in done:
            ended.wait(max(0.0, deadline - time.monotonic()))

    def _tick_loop(self) -> None:
        while not self._stopping.is_set():
            try:
                next_deadline = self._node.tick()
                self._node.let_go_of_abandoned()
                self._watch_guards()
                if self._clock() >= self._space_at:
                    self._report_space()
                if self._clock() >= self._health_at:
                    self._health_at = self._clock() + self._plan.health_check_s
                    for tier in self._guards:
                        self._ask(tier, self._check_up)
            except Exception:  # noqa: BLE001 - without a ticker loads would wait for ever
                _log.exception("a tick failed; this is a bug in kvtiers")
                next_deadline = None
            self._wake.wait(self._pause(next_deadline))
            self._wake.clear()

    def _pause(self, next_deadline: float | None) -> float:
        busy = self._node.inspect(lambda core: core.unfinished) > 0
        pause = _BUSY_TICK_S if busy else _IDLE_TICK_S
        if next_deadline is not None:
            pause = min(pause, max(0.001, next_deadline - self._clock()))
        return pause

    def _watch_guards(self) -> None:
        for tier, guard in self._guards.items():
            tick = guard.tick(self._clock())
            news: list[News] = []
            for state in tick.changes:
                if state is BreakerState.CLOSED:
                    news.append(StoreUp(tier))
                    self._tell_up(tier)
                elif state is BreakerState.OPEN:
                    news.append(StoreDown(tier))
                    self._tell_down(tier)
            if news:
                self._node.tell(news)
            if tick.probe_due:
                self._ask(tier, self._probe)
            if guard.restarts() > self._restarts.get(tier, 0) and tier in self._restarts:
                self._ask(tier, self._forget)

    def _tell_down(self, tier: Tier) -> None:
        """Once for an outage, however often it is found out: a breaker opens again with each probe that fails.

        Ticker and pools find things out side by side, and news may be old when it is told: so what is said, both here and in `_tell_up`, is how
        the store is now, and under a lock of its own, so that the log has it in that order.
        """
        with self._telling:
            health = self._guards[tier].health()
            if health.up or tier in self._down:
                return
            self._down.add(tier)
            _log.warning(
                "the %s tier is out of order: its requests are misses until it answers again: %s",
                tier,
                health.error,
            )

    def _tell_up(self, tier: Tier) -> None:
        """Once after each outage that was told."""
        with self._telling:
            if tier not in self._down or not self._guards[tier].health().up:
                return
            self._down.discard(tier)
            _log.warning("the %s tier works again", tier)

    def _report_space(self) -> None:
        self._space_at = self._clock() + _SPACE_EVERY_S
        for tier, guard in self._guards.items():
            look = partial(Core.stored_bytes, tier=tier)
            before, usage, after = self._node.inspect(look), guard.usage(), self._node.inspect(look)
            # what was written or deleted between the looks is ours: taken for others' it would push out as much again
            self._node.tell([SpaceReport(tier, max(0, usage.used_bytes - max(before, after)))])
            if self._space_wanted(tier) > 0:
                self._ask(tier, self._give_back_space)

    def _space_wanted(self, tier: Tier) -> int:
        free = self._guards[tier].usage().free_bytes
        return 0 if free is None else self._plan.stores[tier].min_free_bytes - free

    def _ask(self, tier: Tier, work: Callable[[Tier], None]) -> None:
        """Have the store's pool do something, unless it is still at it from the last time."""
        asked = (tier, work)
        if asked in self._asked:
            return

        def run() -> None:
            try:
                work(tier)
            finally:
                self._asked.discard(asked)

        self._asked.add(asked)
        job = Job(_NO_OP, Priority.LOAD, run, partial(self._asked.discard, asked))
        if not self._node.engine.run_on(tier, job):
            self._asked.discard(asked)

    def _probe(self, tier: Tier) -> None:
        self._guards[tier].run_probe()

    def _check_up(self, tier: Tier) -> None:
        """On the pool. What is wrong is counted by the guard, and told: at once if it is nothing that passes, else when the breaker opens.

        It is asked no less often then.
        """
        guard = self._guards[tier]
        if guard.state is not BreakerState.CLOSED:
            guard.run_probe()
            return
        try:
            guard.check_up()
        except StoreUnavailable:
            self._tell_down(tier)
        except StoreError as error:
            _log.info("a check-up of %s failed: %s", tier, error)
        else:
            self._tell_up(tier)

    def _greet(self, tier: Tier) -> None:
        """On the pool, once: a store across a network was not reached for when it was opened."""
        try:
            self._guards[tier].check_up()
        except StoreError:
            self._tell_down(tier)

    def _forget(self, tier: Tier) -> None:
        """On the pool: what an engine that has begun anew was known to hold is asked for again, by whoever wants it."""
        self._restarts[tier] = self._guards[tier].restarts()
        known = self._node.inspect(lambda core: core.order_of_use(tier))
        news: Iterator[News] = (Vanished(tier, namespace, key) for namespace, key, _ in known)
        for batch in _batches(news, _BATCH):
            self._node.tell(batch)
        _log.info("the %s tier's engine has begun anew: what it was known to have is asked for again", tier)

    def _give_back_space(self, tier: Tier) -> None:
        """On the pool: what a store says is free is as old as its last write; while it is low nothing is written, so look first."""
        guard = self._guards[tier]
        if guard.state is not BreakerState.CLOSED:
            return
        try:
            guard.probe()
        except StoreError as error:
            _log.warning("how much space %s has can't be looked up: %s", tier, error)
            return
        wanted = self._space_wanted(tier)
        if wanted > 0:
            self._node.tell([SpaceLow(tier, wanted)])

    def _reconcile(self) -> None:
        self._compare(rest=0.0)
        if self._stopping.is_set():
            return
        self.reconciled.set()
        while not self._stopping.wait(_WALK_EVERY_S):
            self._compare(rest=_REST)

    def _compare(self, rest: float) -> None:
        """Make the index true of every store that works; `rest`: how long to pause after each step, times what it took."""
        for tier, guard in self._guards.items():
            if rest and guard.state is not BreakerState.CLOSED:
                continue
            try:
                began = time.monotonic()
                for step in guard.reconcile_steps():  # told at once: it is true at this moment
                    for batch in _batches((_news(tier, item) for item in step), _BATCH):
                        self._node.tell(batch)
                    if self._stopping.wait(rest * (time.monotonic() - began)):
                        return
                    began = time.monotonic()
            except StoreError as error:
                _log.warning("%s could not be compared with its index: %s", tier, error)
                continue
            except Exception:  # noqa: BLE001 - a thread of its own: nobody else would tell
                _log.exception("comparing %s with its index failed; this is a bug in kvtiers", tier)
                continue
            if not self._stopping.is_set():
                self._node.tell([RecoveryEnded(tier)])


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Many objects are about to be made, none of them garbage, and each collection would look at all of them.

    100,000 records: 0.8 s of CPU time from opening to the first lookup, with collections 1.1 s.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _news(tier: Tier, item: StoredRecord | RecordRef) -> News:
    if isinstance(item, StoredRecord):
        return _recovered(tier, item)
    reason = MissReason.CORRUPT if isinstance(item, DamagedRecord) else MissReason.EVICTED
    return Vanished(tier, item.namespace, item.key, reason)


def _recovered(tier: Tier, record: StoredRecord) -> Recovered:
    ref = record.ref
    mark = Chunkmark(
        ref.namespace, ref.key, record.parent, record.num_parts, record.token_start, record.token_count
    )
    return Recovered(tier, mark, ref.part, record.stored_bytes)


def _batches(items: Iterator[T], size: int) -> Iterator[list[T]]:
    while batch := list(islice(items, size)):
        yield batch
