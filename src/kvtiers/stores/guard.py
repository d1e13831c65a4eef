"""Deadline, retry and breaker around any `RecordStore`, and nowhere else.

Each guarded call runs on the I/O thread that makes it. `StoreTransient` is tried again with jittered exponential backoff
while the operation's deadline allows; nothing else ever is. A store that keeps failing opens the breaker: calls then raise
`StoreUnavailable` at once, until a probe succeeds.

A blocked system call can't be cancelled. So deadlines are watched from outside: `tick`, called by the runtime's ticker,
looks at what is in flight. An operation past its deadline counts as one failure; if nothing at all was answered for as long
as it was allowed to take, the store has stalled and the breaker opens, however few threads are stuck in it. When the call
ends after all, its caller gets its result: the slot it used is only then free (a late result never closes the breaker, it
only brings the next probe forward).

What always holds: `tick` touches memory only; the lock is held for a few assignments and never around the store, the clock's
sleep or the hook; at most one probe is in flight, so a hung probe occupies one thread.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple, TypeVar

from kvtiers.model.errors import (
    ConfigError,
    InvariantBroken,
    RecordInvalid,
    RecordMissing,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.stores.base import RecordStore, SealedPart, StoredRecord, StoreUsage
from kvtiers.stores.breaker import Breaker, BreakerState
from kvtiers.stores.health import HealthRecord, StoreHealth, told

__all__ = ["BreakerState", "Guard", "GuardCounters", "GuardPolicy", "GuardTick", "OpOutcome", "Operation"]

T = TypeVar("T")


class Operation(StrEnum):
    """What a store is asked to do; the label of latency histograms."""

    READ = "read"
    WRITE = "write"
    DELETE = "delete"
    EXISTS = "exists"
    PROBE = "probe"


class OpOutcome(StrEnum):
    """How a guarded call ended, retries included."""

    OK = "ok"
    MISSING = "missing"
    INVALID = "invalid"
    FULL = "full"
    TRANSIENT = "transient"
    """Still failing after the last retry that the deadline allowed."""
    UNAVAILABLE = "unavailable"
    ERROR = "error"
    """An exception no store should raise."""


ON_FINISHED = Callable[[Operation, float, OpOutcome], None]
"""Called after each guarded call that reached the store: what, seconds it took, how it ended."""

_ANSWERS: Final = frozenset({OpOutcome.OK, OpOutcome.MISSING, OpOutcome.INVALID, OpOutcome.FULL})
"""Outcomes of a store that works."""


@dataclass(frozen=True, slots=True)
class GuardPolicy:
    """How patient to be with a store."""

    max_retries: int = 3
    backoff_factor: float = 2.0
    base_delay_s: float = 0.05
    """Before the first retry; times `backoff_factor` before each further one."""
    jitter: float = 0.5
    """Share of each delay that is random, so that threads that failed together do not return together."""
    read_deadline_s: float = 10.0
    """For read, exists and probe."""
    write_deadline_s: float = 30.0
    """For write and delete."""
    slow_s: float | None = None
    """An answer to read, exists or probe that takes longer counts as a failure for the breaker: nobody waits so long for it."""
    failures_to_open: int = 5
    probe_after_s: float = 1.0
    """From opening to the first probe; doubled after each probe that fails."""
    probe_after_max_s: float = 60.0

    def __post_init__(self) -> None:
        problems = [
            f"{name} must be {what}, got {getattr(self, name)}"
            for name, good, what in (
                ("max_retries", self.max_retries >= 0, "at least 0"),
                ("backoff_factor", self.backoff_factor >= 1, "at least 1"),
                ("base_delay_s", self.base_delay_s >= 0, "at least 0"),
                ("jitter", 0 <= self.jitter <= 1, "between 0 and 1"),
                ("read_deadline_s", self.read_deadline_s > 0, "above 0"),
                ("write_deadline_s", self.write_deadline_s > 0, "above 0"),
                ("slow_s", self.slow_s is None or self.slow_s > 0, "above 0, or None"),
                ("failures_to_open", self.failures_to_open >= 1, "at least 1"),
                ("probe_after_s", self.probe_after_s > 0, "above 0"),
                ("probe_after_max_s", self.probe_after_max_s >= self.probe_after_s, "at least probe_after_s"),
            )
            if not good
        ]
        if problems:
            raise ConfigError(problems, source="guard policy")

    def is_slow(self, operation: Operation, seconds: float) -> bool:
        """Whether an answer came too late to be of use."""
        waited_for = operation in (Operation.READ, Operation.EXISTS, Operation.PROBE)
        return self.slow_s is not None and waited_for and seconds > self.slow_s

    def allowance(self, operation: Operation) -> float:
        """Seconds the operation may take."""
        slow = operation in (Operation.WRITE, Operation.DELETE)
        return self.write_deadline_s if slow else self.read_deadline_s


class GuardTick(NamedTuple):
    """What a tick found."""

    state: BreakerState
    changes: tuple[BreakerState, ...]
    """States entered since the last tick, in order."""
    probe_due: bool
    """Have `run_probe` called on an I/O thread. Asked again after a while if that never happens."""
    overdue: int
    """Operations that went past their deadline since the last tick."""


class GuardCounters(NamedTuple):
    """Since the start."""

    finished: Mapping[tuple[Operation, OpOutcome], int]
    """Guarded calls that reached the store."""
    retries: int
    rejected: int
    """Calls refused because the breaker was open."""
    overdue: int
    opened: int
    in_flight: int


@dataclass(slots=True, eq=False)
class _Flight:
    operation: Operation
    started: float
    allowance: float
    overdue: bool = False


class Guard(RecordStore):
    """A store that never waits longer than its policy says and never hammers what is broken.

    Read, write, exists and delete take an optional `deadline` on the guard's clock: no retry begins after it. A retry is given what remains until
    then, or until the operation's own deadline, so that it ends by it too (where the store can tell its client). Everything else passes
    through to the store.
    """

    def __init__(
        self,
        store: RecordStore,
        policy: GuardPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        rng: random.Random | None = None,
        on_finished: ON_FINISHED | None = None,
    ) -> None:
        self.store = store
        self.name = store.name
        self.policy = policy or GuardPolicy()
        self._clock = clock
        self._sleep = sleep
        self._rng = rng or random.Random()
        self._on_finished = on_finished
        self._lock = threading.Lock()
        self._breaker = Breaker(
            self.policy.failures_to_open, self.policy.probe_after_s, self.policy.probe_after_max_s
        )
        self._flights: set[_Flight] = set()
        self._last_answer = clock()
        self._health = HealthRecord(self._last_answer)
        self._finished: dict[tuple[Operation, OpOutcome], int] = {}
        self._retries = 0
        self._rejected = 0
        self._overdue = 0

    # --- guarded ------------------------------------------------------------------------------------------------------

    def read_into(
        self, ref: RecordRef, out: memoryview, nbytes: int, *, deadline: float | None = None
    ) -> StoredRecord:
        return self._run(Operation.READ, lambda: self.store.read_into(ref, out, nbytes), deadline)

    def write(self, part: SealedPart, *, deadline: float | None = None) -> int:
        return self._run(Operation.WRITE, lambda: self.store.write(part), deadline)

    def exists(self, refs: Sequence[RecordRef], *, deadline: float | None = None) -> list[bool]:
        return self._run(Operation.EXISTS, lambda: self._ask(refs), deadline)

    def delete(self, ref: RecordRef, *, deadline: float | None = None) -> bool:
        return self._run(Operation.DELETE, lambda: self.store.delete(ref), deadline)

    def discard(self, record: StoredRecord) -> bool:
        return self._run(Operation.DELETE, lambda: self.store.discard(record), None)

    # --- the breaker --------------------------------------------------------------------------------------------------

    @property
    def state(self) -> BreakerState:
        """Whether operations reach the store."""
        return self._breaker.state

    def tick(self, now: float | None = None) -> GuardTick:
        """Look at what is in flight; for the runtime's ticker. Never blocks, does no I/O."""
        if now is None:
            now = self._clock()
        newly_overdue = 0
        with self._lock:
            for flight in self._flights:
                if now - flight.started <= flight.allowance:
                    continue
                if not flight.overdue:
                    flight.overdue = True
                    newly_overdue += 1
                    self._breaker.failed(now)
                    late = f"no answer to a {flight.operation} within {flight.allowance:g} s"
                    self._health.failed(late, check_up=flight.operation is Operation.PROBE)
                if now - self._last_answer > flight.allowance:
                    self._breaker.trip(now)
            self._overdue += newly_overdue
            due = self._breaker.claim_probe(now)
            return GuardTick(self._breaker.state, self._breaker.take_changes(), due, newly_overdue)

    def run_probe(self) -> BreakerState:
        """Probe the store if the breaker is open and no probe is under way; for an I/O thread. Returns the state after it."""
        with self._lock:
            if not self._breaker.begin_probe():
                return self._breaker.state
            flight = self._take_off(Operation.PROBE)
        outcome, problem = OpOutcome.ERROR, "a bug of the store: see the log"
        try:
            self.store.probe()
            outcome = OpOutcome.OK
        except (StoreTransient, StoreUnavailable) as error:
            transient = isinstance(error, StoreTransient)
            outcome, problem = (OpOutcome.TRANSIENT if transient else OpOutcome.UNAVAILABLE), told(error)
        finally:
            now = self._clock()
            with self._lock:
                self._flights.discard(flight)
                self._count(Operation.PROBE, outcome)
                self._health.checked(now)
                if outcome is OpOutcome.OK and self.policy.is_slow(Operation.PROBE, now - flight.started):
                    self._last_answer = now
                    self._breaker.probe_failed(now)
                    self._health.failed(self._slowness(), check_up=True)
                elif outcome is OpOutcome.OK:
                    self._last_answer = now
                    self._breaker.probe_succeeded()
                    self._health.answered()
                else:
                    self._breaker.probe_failed(now)
                    self._health.failed(problem, check_up=True)
            self._report(flight, now, outcome)
        return self._breaker.state

    def check_up(self) -> None:
        """Probe a store that nobody may be using, so that it is found out before a request does; for an I/O thread.

        Counts like any operation: failures in a row, or a stall, open the breaker. Raises what the probe raises; StoreUnavailable
        while the breaker is not closed.
        """
        self._run(Operation.PROBE, self.store.probe, None)

    def health(self) -> StoreHealth:
        """Whether it works, when that was last checked, and what is wrong."""
        with self._lock:
            reached = self._breaker.state is BreakerState.CLOSED
            return self._health.read(self._clock(), reached=reached)

    def counters(self) -> GuardCounters:
        """A snapshot."""
        with self._lock:
            return GuardCounters(
                finished=dict(self._finished),
                retries=self._retries,
                rejected=self._rejected,
                overdue=self._overdue,
                opened=self._breaker.opened,
                in_flight=len(self._flights),
            )

    # --- passed through -----------------------------------------------------------------------------------------------

    def open(self) -> None:
        self.store.open()

    def usage(self) -> StoreUsage:
        return self.store.usage()

    def restarts(self) -> int:
        return self.store.restarts()

    def probe(self) -> None:
        """The store's own probe, without the breaker (`run_probe` is the breaker's)."""
        self.store.probe()

    def close(self) -> None:
        self.store.close()

    def scan(self) -> Iterator[StoredRecord]:
        return self.store.scan()

    def recover(self) -> Iterator[StoredRecord]:
        return self.store.recover()

    def reconcile(self) -> Iterator[StoredRecord | RecordRef]:
        return self.store.reconcile()

    def reconcile_steps(self) -> Iterator[list[StoredRecord | RecordRef]]:
        return self.store.reconcile_steps()

    def within_time(self, seconds: float) -> AbstractContextManager[object]:
        return self.store.within_time(seconds)

    def use_memory(self, memory: memoryview) -> None:
        self.store.use_memory(memory)

    def remember(self, refs_by_use: Iterable[RecordRef]) -> None:
        self.store.remember(refs_by_use)

    def check(self) -> Iterator[str]:
        return self.store.check()

    def stats(self) -> Mapping[str, int]:
        return self.store.stats()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _run(self, operation: Operation, call: Callable[[], T], deadline: float | None) -> T:
        with self._lock:
            if self._breaker.state is not BreakerState.CLOSED:
                self._rejected += 1
                raise StoreUnavailable(f"{self.name} is out of order: its breaker is {self._breaker.state}")
            flight = self._take_off(operation)
        give_up = flight.started + flight.allowance
        if deadline is not None:
            give_up = min(give_up, deadline)
        outcome = OpOutcome.ERROR
        try:
            result = self._attempt(call, give_up)
            outcome = OpOutcome.OK
            return result
        except RecordMissing:
            outcome = OpOutcome.MISSING
            raise
        except (
            RecordInvalid,
            InvariantBroken,
        ):  # the latter: no record can be made of it, which is no fault of the store
            outcome = OpOutcome.INVALID
            raise
        except StoreFull:
            outcome = OpOutcome.FULL
            raise
        except StoreTransient:
            outcome = OpOutcome.TRANSIENT
            raise
        except StoreUnavailable:
            outcome = OpOutcome.UNAVAILABLE
            raise
        finally:
            self._land(flight, outcome)

    def _ask(self, refs: Sequence[RecordRef]) -> list[bool]:
        found = self.store.exists(refs)
        if len(found) != len(refs):  # whose answers they are nobody knows
            raise StoreUnavailable(f"{self.name} was asked for {len(refs)} records and answered {len(found)}")
        return found

    def _attempt(self, call: Callable[[], T], give_up: float) -> T:
        delay = self.policy.base_delay_s
        within: AbstractContextManager[object] = nullcontext()  # the first try has the store's own time-out
        for _ in range(self.policy.max_retries):
            try:
                with within:
                    return call()
            except StoreTransient:
                pause = delay * (1 - self.policy.jitter * self._rng.random())
                if self._breaker.state is not BreakerState.CLOSED or self._clock() + pause >= give_up:
                    raise
            self._sleep(pause)
            delay *= self.policy.backoff_factor
            with self._lock:
                self._retries += 1
            within = self.store.within_time(max(0.0, give_up - self._clock()))
        with within:
            return call()

    def _take_off(self, operation: Operation) -> _Flight:
        """With the lock held."""
        flight = _Flight(operation, self._clock(), self.policy.allowance(operation))
        self._flights.add(flight)
        return flight

    def _land(self, flight: _Flight, outcome: OpOutcome) -> None:
        now = self._clock()
        with self._lock:
            self._flights.discard(flight)
            self._count(flight.operation, outcome)
            late = flight.overdue  # its failure has been counted
            check_up = flight.operation is Operation.PROBE
            if check_up:
                self._health.checked(now)
            if outcome in _ANSWERS:
                self._last_answer = now
                slow = self.policy.is_slow(flight.operation, now - flight.started)
                if late:
                    self._breaker.revived(now)
                elif slow:
                    self._breaker.failed(now)
                    self._health.failed(self._slowness(), check_up=check_up)
                else:
                    self._breaker.answered()
                if not slow and self._breaker.state is BreakerState.CLOSED:
                    self._health.answered()
            elif not late:
                self._breaker.failed(now)
                self._health.failed(told(sys.exception()), check_up=check_up)
        self._report(flight, now, outcome)

    def _slowness(self) -> str:
        return (
            f"{self.name} answers, but takes longer than {self.policy.slow_s:g} s, and nobody waits so long"
        )

    def _count(self, operation: Operation, outcome: OpOutcome) -> None:
        self._finished[operation, outcome] = self._finished.get((operation, outcome), 0) + 1

    def _report(self, flight: _Flight, now: float, outcome: OpOutcome) -> None:
        if self._on_finished is not None:
            self._on_finished(flight.operation, now - flight.started, outcome)
