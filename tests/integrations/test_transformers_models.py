"""Which models can be cached: those with full attention in every layer. The others are refused before any KV is touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from kvtiers.config import CacheConfig
from kvtiers.integrations.transformers import CachedCausalLM, UnsupportedModel, layout_of, namespace_of
from kvtiers.model.layout import KVLayout
from kvtiers.model.namespace import Namespace
from kvtiers.runtime.cache import TieredCache

SMALL: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def model_of(kind: str, **changes: Any) -> Any:
    """A model without weights: only its shape is looked at."""
    config = getattr(transformers, f"{kind}Config")(**SMALL | changes)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
        ("Gemma3Text", {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]}),
        ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    ],
    ids=["sliding window", "window in one layer", "hybrid window", "convolution"],
)
def test_other_than_full_attention_is_refused(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match="only full attention"):
        layout_of(model_of(kind, **changes))


def test_latent_attention_is_refused() -> None:
    model = model_of(
        "DeepseekV3",
        num_key_value_heads=4,
        n_routed_experts=2,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        q_lora_rank=8,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    with pytest.raises(UnsupportedModel, match="latent attention"):
        layout_of(model)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_full_attention_has_the_layout_its_cache_has(kind: str) -> None:
    window = {"sliding_window": None} if kind == "Mistral" else {}
    config = getattr(transformers, f"{kind}Config")(**SMALL | window)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    assert layout_of(model) == KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="bfloat16")
    with torch.inference_mode():
        past = model(torch.tensor([[1, 2, 3]])).past_key_values
    assert past.layers[0].keys.shape == (1, 2, 3, 8)


def test_namespace_tells_attention_and_rope_apart(model_dir: Path) -> None:
    def digest(**changes: Any) -> bytes:
        model = LlamaForCausalLM.from_pretrained(model_dir, **changes)
        return namespace_of(model, model_dir).digest

    plain = digest()
    assert plain == digest()
    assert plain != digest(attn_implementation="eager")
    assert plain != digest(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})


MOVING_ROPES: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "original_max_position_embeddings": 32,
        "rope_theta": 10000.0,
    },
}


@pytest.mark.parametrize("kind", MOVING_ROPES)
def test_rotary_embeddings_that_depend_on_the_sequence_length_are_refused(
    kind: str, tmp_path: Path, config_of: Callable[..., CacheConfig]
) -> None:
    config = LlamaConfig(**SMALL, max_position_embeddings=64, rope_parameters=MOVING_ROPES[kind])
    model = LlamaForCausalLM(config)
    model.save_pretrained(tmp_path)
    refusal = f"rotary embeddings of type {kind}"
    with pytest.raises(UnsupportedModel, match=refusal):
        layout_of(model)
    with pytest.raises(UnsupportedModel, match=refusal):
        CachedCausalLM.from_pretrained(tmp_path, config_of())
    layout = KVLayout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32")
    namespace = Namespace(model="small", fingerprint="0", engine="test")
    with (
        TieredCache(config_of(), layout, namespace) as cache,
        pytest.raises(UnsupportedModel, match=refusal),
    ):
        CachedCausalLM(model, cache)


def test_a_rotary_type_named_for_one_kind_of_layer_only_is_refused() -> None:
    """As configurations with several kinds of layers have it (Gemma 3: one entry for each)."""
    model = model_of("Llama")
    model.config.rope_parameters = {"full_attention": MOVING_ROPES["dynamic"]}
    with pytest.raises(UnsupportedModel, match="of type dynamic"):
        layout_of(model)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_of_the_position_alone_are_taken(rope: dict[str, Any]) -> None:
    assert layout_of(model_of("Llama", rope_parameters=rope)).num_layers == 2
