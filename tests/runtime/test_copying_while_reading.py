"""Chunks that a load has read are copied while it reads the next ones: right bytes and one answer, whatever happens in between."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from kvtiers.model.errors import CacheClosed, RecordCorrupt, StoreTransient
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.transfer import ArenaSlots
from kvtiers.stores.guard import Operation
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.faulty_store import Delay, Fail, Stall

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.runtime.conftest import MakeChaos

    from kvtiers.model.parts import RecordRef
    from kvtiers.testing.chaos import Chaos

CHUNKS = 6
TOKENS = list(range(16 * CHUNKS))
WAIT_S = 20.0


@pytest.fixture(autouse=True)
def every_load_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_INLINE_BYTES", 0), ("_PIECE_BYTES", 1)):
        monkeypatch.setattr(f"kvtiers.runtime.copying.{name}", value)


class Copies:
    """Sees every layer copied out of the arena, and can hold one up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chunks: list[int] = []
        """Of each layer copied."""
        self.stop_at: int | None = None
        self.stopped, self.go_on = threading.Event(), threading.Event()
        self.error: Exception | None = None
        read = ArenaSlots.read

        def watched(
            slots: Any, offset: int, kv: Any, start: int, *rest: Any, layers: range | None = None
        ) -> None:
            chunk = start // 16
            if chunk == self.stop_at:
                self.stopped.set()
                assert self.go_on.wait(WAIT_S)
                if self.error is not None:
                    raise self.error
            read(slots, offset, kv, start, *rest, layers=layers)
            self.chunks.extend(chunk for _ in layers or range(3))

        monkeypatch.setattr(ArenaSlots, "read", watched)

    def saw(self, *chunks: int) -> bool:
        """Whether all layers of these were copied, each once, and nothing else."""
        return wait_until(lambda: sorted(self.chunks) == sorted(3 * chunks), WAIT_S)


@pytest.fixture
def copies(monkeypatch: pytest.MonkeyPatch) -> Copies:
    return Copies(monkeypatch)


def on_disk(make_chaos: MakeChaos, values: dict[str, Any] | None = None) -> Chaos:
    one = make_chaos(values)
    one.cache.store(TOKENS, one.oracle.kv(TOKENS))
    one.cache.flush()
    one.cache.evict("cpu")
    assert set(one.cache.lookup(TOKENS).tiers) == {Tier.DISK}
    return one


def chunk(one: Chaos, *indices: int) -> Callable[[RecordRef], bool]:
    wanted = [one.oracle.keys(TOKENS)[index] for index in indices]
    return lambda ref: ref.key in wanted


def stall(one: Chaos, *indices: int) -> threading.Event:
    released = threading.Event()
    one.disk.inject(Stall(released), Operation.READ, where=chunk(one, *indices), times=None)
    return released


def arrays(one: Chaos) -> Any:
    return np.zeros(one.cache.layout.shape(len(TOKENS)), np.uint16)


def nothing_is_leased(one: Chaos) -> bool:
    return wait_until(lambda: one.cache.stats()["tiers"]["cpu"]["leased_chunks"] == 0, WAIT_S)


def test_what_is_ready_is_copied_while_a_later_read_has_not_ended(
    make_chaos: MakeChaos, copies: Copies
) -> None:
    one = on_disk(make_chaos)
    released, into = stall(one, 4), arrays(one)
    pending = one.cache.load(TOKENS, into=into, timeout=WAIT_S)
    assert copies.saw(0, 1, 2, 3), "what lies before the stalled chunk, and nothing behind it"
    assert not pending.done()
    one.oracle.check(TOKENS, 64, into)
    released.set()
    loaded = pending.result(WAIT_S)
    assert (loaded.num_tokens, loaded.stopped_by, set(loaded.tiers)) == (96, None, {Tier.DISK})
    one.oracle.check(TOKENS, 96, into)
    assert copies.saw(*range(CHUNKS))
    assert one.cache.stats()["tiers"]["disk"]["hits"] == CHUNKS
    assert nothing_is_leased(one)


