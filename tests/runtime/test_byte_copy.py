"""Whichever way bytes are copied, each arrives and none beside them is touched; the way depends on where both lie and on the machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from kvtiers.runtime import byte_copy
from kvtiers.runtime.byte_copy import address, copy, memcpy_stumbles

PAGE = 4096


@pytest.fixture(autouse=True)
def asked_anew() -> Iterator[None]:
    memcpy_stumbles.cache_clear()
    yield
    memcpy_stumbles.cache_clear()


def on_a_page(nbytes: int, behind: int) -> np.ndarray[Any, Any]:
    memory = np.full(nbytes + 2 * PAGE, 0x11, np.uint8)
    start = -address(memory) % PAGE + behind
    return memory[start : start + nbytes]


@pytest.mark.parametrize("stumbles", [False, True])
@pytest.mark.parametrize("behind", [0, 2, 16, 30, 32, 64])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_every_element_arrives_and_nothing_beside_it_changes(
    *, stumbles: bool, behind: int, dtype: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_copy, "memcpy_stumbles", lambda: stumbles)
    behind -= behind % np.dtype(dtype).itemsize
    rng = np.random.default_rng(behind)
    chunk = rng.integers(0, 256, 3 * 2 * 4 * 1024, dtype=np.uint8).view(dtype).reshape(3, 2, 4, -1)
    source = on_a_page(chunk.nbytes, 0).view(dtype).reshape(chunk.shape)
    source[:] = chunk
    whole = on_a_page(3 * chunk.nbytes, behind).view(dtype).reshape(3, 2, 12, -1)
    around = whole.copy()
    copy(whole[:, :, 4:8], source)
    np.testing.assert_array_equal(whole[:, :, 4:8], chunk)
    around[:, :, 4:8] = chunk
    np.testing.assert_array_equal(whole, around)
    back = np.zeros_like(source)
    copy(back, whole[:, :, 4:8])
    np.testing.assert_array_equal(back, chunk)


@pytest.mark.parametrize(
    ("stumbles", "behind", "way"),
    [
        (False, 16, "copyto"),
        (True, 16, "positive"),
        (True, 0, "copyto"),
        (True, 64, "copyto"),
        (True, PAGE, "copyto"),
    ],
)
def test_memcpy_is_left_only_where_it_stumbles_and_both_sides_lie_differently(
    *, stumbles: bool, behind: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(byte_copy, "memcpy_stumbles", lambda: stumbles)
    used = []
    for name in ("copyto", "positive"):
        monkeypatch.setattr(np, name, lambda *_, name=name, **__: used.append(name))
    copy(on_a_page(PAGE, behind), on_a_page(PAGE, 0))
    assert used == [way]


@pytest.mark.parametrize(("behind_ns", "stumbles"), [(11_200, True), (1_300, False), (2_600, False)])
def test_a_machine_stumbles_if_copies_behind_a_page_take_several_times_as_long(
    behind_ns: int, stumbles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken(target: np.ndarray[Any, Any], source: np.ndarray[Any, Any]) -> int:
        assert not np.shares_memory(target, source)
        return behind_ns if (address(target) - address(source)) % PAGE else 1_300

    monkeypatch.setattr(byte_copy, "_fastest", taken)
    assert memcpy_stumbles() is stumbles


def test_the_machine_is_asked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def taken(*_: object) -> int:
        asked.append(1)
        return len(asked)

    monkeypatch.setattr(byte_copy, "_fastest", taken)
    assert memcpy_stumbles() == memcpy_stumbles()
    assert len(asked) == 2, "once for each of the two places"
