"""A model, its tokenizer and a cache, ready to be asked. Every process of the demo begins here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvtiers.config import CacheConfig
from kvtiers.model.errors import KvtiersError
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.chat import Chat
from kvtiers.ops.demo.measure import Run, Source, ask
from kvtiers.ops.demo.options import BadOption

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from kvtiers.integrations.transformers import CachedCausalLM, Prefill

Say = Callable[[str], None]
"""Hears what is being done, a line each."""

_NEEDED = ("torch", "transformers", "safetensors")


class DemoUnavailable(KvtiersError):
    """The libraries the demo runs on are not installed."""


@dataclass(frozen=True, slots=True)
class Work:
    """What each process does, as plain values: it answers `prompts` from its own tiers."""

    model: str
    settings: dict[str, Any]
    device: str
    threads: int
    prompts: tuple[tuple[int, ...], ...]
    tiers: tuple[Tier, ...]
    """Nearest first. A process that answers from one of them only does it from the last."""
    max_new_tokens: int
    salt: str
    """Of this run of the demo only, so that it never meets records of an earlier one, or of others in a store that they share."""


def prepare_libraries(threads: int) -> None:
    """Import torch and transformers, set to `threads` cores and to be quiet. Raises DemoUnavailable."""
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise DemoUnavailable(
            f"the demo needs {', '.join(missing)}: pip install 'kvtiers[demo]' (or run `make demo`, which installs all of it)"
        )
    import torch
    from transformers.utils import logging

    torch.set_num_threads(threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def device() -> str:
    """Where the model runs, and the GPU tier is: "cuda" if there is one, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load_chat(path: Path) -> Chat:
    """Raises BadOption for a directory without a tokenizer."""
    try:
        return Chat.from_pretrained(path)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise BadOption(
            [f"--model {path}: transformers finds no tokenizer there: {_first_line(error)}"]
        ) from error


def load_model(path: Path, where: str) -> PreTrainedModel:
    """In fp32. Raises BadOption for what transformers can't load."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        raise BadOption([f"--model {path}: transformers can't load it: {_first_line(error)}"]) from error
    placed: PreTrainedModel = model.to(where)
    return placed


@dataclass(frozen=True, slots=True)
class Session:
    """A model with its cache, open."""

    lm: CachedCausalLM
    chat: Chat
    work: Work
    say: Say

    def ask(self, number: int, source: Source, prompt: Sequence[int] | None = None) -> tuple[Run, Prefill]:
        """Answer question (or turn) `number`; `prompt`, if it is not one of the work's."""
        return ask(
            self.lm,
            self.chat,
            self.work.prompts[number] if prompt is None else prompt,
            question=number,
            source=source,
            max_new_tokens=self.work.max_new_tokens,
            salt=self.work.salt,
        )

    def move_down(self, target: Tier) -> None:
        """Empty the tiers nearer than `target`; what they held is in the next one when this returns. Raises DeadlineExceeded."""
        cache = self.lm.cache
        cache.flush()
        for tier in self.work.tiers:
            if tier is target:
                return
            cache.evict(tier)
            cache.flush()


def open_session(model: PreTrainedModel, chat: Chat, work: Work, say: Say) -> Session:
    """Open the cache, and warm up: the first pass of a process is slower than all others, whatever it computes."""
    from kvtiers.integrations.transformers import CachedCausalLM, Reuse, layout_of, namespace_of
    from kvtiers.runtime.cache import TieredCache

    config = CacheConfig.from_mapping(work.settings, environ={})
    cache = TieredCache(config, layout_of(model), namespace_of(model, work.model))
    lm = CachedCausalLM(model, cache)
    lm.prefill(work.prompts[0][: config.storage.chunk_tokens + 1], reuse=Reuse.RECOMPUTE)
    return Session(lm, chat, work, say)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
