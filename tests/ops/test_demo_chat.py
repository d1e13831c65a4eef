"""Prompts for tokenizers of every kind: with a chat template, without one, and with one that knows no system message."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

from kvtiers.ops.demo.chat import Chat
from kvtiers.ops.demo.document import Message

MESSAGES = [Message(role="system", content="Be brief."), Message(role="user", content="Why?")]
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


def test_template_of_the_tokenizer_is_used(byte_tokenizer: Any) -> None:
    chat = Chat(byte_tokenizer)
    assert chat.text(chat.prompt(MESSAGES)) == "<system>Be brief.</><user>Why?</><assistant>"


def test_tokenizer_without_template_gets_plain_text(byte_tokenizer: Any) -> None:
    tokenizer = deepcopy(byte_tokenizer)
    tokenizer.chat_template = None
    chat = Chat(tokenizer)
    assert chat.text(chat.prompt(MESSAGES)) == "Be brief.\n\nWhy?\n\nAnswer:"


def test_template_without_system_role_gets_it_in_the_first_message(byte_tokenizer: Any) -> None:
    tokenizer = deepcopy(byte_tokenizer)
    tokenizer.chat_template = NO_SYSTEM
    chat = Chat(tokenizer)
    longer = [*MESSAGES, Message(role="assistant", content="So.")]
    assert chat.text(chat.prompt(longer)) == "[user]Be brief.\n\nWhy?[assistant]So."


def test_text_is_without_special_tokens(byte_tokenizer: Any) -> None:
    tokens = byte_tokenizer(" Because.\n").input_ids
    assert Chat(byte_tokenizer).text([*tokens, byte_tokenizer.eos_token_id]) == "Because."
