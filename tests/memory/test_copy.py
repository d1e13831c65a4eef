from __future__ import annotations

import threading

import numpy as np
import pytest

from kvtiers.memory import copy
from kvtiers.memory.arena import Arena
from kvtiers.memory.copy import PARALLEL_BYTES, TILE_BYTES, ParallelCopier, copy_bytes
from kvtiers.memory.mapping import CloseOutcome
from kvtiers.model.errors import LayoutMismatch

MIB = 1 << 20


def random_bytes(nbytes: int, seed: int = 0) -> copy.Bytes:
    return np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)


@pytest.mark.parametrize(
    "nbytes", [0, 1, 4096, PARALLEL_BYTES - 1, PARALLEL_BYTES, 3 * TILE_BYTES + 4096 + 1]
)
def test_every_byte_arrives_and_none_beside(nbytes: int) -> None:
    copier = ParallelCopier()
    src = random_bytes(nbytes)
    room = np.zeros(nbytes + 2, np.uint8)
    copier.copy(room[1:-1], src)
    assert np.array_equal(room[1:-1], src)
    assert room[0] == room[-1] == 0
    copier.close()


def test_sizes_and_types_must_agree() -> None:
    copier = ParallelCopier()
    for dst, src in [
        (np.zeros(8 * MIB, np.uint8), np.zeros(8 * MIB - 1, np.uint8)),
        (np.zeros(1, np.uint8), np.zeros(8 * MIB, np.uint8)),
    ]:
        with pytest.raises(LayoutMismatch):
            copy_bytes(dst, src)
        with pytest.raises(LayoutMismatch):
            copier.copy(dst, src)
    with pytest.raises(LayoutMismatch):
        copy_bytes(np.zeros(8, np.uint8), np.zeros(1, np.uint64))
    copier.close()


def test_callers_that_find_the_thread_taken_copy_alone() -> None:
    copier = ParallelCopier()
    sources = [random_bytes(9 * MIB, seed) for seed in range(3)]
    wrong: list[int] = []

    def many(index: int) -> None:
        dst = np.zeros(9 * MIB, np.uint8)
        for _ in range(5):
            dst.fill(0)
            copier.copy(dst, sources[index])
            if not np.array_equal(dst, sources[index]):
                wrong.append(index)

    threads = [threading.Thread(target=many, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    copier.close()


def test_closed_copier_still_copies() -> None:
    copier = ParallelCopier()
    copier.close()
    src = random_bytes(9 * MIB)
    for _ in range(3):
        dst = np.zeros(9 * MIB, np.uint8)
        copier.copy(dst, src)
        assert np.array_equal(dst, src)
    assert not [thread for thread in threading.enumerate() if thread.name == "kvtiers-copy"]


def test_finished_copy_keeps_no_view_of_the_arena() -> None:
    copier = ParallelCopier()
    arena = Arena(16 * MIB)
    copier.copy(arena.view(0, 16 * MIB), random_bytes(16 * MIB))
    copier.close()
    assert arena.close() is CloseOutcome.UNMAPPED


def test_interrupted_copy_leaves_no_thread_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    copier = ParallelCopier()
    real = np.copyto

    def interrupt_caller(dst: copy.Bytes, src: copy.Bytes) -> None:
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        real(dst, src)

    arena = Arena(32 * MIB)
    monkeypatch.setattr(np, "copyto", interrupt_caller)
    with pytest.raises(KeyboardInterrupt):
        copier.copy(arena.view(0, 32 * MIB), random_bytes(32 * MIB))
    monkeypatch.undo()
    before = arena.view(0, 32 * MIB).copy()
    copier.close()
    assert np.array_equal(arena.view(0, 32 * MIB), before)
    assert arena.close() is CloseOutcome.UNMAPPED
