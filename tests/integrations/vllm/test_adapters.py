"""Adapters are told apart by their weights, once for each that the engine loads."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kvtiers.integrations.vllm import adapters
from kvtiers.integrations.vllm.adapters import Adapters


def lora(path: Path, number: int = 1, *, load_inplace: bool = False) -> Any:
    return SimpleNamespace(lora_int_id=number, lora_path=str(path), load_inplace=load_inplace)


def save(directory: Path, weights: bytes) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text("{}")
    (directory / "adapter_model.bin").write_bytes(weights)
    return directory


def test_none_is_nothing() -> None:
    assert Adapters().key_of(None) == b""


def test_one_that_was_trained_anew_is_another_when_it_is_loaded_again(tmp_path: Path) -> None:
    known, path = Adapters(), save(tmp_path / "a", b"old")
    old = known.key_of(lora(path))
    assert old
    assert known.key_of(lora(path)) == old
    save(path, b"trained")
    assert known.key_of(lora(path, 2)) not in {None, b"", old}
    assert Adapters().key_of(lora(path)) == known.key_of(lora(path, 2)), "equal in every process"


def test_one_that_is_overwritten_is_not_cached_any_more(tmp_path: Path) -> None:
    """The engine has the old one, or, if it had to read it again, the new one."""
    known, path = Adapters(), save(tmp_path / "a", b"old")
    assert known.key_of(lora(path))
    save(path, b"trained")
    assert known.key_of(lora(path)) is None
    save(path, b"old")
    assert known.key_of(lora(path)) is None


def test_one_that_was_copied_over_itself_or_is_gone_is_what_it_was(tmp_path: Path) -> None:
    known, path = Adapters(), save(tmp_path / "a", b"old")
    old = known.key_of(lora(path))
    for file in path.iterdir():
        os.utime(file, ns=(1, 1))
    assert known.key_of(lora(path)) == old
    for file in path.iterdir():
        file.unlink()
    assert known.key_of(lora(path)) == old
    path.rmdir()
    assert known.key_of(lora(path)) == old


def test_what_can_not_be_told_apart_is_not_cached(tmp_path: Path) -> None:
    path = save(tmp_path / "a", b"weights")
    assert Adapters().key_of(lora(path, load_inplace=True)) is None
    assert Adapters().key_of(lora(tmp_path / "nowhere")) is None


def test_their_number_is_bounded(tmp_path: Path) -> None:
    path, known = save(tmp_path / "a", b"weights"), Adapters(lambda _: "x")
    keys = [known.key_of(lora(path, number)) for number in range(adapters._MOST + 2)]
    assert keys == [b"x"] * adapters._MOST + [None, None]
    assert known.key_of(lora(path, 5)) == b"x"
