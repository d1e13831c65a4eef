"""A small random model: `make_model.py KIND FOLDER [SEED]`, run by the Python that has vLLM and transformers. KIND `adapter` is a LoRA one."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # so that tokens depend on all of the prompt
    "bos_token_id": 0,
    "eos_token_id": 1,
    "tie_word_embeddings": False,
}
LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 512,
    "q_lora_rank": None,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 4,
}
WINDOWS: dict[str, Any] = {
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 64,
    "query_pre_attn_scalar": 32,
    "tie_word_embeddings": True,
}
MAKE: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=32)),
    "latent": lambda: DeepseekV2ForCausalLM(DeepseekV2Config(**SIZES, **LATENT)),
    "windows": lambda: Gemma2ForCausalLM(Gemma2Config(**{**SIZES, **WINDOWS})),
}


RANK = 8


def save_adapter(folder: Path) -> None:
    """Of queries, keys and values of the `llama` above, as PEFT writes it."""
    folder.mkdir(exist_ok=True)
    targets = {"q_proj": 128, "k_proj": 64, "v_proj": 64}
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": 4 * RANK,
        "target_modules": list(targets),
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(SIZES["num_hidden_layers"]):
        for name, width in targets.items():
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, SIZES["hidden_size"]) * 0.2
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(width, RANK) * 0.2
    save_file(tensors, folder / "adapter_model.safetensors")


def main() -> None:
    kind, folder = sys.argv[1], Path(sys.argv[2])
    torch.manual_seed(int(sys.argv[3]) if len(sys.argv) > 3 else 7)
    if kind == "adapter":
        save_adapter(folder)
    else:
        MAKE[kind]().float().save_pretrained(folder)


if __name__ == "__main__":
    main()
