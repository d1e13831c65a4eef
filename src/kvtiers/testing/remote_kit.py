"""What a store of the remote tier must do with a real engine that dies, stops, fills up or crawls, as tests. Needs pytest.

    class TestMyRemote(RemoteStoreContract):
        @classmethod
        def start_engine(cls, folder: Path) -> MyEngine: ...     # a RemoteEngine that serves
        def make_store_at(self, address, timeout_s) -> RecordStore: ...

All of the contract of a shared store (`shared_store_kit.py`, `store_kit.py`) runs as well. One engine serves all tests of a class; each begins with it emptied and
running. A test is skipped only for a reason that the class gives. What always must hold: every call ends (by the store's own time-out; the bound here is only to catch a hang), with a result
or with a `StoreError`; what is read is what was written; when the engine is back the store works again without being opened anew.

Calls run on daemon threads (`remote_work.py`), so that one that hangs fails its test and no other.
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import pytest

from kvtiers.model.errors import (
    RecordMissing,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.model.parts import RecordRef
from kvtiers.stores.base import RecordStore
from kvtiers.stores.breaker import BreakerState
from kvtiers.stores.guard import Guard, GuardPolicy, Operation
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.faulty_store import Delay, Fail, FaultyStore
from kvtiers.testing.remote_work import HANG_S, TROUBLE, Work, begin, comes_back, ends, works
from kvtiers.testing.sealed_parts import SCRIBBLE, make_part, reads_back, slot
from kvtiers.testing.servers.process import LOOPBACK, RemoteEngine, free_port
from kvtiers.testing.servers.relay import Relay
from kvtiers.testing.shared_store_kit import SharedStoreContract

__all__ = ["Address", "RemoteStoreContract", "comes_back", "ends", "works"]

Address = tuple[str, int]

_NO_SUCH_HOST: Final = "kvtiers-no-such-host.invalid"
_LARGE: Final = 3 << 20


class RemoteStoreContract(SharedStoreContract):
    """The tests. Override the class variables and hooks where the store differs."""

    listable = False
    exact_usage = False
    timeout_s: ClassVar[float] = 1.0
    """What `make_store` gives its stores."""
    patience_s: ClassVar[float] = 30.0
    """How long the store may need to work again when its engine does."""
    keeps_values: ClassVar[bool] = False
    """A killed engine has its values again when it is back."""
    cannot_crawl: ClassVar[str] = ""
    """Why a relay before the address given can't slow all traffic down, if so; the tests that need it are skipped with this reason."""
    cannot_fill: ClassVar[str] = ""
    """Why there can be no `full`, likewise."""
    cannot_evict: ClassVar[str] = ""
    """Why there can be no `evict`, likewise."""
    cannot_hurry: ClassVar[str] = ""
    """Why a call can't be told to end sooner than by the store's time-out, likewise."""
    cannot_misdirect: ClassVar[str] = ""
    """Why it has no address that can be wrong, likewise."""

    engine: RemoteEngine

    @classmethod
    @abstractmethod
    def start_engine(cls, folder: Path) -> RemoteEngine:
        """A real engine that serves; `folder` is its own (not there yet, of a short path). Ended with `stop`."""

    @abstractmethod
    def make_store_at(self, address: Address, timeout_s: float) -> RecordStore:
        """A store, not yet open, of the engine at that address. No retries, pieces of at most 1 MiB if it has any."""

    def make_store(self, place: Path) -> RecordStore:
        """All stores of a test share its engine."""
        return self.make_store_at(self.engine.address, self.timeout_s)

    def evict(self, ref: RecordRef) -> None:
        """Take some of the values of `ref`, not the one that `exists` looks for, from the engine as its own eviction would.

        The engine's part of the kit: a class that has neither this nor a reason why not fails here.
        """
        pytest.fail("override `evict`, or say in `cannot_evict` why it can't be")

    def full(self) -> AbstractContextManager[None]:
        """Within it the engine has no room for another 3 MiB; afterwards it has. As with `evict`, a class has it or says why not."""
        pytest.fail("override `full`, or say in `cannot_fill` why it can't be")

    # --- fixtures -----------------------------------------------------------------------------------------------------

    @pytest.fixture(scope="class")
    @classmethod
    def engine_of_class(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RemoteEngine]:
        engine = cls.start_engine(tmp_path_factory.mktemp("kvt") / "engine")
        yield engine
        engine.stop()

    @pytest.fixture(autouse=True)
    def _engine(self, engine_of_class: RemoteEngine) -> Iterator[None]:
        self.engine = engine_of_class
        self.engine.start()
        self.engine.clear()
        yield
        self.engine.resume()

    # --- gone and back ------------------------------------------------------------------------------------------------

    def test_a_killed_engine_ends_every_call_and_all_works_when_it_is_back(self, store: RecordStore) -> None:
        with Work(store, writers=2, readers=2) as work:
            work.wait_for_turns(8)
            self.engine.kill()
            work.wait_for_trouble()
            self.engine.start()
            assert works(store, self.patience_s)
            work.wait_for_turns(8)
        part = make_part(99, _LARGE)
        store.write(part)
        assert reads_back(store, part)

    def test_what_a_killed_engine_has_kept_is_right_or_a_miss(self, store: RecordStore) -> None:
        parts = [make_part(number, 100_000 + number) for number in range(6)]
        for part in parts:
            store.write(part)
        self.engine.kill()
        self.engine.start()
        assert works(store, self.patience_s)
        kept = [comes_back(store, part.ref, bytes(part.payload)) for part in parts]
        assert all(kept) or not self.keeps_values

    def test_a_stopped_engine_ends_every_call_and_all_works_when_it_goes_on(self, store: RecordStore) -> None:
        kept = make_part(50, _LARGE)
        store.write(kept)
        with Work(store, writers=2, readers=2) as work:
            work.wait_for_turns(8)
            self.engine.pause()
            work.wait_for_trouble()
            self.engine.resume()
            assert works(store, self.patience_s)
            work.wait_for_turns(8)
        assert reads_back(store, kept)

    def test_each_kind_of_call_to_a_stopped_engine_ends_with_what_kind_of_trouble_it_is(
        self, store: RecordStore
    ) -> None:
        part, other = make_part(1, 300_001), make_part(2, 300_001)
        store.write(part)
        calls: list[Callable[[], Any]] = [
            lambda: reads_back(store, part),
            lambda: store.write(other),
            lambda: store.exists([part.ref, other.ref]),
            lambda: store.delete(part.ref),
            store.probe,
        ]
        self.engine.pause()
        try:
            for call in calls:
                with pytest.raises(TROUBLE):
                    ends(call)
        finally:
            self.engine.resume()
        assert works(store, self.patience_s)
        store.write(other)
        assert reads_back(store, other)

    def test_nothing_is_written_to_the_readers_memory_after_a_call_has_ended(
        self, store: RecordStore
    ) -> None:
        part = make_part(1, _LARGE)
        store.write(part)
        out = slot(_LARGE)
        self.engine.pause()
        try:
            with pytest.raises(TROUBLE):
                ends(lambda: store.read_into(part.ref, out, _LARGE))
            np.frombuffer(out, np.uint8)[:] = SCRIBBLE
        finally:
            self.engine.resume()
        assert works(store, self.patience_s)
        assert reads_back(store, part)
        assert np.all(np.frombuffer(out, np.uint8) == SCRIBBLE)

    def test_an_engine_that_comes_later_is_found(self, place: Path) -> None:
        self.engine.kill()
        store = self.make_store(place)
        ends(store.open)
        try:
            part = make_part(1, 5000)
            with pytest.raises(TROUBLE):
                ends(lambda: store.write(part))
            with pytest.raises(TROUBLE):
                ends(store.probe)
            self.engine.start()
            assert works(store, self.patience_s)
            store.write(part)
            assert reads_back(store, part)
        finally:
            store.close()

    def test_a_guard_around_it_opens_and_closes_with_the_engine(self, store: RecordStore) -> None:
        policy = GuardPolicy(
            max_retries=0,
            read_deadline_s=HANG_S,
            failures_to_open=2,
            probe_after_s=0.05,
            probe_after_max_s=0.1,
        )
        guard = Guard(store, policy)
        refs = [make_part(1, 5000).ref]
        self.engine.kill()
        for _ in range(2):
            with pytest.raises(TROUBLE):
                ends(lambda: guard.exists(refs))
        assert guard.state is BreakerState.OPEN
        self.engine.start()

        def closed() -> bool:
            guard.tick()
            return guard.run_probe() is BreakerState.CLOSED

        assert wait_until(closed, self.patience_s)
        assert guard.exists(refs) == [False]

    def test_a_retry_ends_by_the_deadline_of_the_operation(self) -> None:
        """The first try fails late; the second one meets a stopped engine, and has no more than the rest."""
        _skip_for(self.cannot_hurry)
        allowed = 4.0
        store = FaultyStore(self.make_store_at(self.engine.address, allowed))
        store.open()
        guard = Guard(store, GuardPolicy(max_retries=1, base_delay_s=0.01, read_deadline_s=allowed))
        refs = [make_part(1, 100).ref]
        try:
            assert guard.exists(refs) == [False]
            store.inject(Delay(0.75 * allowed), Operation.EXISTS)
            store.inject(Fail(StoreTransient), Operation.EXISTS)
            self.engine.pause()
            began = time.monotonic()
            with pytest.raises(StoreTransient):
                ends(lambda: guard.exists(refs))
            assert guard.counters().retries == 1
            assert time.monotonic() - began < 1.5 * allowed
        finally:
            self.engine.resume()
            store.close()

    def test_calls_that_are_given_less_time_end_sooner(self) -> None:
        _skip_for(self.cannot_hurry)
        store = self.make_store_at(self.engine.address, HANG_S)
        store.open()
        part = make_part(1, 300_001)
        store.write(part)

        def hurried(call: Callable[[], object]) -> None:
            with store.within_time(0.5):
                call()

        self.engine.pause()
        try:
            for call in (lambda: reads_back(store, part), lambda: store.write(part)):
                began = time.monotonic()
                with pytest.raises(TROUBLE):
                    ends(lambda call=call: hurried(call))  # type: ignore[misc]
                assert time.monotonic() - began < HANG_S / 2
        finally:
            self.engine.resume()
            store.close()

    def test_closing_ends_calls_under_way(self, place: Path) -> None:
        store = self.make_store(place)
        store.open()
        part = make_part(1, 300_001)
        store.write(part)
        self.engine.pause()
        try:
            call = begin(lambda: reads_back(store, part))
            ends(store.close)
            with pytest.raises(TROUBLE):
                call.result(HANG_S)
            with pytest.raises(StoreUnavailable):
                ends(store.probe)
        finally:
            self.engine.resume()

    # --- never there --------------------------------------------------------------------------------------------------

    def test_a_port_where_nobody_listens_is_named(self) -> None:
        _skip_for(self.cannot_misdirect)
        self._is_unavailable((LOOPBACK, free_port()), mentions=LOOPBACK)

    def test_an_unknown_host_is_named(self) -> None:
        _skip_for(self.cannot_misdirect)
        self._is_unavailable((_NO_SUCH_HOST, 1234), mentions=_NO_SUCH_HOST)

    def _is_unavailable(self, address: Address, *, mentions: str) -> None:
        store = self.make_store_at(address, self.timeout_s)
        ends(store.open)
        try:
            for call in (store.probe, lambda: store.exists([make_part(1, 100).ref])):
                with pytest.raises(StoreUnavailable) as error:
                    ends(call)
                assert mentions in str(error.value)
                assert "\n" not in str(error.value)
        finally:
            ends(store.close)

    # --- full, slow, forgetful ----------------------------------------------------------------------------------------

    def test_a_full_engine_refuses_writes_and_goes_on_reading(self, store: RecordStore) -> None:
        _skip_for(self.cannot_fill)
        kept, refused = make_part(1, 5000), make_part(2, _LARGE)
        store.write(kept)
        with self.full():
            with pytest.raises(StoreFull):
                ends(lambda: store.write(refused))
            with pytest.raises(RecordMissing):
                reads_back(store, refused)
            assert reads_back(store, kept)
        store.write(refused)
        assert reads_back(store, refused)

    def test_an_engine_that_crawls_is_given_up_in_time(self) -> None:
        _skip_for(self.cannot_crawl)
        part = make_part(1, _LARGE)
        with Relay(self.engine.address) as relay:
            store = self.make_store_at(relay.address, self.timeout_s)
            store.open()
            try:
                store.write(part)
                relay.limit(
                    20 * 65_536
                )  # something arrives all the time, but all of it takes longer than allowed
                with pytest.raises(TROUBLE):
                    ends(lambda: reads_back(store, part))
                with pytest.raises(TROUBLE):
                    ends(lambda: store.write(make_part(2, _LARGE)))
                relay.limit(0)
                with pytest.raises(TROUBLE):
                    ends(store.probe)
                relay.limit(None)
                assert works(store, self.patience_s)
                store.write(part)
                assert reads_back(store, part)
            finally:
                relay.limit(None)
                store.close()

    def test_what_the_engine_evicts_is_a_miss_and_not_offered_again(self, store: RecordStore) -> None:
        _skip_for(self.cannot_evict)
        part, other = make_part(1, _LARGE), make_part(2, _LARGE)
        store.write(part)
        store.write(other)
        self.evict(part.ref)
        with pytest.raises(RecordMissing):
            reads_back(store, part)
        assert store.exists([part.ref, other.ref]) == [False, True]
        assert reads_back(store, other)
        store.write(part)
        assert reads_back(store, part)


def _skip_for(reason: str) -> None:
    if reason:
        pytest.skip(reason)
