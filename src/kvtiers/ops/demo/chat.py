"""Messages to token ids and back, for whatever tokenizer a model brings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from jinja2 import TemplateError

from kvtiers.ops.demo.document import Message


class Chat:
    """One tokenizer, with its chat template if it has one."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @classmethod
    def from_pretrained(cls, path: Path) -> Self:
        """The tokenizer in a model's directory. Raises what transformers raises if there is none."""
        from transformers import AutoTokenizer

        return cls(AutoTokenizer.from_pretrained(path, local_files_only=True))

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of a conversation up to where the model is to go on."""
        if not self._tokenizer.chat_template:
            text = "\n\n".join([*(message["content"] for message in messages), "Answer:"])
            return self._tokenize(text, add_special_tokens=True)
        try:
            text = self._render(messages)
        except TemplateError:  # some templates have no place for a system message
            text = self._render(_without_system(messages))
        return self._tokenize(text, add_special_tokens=False)

    def text(self, tokens: Sequence[int]) -> str:
        """What was generated, as a reader sees it."""
        decoded: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return decoded.strip()

    def _render(self, messages: Sequence[Message]) -> str:
        rendered: str = self._tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=False
        )
        return rendered

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special_tokens).input_ids
        return ids


def _without_system(messages: Sequence[Message]) -> list[Message]:
    """The system message put in front of the user's first."""
    first, second, *rest = messages
    return [Message(role=second["role"], content=f"{first['content']}\n\n{second['content']}"), *rest]