def test_what_lies_in_memory_is_copied_while_the_disk_is_read(make_chaos: MakeChaos, copies: Copies) -> None:
    one = on_disk(make_chaos)
    assert one.cache.load(TOKENS[:32]).result().num_tokens == 32
    copies.chunks.clear()
    released, into = stall(one, 2), arrays(one)
    pending = one.cache.load(TOKENS, into=into, timeout=WAIT_S)
    assert copies.saw(0, 1)
    assert not pending.done()
    released.set()
    assert pending.result(WAIT_S).num_tokens == 96
    one.oracle.check(TOKENS, 96, into)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("verify", [False, True])
def test_reads_may_end_in_any_order(
    make_chaos: MakeChaos, copies: Copies, seed: int, *, verify: bool
) -> None:
    one = on_disk(make_chaos, {"async.max_workers": 6, "cpu.verify_on_hit": verify})
    for place, index in enumerate(np.random.default_rng(seed).permutation(CHUNKS)):
        one.disk.inject(Delay(0.01 * place), Operation.READ, where=chunk(one, int(index)))
    into = arrays(one)
    assert one.cache.load(TOKENS, into=into, timeout=WAIT_S).result(WAIT_S).num_tokens == 96
    one.oracle.check(TOKENS, 96, into)
    assert copies.saw(*range(CHUNKS)), "each piece once"
    assert nothing_is_leased(one)


def test_a_deadline_in_between_answers_what_was_copied(make_chaos: MakeChaos, copies: Copies) -> None:
    one = on_disk(make_chaos)
    released, into = stall(one, 3), arrays(one)
    loaded = one.cache.load(TOKENS, into=into, timeout=0.3).result(WAIT_S)
    assert (loaded.num_tokens, loaded.stopped_by) == (48, MissReason.STAGING_TIMEOUT)
    assert copies.saw(0, 1, 2)
    one.oracle.check(TOKENS, 48, into)
    released.set()


def test_a_chunk_that_is_corrupt_on_disk_ends_the_answer_before_it(
    make_chaos: MakeChaos, copies: Copies
) -> None:
    one = on_disk(make_chaos)
    released, into = stall(one, 3), arrays(one)
    one.disk.inject(Fail(RecordCorrupt), Operation.READ, where=chunk(one, 3), times=None)
    pending = one.cache.load(TOKENS, into=into, timeout=WAIT_S)
    assert copies.saw(0, 1, 2)
    released.set()
    loaded = pending.result(WAIT_S)
    assert (loaded.num_tokens, loaded.stopped_by) == (48, MissReason.CORRUPT)
    one.oracle.check(TOKENS, 48, into)
    assert nothing_is_leased(one)


def test_a_chunk_damaged_in_memory_is_found_before_the_answer_and_ends_it(make_chaos: MakeChaos) -> None:
    one = on_disk(make_chaos, {"cpu.verify_on_hit": True})
    assert one.cache.load(TOKENS[:48]).result().num_tokens == 48
    key = one.oracle.keys(TOKENS)[1]
    (slots,) = [
        copy.slots for copy in one.node.inspect(lambda core: core.copies(Tier.CPU)) if copy.chunk.key == key
    ]
    one.node.arena.view(slots[0], 9216)[17] ^= 1
    released, into = stall(one, 4), arrays(one)
    pending = one.cache.load(TOKENS, into=into, timeout=WAIT_S)
    assert one.node.engine.wait_idle(0.2) is False
    released.set()
    loaded = pending.result(WAIT_S)
    assert (loaded.num_tokens, loaded.stopped_by) == (16, MissReason.CORRUPT)
    one.oracle.check(TOKENS, 16, into)
    assert nothing_is_leased(one)


def test_a_disk_that_fails_in_between_shortens_the_answer(make_chaos: MakeChaos) -> None:
    one = on_disk(make_chaos)
    one.disk.inject(Fail(StoreTransient), Operation.READ, where=chunk(one, 2), times=None)
    released, into = stall(one, 1), arrays(one)
    pending = one.cache.load(TOKENS, into=into, timeout=WAIT_S)
    released.set()
    assert pending.result(WAIT_S).num_tokens == 32
    one.oracle.check(TOKENS, 32, into)


