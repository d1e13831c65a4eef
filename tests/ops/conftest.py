"""A model the size of a toy, with a tokenizer of one token a byte: what the demo takes with `--model`, without a download."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """One token a byte; ChatML-like template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(["<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", chat_template=TEMPLATE)


@pytest.fixture(scope="session")
def toy_model(byte_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a random Llama of two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(byte_tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=0,
    )
    directory = tmp_path_factory.mktemp("toy")
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def document(tmp_path: Path) -> Path:
    """About 600 tokens for the toy."""
    file = tmp_path / "document.txt"
    file.write_text("The ferry sails at noon. It carries sheep, and on Sundays a piano.\n" * 9)
    return file
