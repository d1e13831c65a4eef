"""What the demo's model reads: a handbook written for this repository, three questions about it, and a ten-turn dialogue.

The handbook has about 2,000 tokens for SmolLM2 and the questions ask what a model of 135 M parameters gets right, so that a
person can see at a glance that answers out of a cache are answers to the document. All places, ships and people are invented.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Final, TypedDict

SYSTEM_PROMPT: Final = (
    "You are a friendly customer service agent of the Skerry Sound Ferry Service. "
    "Answer with one short sentence from the handbook."
)
GENERIC_SYSTEM_PROMPT: Final = "You answer questions about the document below, in one short sentence."


class Message(TypedDict):
    """One message as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Question:
    """A question and a word its right answer contains (case aside); None where no answer is known."""

    text: str
    expected: str | None = None

    def is_answered_by(self, answer: str) -> bool | None:
        """Whether the answer has the expected word; None if nothing is expected."""
        return None if self.expected is None else self.expected.lower() in answer.lower()


@dataclass(frozen=True, slots=True)
class Document:
    """A text and the questions asked about it."""

    text: str
    system_prompt: str
    questions: tuple[Question, ...]

    def asking(self, questions: Sequence[str]) -> Document:
        """The same text with other questions."""
        return replace(self, questions=tuple(Question(question) for question in questions))

    def messages(self, question: str) -> list[Message]:
        """The chat that asks one question. All questions share everything up to their own text, which is what a cache reuses."""
        return [
            Message(role="system", content=self.system_prompt),
            Message(role="user", content=f"{self.text}\n\nQuestion: {question}"),
        ]


HANDBOOK_QUESTIONS: Final = (
    Question("In which year was the Skerry Sound Ferry Service founded?", "1887"),
    Question("Where is the lost property office?", "Brannoch"),
    Question("What is the speed limit in the harbour of Aldhaven?", "five knots"),
)
GENERIC_QUESTIONS: Final = (
    Question("What is this document about?"),
    Question("Which name is mentioned first?"),
    Question("What is the most important number in it?"),
)


def handbook() -> Document:
    """The demo's own document."""
    return Document(_read("document.txt"), SYSTEM_PROMPT, HANDBOOK_QUESTIONS)


def document_of(text: str, questions: Sequence[str] = ()) -> Document:
    """A reader's own text, with their questions or three that fit any text."""
    asked = tuple(Question(question) for question in questions)
    return Document(text.strip(), GENERIC_SYSTEM_PROMPT, asked or GENERIC_QUESTIONS)


def dialogue() -> tuple[str, ...]:
    """What the customer says, turn by turn, in a conversation that starts with the handbook; ten turns."""
    return tuple(_read("dialogue.txt").splitlines())


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8").strip()
