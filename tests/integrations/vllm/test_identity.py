"""Weights that are replaced are other weights, and weights that can't be found have no name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from kvtiers.integrations.vllm.identity import _fingerprint
from kvtiers.integrations.vllm.settings import read_settings

SETTINGS = read_settings(None)


def engine(model: Path | str, **load: Any) -> Any:
    hf_config = SimpleNamespace(to_dict=lambda: {"layers": 2, "_name_or_path": str(model)})
    config = SimpleNamespace(
        model=str(model),
        revision=None,
        seed=0,
        hf_config=hf_config,
        max_model_len=4096,
        multimodal_config=None,
    )
    loading = SimpleNamespace(**{"load_format": "auto", "download_dir": None, **load})
    attention = SimpleNamespace(backend=None)
    return SimpleNamespace(model_config=config, load_config=loading, attention_config=attention)


def save(directory: Path, value: float) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text("{}")
    weights = np.full(4, value, np.float32).tobytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + weights)


def test_it_is_of_the_weights_and_not_of_their_place(tmp_path: Path) -> None:
    save(tmp_path / "a", 1.0)
    save(tmp_path / "b", 1.0)
    first = _fingerprint(SETTINGS, engine(tmp_path / "a"))
    assert first is not None
    assert _fingerprint(SETTINGS, engine(tmp_path / "b")) == first
    save(tmp_path / "a", 2.0)
    assert _fingerprint(SETTINGS, engine(tmp_path / "a")) != first


def test_a_model_in_one_file_is_read_whole(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(bytes(3_000_000))
    first = _fingerprint(SETTINGS, engine(file))
    changed = bytearray(3_000_000)
    changed[1_234_567] = 1
    file.write_bytes(changed)
    assert None is not _fingerprint(SETTINGS, engine(file)) != first


def test_weights_that_are_not_here_have_none_unless_the_user_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    elsewhere = engine("somebody/a-model-that-is-elsewhere", download_dir=str(tmp_path))
    assert _fingerprint(SETTINGS, elsewhere) is None
    (tmp_path / "no-weights").mkdir()
    assert _fingerprint(SETTINGS, engine(tmp_path / "no-weights")) is None
    names = {_fingerprint(read_settings({"fingerprint": name}), elsewhere) for name in ("one", "two")}
    assert None not in names
    assert len(names) == 2


def test_random_weights_are_those_of_their_seed() -> None:
    dummy = engine("anything", load_format="dummy")
    first = _fingerprint(SETTINGS, dummy)
    dummy.model_config.seed = 1
    assert None is not _fingerprint(SETTINGS, dummy) != first


def test_what_the_engine_was_told_is_part_of_it(tmp_path: Path) -> None:
    """LongRoPE turns keys by other factors if prompts may be long, the short ones too."""
    save(tmp_path / "a", 1.0)
    told = [engine(tmp_path / "a") for _ in range(6)]
    assert len({_fingerprint(SETTINGS, one) for one in told}) == 1
    told[1].model_config.max_model_len = 8192
    told[2].model_config.quantization_config = {"linear": "fp8"}
    told[3].attention_config.backend = "FLASHINFER"
    told[4].model_config.multimodal_config = SimpleNamespace(mm_processor_kwargs={"num_crops": 4})
    told[5].model_config.multimodal_config = SimpleNamespace(mm_processor_kwargs={"num_crops": 16})
    assert len({_fingerprint(SETTINGS, one) for one in told}) == 6
