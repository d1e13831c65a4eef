"""A store that fails on command: any `RecordStore` behind a script of faults, for tests of what runs above it.

Thread-safe; faults are looked up on the thread that makes the call, and a stalled call waits there without any lock. A fault
applies to what its rule names, as often as the rule says:

    faulty = FaultyStore(DiskStore(settings))
    slow = faulty.inject(Stall(released), Operation.READ)        # the next read hangs until `released` is set
    faulty.inject(Fail(StoreTransient), Operation.WRITE, times=3)
    assert slow.wait_for_hit(timeout=5)

What the store itself would have done about a fault is done: a torn record is found out by the next read, and removed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TypeAlias

from kvtiers.model.errors import RecordCorrupt, StoreError, StoreFull
from kvtiers.model.parts import RecordRef
from kvtiers.stores.base import RecordStore, SealedPart, StoredRecord, StoreUsage
from kvtiers.stores.guard import Operation


@dataclass(frozen=True, slots=True)
class Stall:
    """The call hangs, as on a dead disk, until `released` is set (at most `longest_s`), then goes on."""

    released: threading.Event
    longest_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Delay:
    """The call takes so much longer."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Fail:
    """The call raises `error` and does nothing."""

    error: type[StoreError]
    message: str = "injected fault"


@dataclass(frozen=True, slots=True)
class Full:
    """A write finds no space."""


@dataclass(frozen=True, slots=True)
class FlipBit:
    """A read succeeds, but this bit of what it delivered is wrong: damage behind the store's own check."""

    bit: int = 0


@dataclass(frozen=True, slots=True)
class TornWrite:
    """A write reports success, but what lies there is torn: the next read finds it corrupt and removes it."""


Fault: TypeAlias = Stall | Delay | Fail | Full | FlipBit | TornWrite


@dataclass(slots=True, eq=False)
class Injection:
    """One rule of the script, and what came of it."""

    fault: Fault
    on: frozenset[Operation]
    where: Callable[[RecordRef], bool] | None
    skip: int
    times: int | None
    hits: int = 0
    """How often it has applied so far."""
    _hit: threading.Condition = field(default_factory=threading.Condition, repr=False)

    def cancel(self) -> None:
        """Never apply again."""
        with self._hit:
            self.times = self.hits

    def wait_for_hit(self, timeout: float, hits: int = 1) -> bool:
        """Wait until it has applied `hits` times."""
        with self._hit:
            return self._hit.wait_for(lambda: self.hits >= hits, timeout)

    def _applies(self, operation: Operation, refs: Collection[RecordRef]) -> bool:
        if operation not in self.on:
            return False
        if self.where is not None and not any(map(self.where, refs)):
            return False
        with self._hit:
            if self.times is not None and self.hits >= self.times:
                return False
            if self.skip > 0:
                self.skip -= 1
                return False
            self.hits += 1
            self._hit.notify_all()
            return True


class FaultyStore(RecordStore):
    """`store` with faults injected."""

    def __init__(self, store: RecordStore, *, sleep: Callable[[float], None] = time.sleep) -> None:
        self.store = store
        self.name = store.name
        self._sleep = sleep
        self._lock = threading.Lock()
        self._rules: tuple[Injection, ...] = ()
        self._torn: set[RecordRef] = set()

    def inject(
        self,
        fault: Fault,
        *on: Operation,
        times: int | None = 1,
        skip: int = 0,
        where: Callable[[RecordRef], bool] | None = None,
    ) -> Injection:
        """Apply `fault` to the operations `on` (none given: all) whose ref satisfies `where`: after `skip` of them, `times` times
        (None: until cancelled). Rules apply in the order in which they were made.
        """
        rule = Injection(fault, frozenset(on or Operation), where, skip, times)
        with self._lock:
            self._rules = (*self._rules, rule)
        return rule

    def heal(self) -> None:
        """Forget all rules. What is stalled or torn stays so."""
        with self._lock:
            for rule in self._rules:
                rule.cancel()
            self._rules = ()

    # --- contract -----------------------------------------------------------------------------------------------------

    def within_time(self, seconds: float) -> AbstractContextManager[object]:
        return self.store.within_time(seconds)

    def open(self) -> None:
        self.store.open()

    def write(self, part: SealedPart) -> int:
        after = self._suffer(Operation.WRITE, (part.ref,))
        taken = self.store.write(part)
        with self._lock:
            self._torn.discard(part.ref)
            if any(isinstance(fault, TornWrite) for fault in after):
                self._torn.add(part.ref)
        return taken

    def read_into(self, ref: RecordRef, out: memoryview, nbytes: int) -> StoredRecord:
        after = self._suffer(Operation.READ, (ref,))
        with self._lock:
            torn = ref in self._torn
            self._torn.discard(ref)
        if torn:
            self.store.delete(ref)
            raise RecordCorrupt("the record is torn (injected fault)")
        record = self.store.read_into(ref, out, nbytes)
        for fault in after:
            if isinstance(fault, FlipBit):
                out[fault.bit // 8 % nbytes] ^= 1 << fault.bit % 8
        return record

    def exists(self, refs: Sequence[RecordRef]) -> list[bool]:
        self._suffer(Operation.EXISTS, refs)
        return self.store.exists(refs)

    def delete(self, ref: RecordRef) -> bool:
        self._suffer(Operation.DELETE, (ref,))
        with self._lock:
            self._torn.discard(ref)
        return self.store.delete(ref)

    def discard(self, record: StoredRecord) -> bool:
        self._suffer(Operation.DELETE, (record.ref,))
        return self.store.discard(record)

    def probe(self) -> None:
        self._suffer(Operation.PROBE, ())
        self.store.probe()

    def usage(self) -> StoreUsage:
        return self.store.usage()

    def restarts(self) -> int:
        return self.store.restarts()

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

    def remember(self, refs_by_use: Iterable[RecordRef]) -> None:
        self.store.remember(refs_by_use)

    def check(self) -> Iterator[str]:
        return self.store.check()

    def stats(self) -> Mapping[str, int]:
        return self.store.stats()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _suffer(self, operation: Operation, refs: Sequence[RecordRef]) -> list[Fault]:
        """Go through what happens before the call; returns what is to happen after it."""
        with self._lock:
            rules = self._rules
        after: list[Fault] = []
        for rule in rules:
            if not rule._applies(operation, refs):
                continue
            match rule.fault:
                case Stall(released, longest_s):
                    released.wait(longest_s)
                case Delay(seconds):
                    self._sleep(seconds)
                case Fail(error, message):
                    raise error(message)
                case Full():
                    raise StoreFull("no space left (injected fault)")
                case fault:
                    after.append(fault)
        return after
