"""A small random Llama with grouped-query attention, and caches for it: no download, and every code path of a large one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtiers.config import CacheConfig
from kvtiers.integrations.transformers import CachedCausalLM

VOCABULARY = 128


@pytest.fixture(scope="session")
def save_model() -> Callable[[Path, int], None]:
    """Writes a model with the weights of a seed into a directory."""

    def save(directory: Path, seed: int) -> None:
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            initializer_range=0.3,  # so that logits differ enough for greedy answers to vary
            bos_token_id=0,
            eos_token_id=VOCABULARY - 1,
        )
        LlamaForCausalLM(config).save_pretrained(directory)

    return save


@pytest.fixture(scope="session")
def model_dir(save_model: Callable[[Path, int], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    save_model(directory, 0)
    return directory


@pytest.fixture
def prompt() -> list[int]:
    """70 tokens: four chunks of 16 and a tail."""
    generator = torch.Generator().manual_seed(1)
    tokens: list[int] = torch.randint(1, VOCABULARY - 1, (70,), generator=generator).tolist()
    return tokens


@pytest.fixture(scope="session")
def config_of() -> Callable[..., CacheConfig]:
    """A configuration with chunks of 16 tokens: CPU tier, disk and simulated GPU where asked for."""

    def make(disk: Path | None = None, *, gpu: bool = False, **cpu: Any) -> CacheConfig:
        storage: dict[str, Any] = {"chunk_tokens": 16, "cpu": {"buffer_size": "16Mi", **cpu}}
        if gpu:
            storage["gpu"] = {"capacity": "4Mi", "device": "cpu"}
        if disk is not None:
            storage["disk"] = {
                "enabled": True,
                "path": str(disk),
                "max_size": "64Mi",
                "min_free_space": "1Mi",
            }
        return CacheConfig.from_mapping({"storage": storage}, environ={})

    return make


@pytest.fixture
def open_lm(
    model_dir: Path, config_of: Callable[..., CacheConfig]
) -> Iterator[Callable[..., CachedCausalLM]]:
    """Opens models with caches; at the end each cache is audited and closed."""
    opened: list[CachedCausalLM] = []

    def open_one(
        config: CacheConfig | None = None, *, path: Path | None = None, **more: Any
    ) -> CachedCausalLM:
        lm = CachedCausalLM.from_pretrained(path or model_dir, config or config_of(), **more)
        opened.append(lm)
        return lm

    yield open_one
    for lm in opened:
        if not lm.cache.node.closing:
            assert lm.cache.check_integrity() == []
            lm.close()
