"""A disk that hangs: stores and lookups return, loads are answered at their deadline, the breaker opens, closing ends, the process exits."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvtiers.core.settings import MemorySettings
from kvtiers.core.tickets import LoadTicket
from kvtiers.model.errors import CacheClosed, StoreTransient
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.stores.guard import BreakerState, GuardPolicy, Operation
from kvtiers.testing.chaos import SLOT, Chaos, wait_until, works_again
from kvtiers.testing.faulty_store import Fail, Stall

if TYPE_CHECKING:
    from tests.reliability.conftest import MakeChaos

pytestmark = pytest.mark.slow

TOKENS = list(range(100))
OTHER = list(range(5000, 5100))
WHOLE = 96
WAIT_S = 20.0


def stored_on_disk_only(one: Chaos, *prompts: list[int]) -> None:
    for tokens in prompts:
        one.cache.store(tokens, one.oracle.kv(tokens))
        one.cache.flush()
    one.cache.evict("cpu")
    for tokens in prompts:
        assert set(one.cache.lookup(tokens).tiers) == {Tier.DISK}


class TestStall:
    """Everything the disk is asked hangs from some moment on; it is freed only after the test has seen what it wants to see."""

    def test_the_engine_notices_nothing_but_misses_and_the_tier_opens_and_recovers(
        self, make_chaos: MakeChaos
    ) -> None:
        one = make_chaos()
        stored_on_disk_only(one, TOKENS)
        released = threading.Event()
        one.disk.inject(Stall(released), times=None)
        loaded = one.cache.load(TOKENS, timeout=0.1).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (0, MissReason.STAGING_TIMEOUT)
        assert one.cache.store(OTHER, one.oracle.kv(OTHER)).accepted == 6
        assert one.cache.load(OTHER).result().num_tokens == WHOLE, "memory goes on"

        guard = one.node.guards[Tier.DISK]
        assert wait_until(lambda: not one.cache.stats()["tiers"]["disk"]["up"])
        assert guard.state is not BreakerState.CLOSED
        assert one.cache.lookup(TOKENS).stopped_by is MissReason.TIER_OPEN
        loaded = one.cache.load(TOKENS).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (0, MissReason.TIER_OPEN)
        assert one.cache.stats()["misses"]["tier_open"] == 1
        third = list(range(9000, 9100))
        assert one.cache.store(third, one.oracle.kv(third)).accepted == 6
        assert one.cache.load(third).result().num_tokens == WHOLE

        released.set()
        one.disk.heal()
        assert works_again(one.node)
        one.cache.flush()
        for tokens in (TOKENS, OTHER, third):
            loaded = one.cache.load(tokens).result()
            assert loaded.num_tokens == WHOLE
            one.oracle.check(tokens, WHOLE, loaded.kv)
        assert one.cache.stats()["tiers"]["disk"]["entries"] == 18

    def test_closing_ends_by_its_time_out(self, make_chaos: MakeChaos) -> None:
        one = make_chaos()
        stored_on_disk_only(one, TOKENS)
        released = threading.Event()
        one.disk.inject(Stall(released), times=None)
        pending = one.cache.load(TOKENS, timeout=3600)
        one.cache.store(OTHER, one.oracle.kv(OTHER))
        assert one.cache.close(WAIT_S), "the session's own calls have ended"
        assert not one.node.close(0.3)  # had it waited for the disk, this test would hang
        with pytest.raises(CacheClosed):
            pending.result(0.0)
        released.set()
        assert wait_until(lambda: one.node.close(1.0))

    def test_a_store_is_refused_when_the_passage_to_a_hung_disk_is_full(self, make_chaos: MakeChaos) -> None:
        one = make_chaos({"cpu.enabled": False})
        released = threading.Event()
        one.disk.inject(Stall(released), times=None)
        accepted = refused = 0
        for number in range(40):
            tokens = list(range(number * 1000, number * 1000 + 64))
            receipt = one.cache.store(tokens, one.oracle.kv(tokens))
            accepted += receipt.accepted
            refused += receipt.refusal in {Refusal.NO_SLOT, Refusal.TIER_OPEN}
        assert 0 < accepted <= 21, "a quarter of the arena"
        assert refused > 30
        released.set()

    def test_a_disk_that_fails_is_a_miss_and_then_out_of_order(self, make_chaos: MakeChaos) -> None:
        one = make_chaos()
        stored_on_disk_only(one, TOKENS)
        one.disk.inject(Fail(StoreTransient), times=None)
        loaded = one.cache.load(TOKENS).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (0, MissReason.TIER_OPEN)
        assert wait_until(lambda: not one.cache.stats()["tiers"]["disk"]["up"])
        one.disk.heal()
        assert works_again(one.node)
        assert one.cache.load(TOKENS).result().num_tokens == WHOLE


class TestLateRead:
    """A read that has outlived its load still writes to its slot: nobody else gets the slot until it has ended."""

    def one_slot(self, make_chaos: MakeChaos) -> Chaos:
        """Room to stage a single chunk, in a cache proper of four."""
        return make_chaos(
            cpu=MemorySettings(capacity=5 * SLOT, ceiling=4 * SLOT, low=3 * SLOT),
            guard=GuardPolicy(read_deadline_s=60),
        )

    def test_its_slot_is_not_reused_and_what_it_brings_is_right(self, make_chaos: MakeChaos) -> None:
        one = self.one_slot(make_chaos)
        mine, other = TOKENS[:16], OTHER[:16]
        stored_on_disk_only(one, mine, other)
        released = threading.Event()
        key = one.oracle.keys(mine)[0]
        stalled = one.disk.inject(Stall(released), Operation.READ, where=lambda ref: ref.key == key)

        into = np.zeros(one.oracle.kv(mine).shape, np.uint16)
        loaded = one.cache.load(mine, into=into, timeout=0.1).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (0, MissReason.STAGING_TIMEOUT)
        assert stalled.hits == 1
        staged = one.cache.stats()["tiers"]["cpu"]["staged_bytes"]
        assert staged == SLOT, "the read still has it"
        wanted = one.cache.load(other, timeout=0.1).result()
        assert wanted.num_tokens == 0
        assert wanted.stopped_by in {MissReason.STAGING_TIMEOUT, MissReason.NO_SLOT}
        for number in range(20, 30):  # stores press on the arena too
            tokens = list(range(number * 1000, number * 1000 + 64))
            one.cache.store(tokens, one.oracle.kv(tokens))

        released.set()
        assert one.node.wait_settled(WAIT_S)
        assert not into.any(), "nothing was written to the arrays of a load that was answered before"
        for tokens in (mine, other, mine, other):
            loaded = one.cache.load(tokens).result()
            assert loaded.num_tokens == 16
            one.oracle.check(tokens, 16, loaded.kv)
        assert one.cache.check_integrity() == []

    def test_a_load_that_comes_while_it_is_late_waits_for_it_and_shares_it(
        self, make_chaos: MakeChaos
    ) -> None:
        one = self.one_slot(make_chaos)
        mine = TOKENS[:16]
        stored_on_disk_only(one, mine)
        released = threading.Event()
        stalled = one.disk.inject(Stall(released), Operation.READ, times=None)
        assert one.cache.load(mine, timeout=0.05).result().num_tokens == 0
        again = one.cache.load(mine, timeout=3600)
        assert not again.done()
        released.set()
        loaded = again.result(WAIT_S)
        assert loaded.num_tokens == 16
        one.oracle.check(mine, 16, loaded.kv)
        assert stalled.hits <= 2


class TestArenaExhausted:
    def test_with_everything_leased_a_store_is_refused_at_once_and_loads_are_answered(
        self, make_chaos: MakeChaos
    ) -> None:
        one = make_chaos(cpu=MemorySettings(capacity=8 * SLOT, ceiling=6 * SLOT, low=5 * SLOT))
        stored_on_disk_only(one, OTHER)
        one.cache.store(TOKENS, one.oracle.kv(TOKENS))
        one.cache.flush()
        held = one.node.open_load(one.cache._session, one.cache._space, one.oracle.keys(TOKENS), 0.0)
        assert held.wait(WAIT_S)
        assert len(held.slots()) == 6
        third = list(range(9000, 9100))
        receipt = one.cache.store(third, one.oracle.kv(third))
        assert (receipt.accepted, receipt.refusal) == (0, Refusal.NO_SLOT)
        assert receipt.refusals[1:] == tuple((index, Refusal.CHAIN_BROKEN) for index in range(1, 6))
        loaded = one.cache.load(TOKENS).result()
        assert loaded.num_tokens == WHOLE
        one.oracle.check(TOKENS, WHOLE, loaded.kv)
        loaded = one.cache.load(OTHER).result()
        assert (loaded.num_tokens, loaded.stopped_by) == (32, MissReason.NO_SLOT), (
            "as far as the staging share goes"
        )
        one.oracle.check(OTHER, 32, loaded.kv)
        assert one.cache.evict("cpu").chunks == 0
        held.release()
        assert one.node.wait_settled(WAIT_S)
        assert one.cache.store(third, one.oracle.kv(third)).accepted == 6
        assert one.cache.stats()["tiers"]["cpu"]["leased_chunks"] >= 0

    def test_loads_that_wait_for_staging_room_get_it_in_order(self, make_chaos: MakeChaos) -> None:
        one = make_chaos(cpu=MemorySettings(capacity=8 * SLOT, ceiling=6 * SLOT, low=5 * SLOT))
        prompts = [list(range(number * 1000, number * 1000 + 32)) for number in range(6)]
        stored_on_disk_only(one, *prompts)
        answered: list[LoadTicket] = []
        loads = []
        for tokens in prompts:
            load = one.node.open_load(one.cache._session, one.cache._space, one.oracle.keys(tokens), 3600)
            load.when_answered(lambda load=load: answered.append(load.ticket))  # type: ignore[misc]
            loads.append(load)
        for load in loads:
            assert load.wait(WAIT_S)
            assert len(load.slots()) == 2
            load.release()
        assert answered == [load.ticket for load in loads]


STALLED_CHILD = """
    import sys, threading
    from pathlib import Path
    from kvtiers.testing.chaos import chaos
    from kvtiers.testing.faulty_store import Stall

    one = chaos(Path(sys.argv[1]), {"async.close_timeout_s": 2})
    tokens = list(range(100))
    one.cache.store(tokens, one.oracle.kv(tokens))
    one.cache.flush()
    one.cache.evict("cpu")
    stalled = one.disk.inject(Stall(threading.Event(), longest_s=3600), times=None)
    pending = one.cache.load(tokens, timeout=3600)
    other = list(range(5000, 5100))
    one.cache.store(other, one.oracle.kv(other))
    assert stalled.wait_for_hit(20)
    if sys.argv[2] == "close":
        print("closed", one.cache.close(0.1), one.node.close(0.2))
    print("bye", flush=True)
"""


@pytest.mark.parametrize("how", ["close", "just leave"])
def test_a_process_whose_disk_hangs_exits(tmp_path: Path, how: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(STALLED_CHILD), str(tmp_path / "cache"), how],
        capture_output=True,
        text=True,
        timeout=60,  # the disk hangs for an hour
        check=False,
    )
    assert {line.partition(":")[0] for line in done.stderr.splitlines()} <= {
        "closing with 6 background operations unfinished",
        "the disk tier is out of order",
    }
    assert done.returncode == 0
    assert done.stdout.splitlines() == (["closed True False", "bye"] if how == "close" else ["bye"])
