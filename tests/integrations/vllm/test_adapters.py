"""Adapters are told apart by their weights, once for each that the engine loads, and never on the thread that asks."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest

from kvtiers.integrations.vllm import adapters
from kvtiers.integrations.vllm.adapters import Adapters
from kvtiers.model.namespace import fingerprint_model
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.direct_engine import PATIENCE_S

MakeAdapters: TypeAlias = Callable[..., Adapters]


def lora(path: Path, number: int = 1, *, load_inplace: bool = False) -> Any:
    return SimpleNamespace(lora_int_id=number, lora_path=str(path), load_inplace=load_inplace)


def save(directory: Path, weights: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.bin").write_bytes(weights)
    return directory


@pytest.fixture
def make_adapters() -> Iterator[Callable[..., Adapters]]:
    made: list[Adapters] = []

    def make(*fingerprint: Callable[[Path], str]) -> Adapters:
        made.append(Adapters(*fingerprint))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def known(make_adapters: MakeAdapters) -> Adapters:
    return make_adapters()


def answer(known: Adapters, request: Any) -> bytes | None:
    """What it comes to once its files were looked at."""
    asked = known.ask(request)
    if asked is None:
        return None
    assert wait_until(lambda: asked.answered, PATIENCE_S)
    return asked.key


def test_one_that_was_trained_anew_is_another_when_it_is_loaded_again(
    known: Adapters, make_adapters: MakeAdapters, tmp_path: Path
) -> None:
    path = save(tmp_path / "a", b"old")
    old = answer(known, lora(path))
    assert old
    assert answer(known, lora(path)) == old
    save(path, b"trained")
    assert answer(known, lora(path, 2)) not in {None, b"", old}
    assert answer(make_adapters(), lora(path)) == answer(known, lora(path, 2)), "equal in every process"


def test_one_that_is_overwritten_is_not_cached_any_more(known: Adapters, tmp_path: Path) -> None:
    """The engine has the old one, or, if it had to read it again, the new one."""
    path = save(tmp_path / "a", b"old")
    assert answer(known, lora(path))
    save(path, b"trained")
    assert answer(known, lora(path)) is None
    save(path, b"old")
    assert answer(known, lora(path)) is None


def test_one_that_was_copied_over_itself_or_is_gone_is_what_it_was(known: Adapters, tmp_path: Path) -> None:
    path = save(tmp_path / "a", b"old")
    old = answer(known, lora(path))
    for file in path.iterdir():
        os.utime(file, ns=(1, 1))
    assert answer(known, lora(path)) == old
    for file in path.iterdir():
        file.unlink()
    assert answer(known, lora(path)) == old
    path.rmdir()
    assert answer(known, lora(path)) == old


def test_what_can_not_be_told_apart_is_not_cached(known: Adapters, tmp_path: Path) -> None:
    path = save(tmp_path / "a", b"weights")
    assert known.ask(lora(path, load_inplace=True)) is None
    assert answer(known, lora(tmp_path / "nowhere")) is None


def test_their_number_is_bounded(make_adapters: MakeAdapters, tmp_path: Path) -> None:
    path, known = save(tmp_path / "a", b"weights"), make_adapters(lambda _: "x")
    asked = [known.ask(lora(path, number)) for number in range(adapters._MOST + 2)]
    assert wait_until(lambda: all(one.answered for one in asked if one), PATIENCE_S)
    assert [one and one.key for one in asked] == [b"x"] * adapters._MOST + [None, None]
    assert answer(known, lora(path, 5)) == b"x"


class TestWhileAnAdapterIsRead:
    """Its file system hangs, say."""

    @pytest.fixture
    def gate(self) -> Iterator[threading.Event]:
        gate = threading.Event()
        yield gate
        gate.set()

    @pytest.fixture
    def slow(self, make_adapters: MakeAdapters, gate: threading.Event) -> Adapters:
        def fingerprint(path: Path) -> str:
            assert gate.wait(PATIENCE_S)
            return fingerprint_model(path)

        return make_adapters(fingerprint)

    def test_nobody_waits_and_nothing_is_known(
        self, slow: Adapters, gate: threading.Event, tmp_path: Path
    ) -> None:
        asked = [slow.ask(lora(save(tmp_path / "a", b"weights"))) for _ in range(5)]
        assert [(one.answered, one.key) for one in asked if one] == [(False, None)] * 5
        gate.set()
        assert wait_until(lambda: all(one.answered for one in asked if one), PATIENCE_S)
        assert len({one.key for one in asked if one} - {None}) == 1

    def test_who_asks_meanwhile_is_answered_by_a_later_look(
        self, slow: Adapters, gate: threading.Event, tmp_path: Path
    ) -> None:
        """The one under way may have seen the files before they were overwritten."""
        path = save(tmp_path / "a", b"old")
        first = slow.ask(lora(path))
        assert first
        assert wait_until(lambda: not first.adapter.queued and bool(first.adapter.files), PATIENCE_S)
        os.utime(path / "adapter_model.bin", ns=(1, 1))
        second = slow.ask(lora(path))
        assert second
        gate.set()
        assert wait_until(lambda: second.answered, PATIENCE_S)
        assert ("adapter_model.bin", 3, 1) in first.adapter.files

    def test_look_that_fails_in_an_unheard_of_way_is_not_the_last(
        self, make_adapters: MakeAdapters, tmp_path: Path
    ) -> None:
        def broken(path: Path) -> str:
            if path.name == "a":
                raise ZeroDivisionError
            return "x"

        known = make_adapters(broken)
        assert answer(known, lora(save(tmp_path / "a", b"weights"), 1)) is None
        assert answer(known, lora(save(tmp_path / "b", b"weights"), 2)) == b"x"