def test_cancelling_a_load_that_waits_for_the_disk_ends_it_at_once(
    make_chaos: MakeChaos, copies: Copies
) -> None:
    one = on_disk(make_chaos)
    released, into = stall(one, 3), arrays(one)
    pending = one.cache.load(TOKENS, into=into, timeout=WAIT_S)
    assert copies.saw(0, 1, 2)
    pending.cancel(0.0)  # had it waited for the disk, this would raise
    into[:] = 7
    released.set()
    assert nothing_is_leased(one)
    with pytest.raises(CacheClosed, match="cancelled"):
        pending.result(WAIT_S)
    assert (into == 7).all()
    assert one.cache.load(TOKENS).result(WAIT_S).num_tokens == 96


def test_cancelling_waits_for_the_piece_under_way(make_chaos: MakeChaos, copies: Copies) -> None:
    one = on_disk(make_chaos)
    released, into = stall(one, 3), arrays(one)
    copies.stop_at = 1
    pending = one.cache.load(TOKENS, into=into, timeout=WAIT_S)
    assert copies.stopped.wait(WAIT_S)
    canceller = threading.Thread(target=pending.cancel, args=(WAIT_S,))
    canceller.start()
    canceller.join(0.1)
    assert canceller.is_alive()
    assert one.cache.stats()["tiers"]["cpu"]["leased_chunks"] >= 2, "a chunk being copied lost its lease"
    copies.go_on.set()
    canceller.join(WAIT_S)
    assert not canceller.is_alive()
    into[:] = 7
    released.set()
    assert nothing_is_leased(one)
    assert (into == 7).all()


def test_closing_waits_for_the_piece_under_way_and_keeps_its_lease(
    make_chaos: MakeChaos, copies: Copies
) -> None:
    one = on_disk(make_chaos)
    released, into = stall(one, 3), arrays(one)
    copies.stop_at = 1
    pending = one.cache.load(TOKENS, into=into, timeout=3600)
    assert copies.stopped.wait(WAIT_S)
    assert not one.cache.close(0.1), "a copy is under way"
    assert not pending.done()
    assert one.node.stats()["tiers"]["cpu"]["leased_chunks"] >= 2, "a chunk being copied lost its lease"
    copies.go_on.set()
    with pytest.raises(CacheClosed):
        pending.result(WAIT_S)
    into[:] = 7
    released.set()
    assert one.cache.close(WAIT_S)
    assert (into == 7).all()


def test_a_copy_that_fails_before_the_answer_fails_the_load_once(
    make_chaos: MakeChaos, copies: Copies
) -> None:
    one = on_disk(make_chaos)
    released, into = stall(one, 3), arrays(one)
    copies.stop_at, copies.error = 1, RuntimeError("a broken device")
    copies.go_on.set()
    pending = one.cache.load(TOKENS, into=into, timeout=WAIT_S)
    with pytest.raises(RuntimeError, match="a broken device"):
        pending.result(WAIT_S)
    released.set()
    assert nothing_is_leased(one)
    copies.stop_at = None
    assert one.cache.load(TOKENS, into=into).result(WAIT_S).num_tokens == 96
    one.oracle.check(TOKENS, 96, into)


def test_two_loads_share_the_reads_and_end_each_for_itself(make_chaos: MakeChaos) -> None:
    one = on_disk(make_chaos)
    reads = one.disk.inject(Delay(0.0), Operation.READ, times=None)
    released, first, second = stall(one, 4), arrays(one), arrays(one)
    given_up = one.cache.load(TOKENS, into=first, timeout=WAIT_S)
    pending = one.cache.load(TOKENS, into=second, timeout=WAIT_S)
    given_up.cancel(WAIT_S)
    first[:] = 7
    released.set()
    assert pending.result(WAIT_S).num_tokens == 96
    one.oracle.check(TOKENS, 96, second)
    assert (first == 7).all()
    assert reads.hits <= CHUNKS
    assert nothing_is_leased(one)
