"""What the demo was asked for, and the one error that says everything wrong with it.

Checked in two steps: what can be told at once (files, the document, the output directory) before the model is converted or
loaded, the rest when its tokenizer and its KV are known.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Final

from kvtiers.model.errors import ConfigError
from kvtiers.ops.demo.document import Document, dialogue, document_of, handbook
from kvtiers.ops.engines import startable, why_not
from kvtiers.runtime.remote_plan import BACKENDS

MAX_DOCUMENT_BYTES: Final = 16 << 20
"""Far more than any model reads; keeps a mistaken --document from being tokenized for minutes."""
_WEIGHTS: Final = (".safetensors", ".bin")
_ALSO_CALLED: Final = {
    "valkey": "redis",
    "dragonfly": "redis",
    "kvrocks": "redis",
    "minio": "s3",
    "seaweedfs": "s3",
    "nfs": "fs",
    "directory": "fs",
}


class BadOption(ConfigError):
    """The demo can't do what its options ask; `problems` says what to change."""

    def __init__(self, problems: Sequence[str], *, source: str = "kvtiers demo") -> None:
        super().__init__(problems, source=source)


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """As the command line has them; None where the demo decides."""

    model: Path | None = None
    document: Path | None = None
    questions: tuple[str, ...] = ()
    turns: int | None = None
    """Length of the conversation; None: questions, each answered from every tier."""
    output: Path = Path("demo-output")
    config: Path | None = None
    chunk_tokens: int | None = None
    max_new_tokens: int = 40
    threads: int | None = None
    remote: str | None = None
    """Backend of a remote store that a second instance loads from."""
    endpoint: str | None = None
    """Where that is; None: the demo starts one of its own."""


def read_material(options: DemoOptions) -> Document:
    """The document with its questions. Raises BadOption with all that is wrong with the files and directories named."""
    problems = [
        *_model_problems(options.model),
        *_output_problems(options.output),
        *_remote_problems(options),
    ]
    if any(not question.strip() for question in options.questions):
        problems.append("--question is empty")
    document = handbook()
    if options.document is not None:
        text = _read(options.document, problems)
        document = document_of(text, options.questions)
    elif options.questions:
        document = document.asking(options.questions)
    if problems:
        raise BadOption(problems)
    return document


def turns_of(options: DemoOptions, document: Document) -> list[str]:
    """What the user says, turn by turn: the scripted dialogue about the handbook, else the questions; from the start again if
    there are more turns than that.
    """
    own = options.document is None and not options.questions
    lines = dialogue() if own else tuple(question.text for question in document.questions)
    return [lines[turn % len(lines)] for turn in range(options.turns or 0)]


def default_threads() -> int:
    """The cores this process may use."""
    return len(os.sched_getaffinity(0))


def _model_problems(model: Path | None) -> list[str]:
    if model is None:
        return []
    if not model.is_dir():
        return [f"--model {model}: no such directory"]
    if not (model / "config.json").is_file():
        return [f"--model {model}: there is no config.json; give the directory of a transformers model"]
    if not any(file.suffix in _WEIGHTS for file in model.iterdir()):
        return [f"--model {model}: there are no weights ({', '.join(_WEIGHTS)})"]
    return []


def _remote_problems(options: DemoOptions) -> list[str]:
    name = options.remote
    if name is None:
        return ["--endpoint: of which store? Give --remote as well"] if options.endpoint else []
    if options.turns is not None:
        return ["--remote: a conversation is held by one instance; leave --turns out"]
    known = sorted({*BACKENDS, *startable()})
    if name not in known:
        near = get_close_matches(name.lower(), [*known, *_ALSO_CALLED], n=1)
        meant = f"did you mean {_ALSO_CALLED.get(near[0], near[0])}? " if near else ""
        return [f"--remote {name}: {meant}There are {', '.join(known)}"]
    reason = None if options.endpoint else why_not(name)
    return [] if reason is None else [f"--remote {reason}"]


def _output_problems(output: Path) -> list[str]:
    nearest = next(path for path in (output.absolute(), *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        return [f"--output {output}: {nearest} is not a directory"]
    if not os.access(nearest, os.W_OK | os.X_OK):
        return [f"--output {output}: {nearest} can't be written to"]
    return []


def _read(path: Path, problems: list[str]) -> str:
    try:
        if path.stat().st_size > MAX_DOCUMENT_BYTES:
            problems.append(
                f"--document {path}: larger than {MAX_DOCUMENT_BYTES >> 20} MiB, no model reads that"
            )
            return ""
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        problems.append(f"--document {path}: not a UTF-8 text")
        return ""
    except OSError as error:
        problems.append(f"--document {path}: {error.strerror or error}")
        return ""
    if not text.strip():
        problems.append(f"--document {path}: it is empty")
    return text
