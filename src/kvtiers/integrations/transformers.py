"""Hugging Face transformers on top of the cache: prefill with reuse for one sequence at a time.

    with CachedCausalLM.from_pretrained(directory, config) as lm:
        prefill = lm.prefill(token_ids)                  # loads the longest cached prefix, computes the rest
        tokens = lm.generate(prefill, max_new_tokens=64) # greedy, or bring your own `pick`
        lm.store(prefill)                                # keeps the new full chunks, those of generated tokens too

The order is the point: the first token comes before anything is stored. All runs on the caller's thread but the copying out of
the cache. Of a prompt that is cached as a whole the last token is computed again, because its logits are needed.

Split.CHUNKS computes a prompt chunk by chunk, so that a pass has the same shape whether what lies before it was computed or
loaded: then a cached and an uncached run agree to the bit, unless only that last token is left. Split.WHOLE is one pass over
whatever is not cached; its sums may round differently. What was measured: docs/decisions/transformers.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers import __version__ as transformers_version
from transformers.cache_utils import DynamicLayer

from kvtiers.config import CacheConfig
from kvtiers.memory.cuda import bytes_tensor
from kvtiers.model.errors import DeadlineExceeded, KvtiersError, LayoutMismatch
from kvtiers.model.layout import KVLayout
from kvtiers.model.namespace import Namespace
from kvtiers.model.reasons import MissReason, Refusal
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.results import StoreReceipt

Pick = Callable[[torch.Tensor], int]
"""Chooses a token from logits `[vocabulary]`."""

_LATENT: Final = ("kv_lora_rank", "v_head_dim")
"""Config keys of latent attention (MLA), whose cached keys and values are not two planes of one head size."""


_NOTHING: Final[tuple[int, tuple[Tier, ...], MissReason | None]] = (0, (), None)


_FIXED_ROPE = frozenset({"default", "linear", "llama3", "yarn", "mrope"})
"""Rotary types whose angles depend on a token's position alone. `dynamic` and `longrope` depend on the sequence's length."""


class UnsupportedModel(KvtiersError):
    """The model keeps its KV in a way this integration can't cache."""


class Split(Enum):
    """How a prompt is cut into forward passes."""

    CHUNKS = "chunks"
    WHOLE = "whole"


class Reuse(Enum):
    """Whether a prefill looks into the cache."""

    LOAD = "load"
    RECOMPUTE = "recompute"


@dataclass(slots=True)
class Prefill:
    """A sequence whose KV is complete up to `tokens` but the last one generated."""

    tokens: list[int]
    """Prompt, and what was generated since."""
    past: DynamicCache
    logits: torch.Tensor
    """Of the last prompt token, `[vocabulary]`."""
    prompt_tokens: int
    reused_tokens: int
    """Prompt tokens whose KV was loaded."""
    tiers: tuple[Tier, ...]
    """Where each loaded chunk came from."""
    stopped_by: MissReason | None
    """Why not more was loaded."""
    load_seconds: float
    compute_seconds: float
    salt: str | None = None
    tenant: str | None = None
    stored_tokens: int = field(default=0)
    """Tokens known to be cached: loaded or stored."""

    @property
    def seconds(self) -> float:
        """Time to the first token's logits."""
        return self.load_seconds + self.compute_seconds


class CachedCausalLM:
    """A causal language model whose prefills go through a `TieredCache`."""

    def __init__(self, model: PreTrainedModel, cache: TieredCache, *, split: Split = Split.CHUNKS) -> None:
        """Raises LayoutMismatch if the cache's layout is not the model's, UnsupportedModel for sliding or hybrid attention."""
        layout = layout_of(model)
        if layout != cache.layout:
            raise LayoutMismatch(
                f"the model's KV is {layout.describe()}, the cache's {cache.layout.describe()}"
            )
        self.model = model.eval()
        self.cache = cache
        self.split = split

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        config: CacheConfig,
        *,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
        split: Split = Split.CHUNKS,
        node: CacheNode | None = None,
    ) -> Self:
        """Model directory → model and cache, namespace and layout included. Close it when done, or use it in `with`."""
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
        namespace = namespace_of(model, path)
        return cls(model, TieredCache(config, layout_of(model), namespace, node=node), split=split)

    @torch.inference_mode()
    def prefill(
        self,
        token_ids: Sequence[int] | torch.Tensor,
        *,
        salt: str | None = None,
        tenant: str | None = None,
        reuse: Reuse = Reuse.LOAD,
    ) -> Prefill:
        """KV and next-token logits of a prompt: the cached prefix is loaded, the rest computed.

        `token_ids`: a flat sequence, or a tensor `[tokens]` or `[1, tokens]`. Raises LayoutMismatch for a batch or an empty
        prompt, CacheClosed; a cache that fails only makes `reused_tokens` smaller.
        """
        tokens = _token_list(token_ids)
        started = time.perf_counter()
        past = DynamicCache(config=self.model.config)
        reused, tiers, reason = _NOTHING
        if reuse is Reuse.LOAD:
            reused, tiers, reason = self._load(tokens, past, salt)
        loaded = time.perf_counter()
        logits = self._compute(tokens, reused, past)
        ended = time.perf_counter()
        return Prefill(
            tokens=tokens,
            past=past,
            logits=logits,
            prompt_tokens=len(tokens),
            reused_tokens=reused,
            tiers=tiers,
            stopped_by=reason,
            load_seconds=loaded - started,
            compute_seconds=ended - loaded,
            salt=salt,
            tenant=tenant,
            stored_tokens=len(tiers) * self.cache.chunk_tokens,
        )

    @torch.inference_mode()
    def generate(
        self,
        prefill: Prefill,
        *,
        max_new_tokens: int,
        stop: Sequence[int] | None = None,
        pick: Pick | None = None,
    ) -> list[int]:
        """Continue a sequence; returns the new tokens, which are also appended to `prefill.tokens`.

        Greedy unless `pick` says otherwise; ends at a token of `stop` (default: the model's own), which is kept. Called again
        it goes on where it ended.
        """
        stops = set(_stops_of(self.model) if stop is None else stop)
        choose = pick or _greedy
        new: list[int] = []
        logits: torch.Tensor | None = None if prefill.tokens[prefill.prompt_tokens :] else prefill.logits
        while len(new) < max_new_tokens:
            if logits is None:
                logits = self._forward(prefill.tokens[prefill.past.get_seq_length() :], prefill.past)
            token = choose(logits)
            logits = None
            new.append(token)
            prefill.tokens.append(token)
            if token in stops:
                break
        return new

    def store(self, prefill: Prefill) -> StoreReceipt:
        """Keep the KV of the sequence's full chunks that are not cached yet; returns when it has been copied."""
        receipt = self._store_from(prefill, prefill.stored_tokens)
        if receipt.refusal is Refusal.CHAIN_BROKEN and prefill.stored_tokens:
            receipt = self._store_from(prefill, 0)  # what was loaded has been evicted since
        if receipt.refusal is None:
            computed = prefill.past.get_seq_length()
            prefill.stored_tokens = computed // self.cache.chunk_tokens * self.cache.chunk_tokens
        return receipt

    def close(self) -> None:
        """Close the cache."""
        self.cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- inside -------------------------------------------------------------------------------------------------------

    def _load(
        self, tokens: list[int], past: DynamicCache, salt: str | None
    ) -> tuple[int, tuple[Tier, ...], MissReason | None]:
        layout, step = self.cache.layout, self.cache.chunk_tokens
        shape = layout.shape(len(tokens) // step * step)
        # On a CPU the cache's own fresh memory is the faster target: numpy backs it with huge pages where the system has them.
        device = self.model.device
        into = None if device.type == "cpu" else torch.empty(shape, dtype=self.model.dtype, device=device)
        try:
            loaded = self.cache.load(tokens, into=into, salt=salt).result()
        except DeadlineExceeded:
            return 0, (), MissReason.STAGING_TIMEOUT
        reused = min(loaded.num_tokens, len(tokens) - 1)
        if reused:
            kv = bytes_tensor(loaded.kv, self.model.dtype) if into is None else into
            _fill(past, kv[:, :, :reused])
        return reused, loaded.tiers, loaded.stopped_by

    def _compute(self, tokens: list[int], start: int, past: DynamicCache) -> torch.Tensor:
        step = self.cache.chunk_tokens if self.split is Split.CHUNKS else len(tokens)
        logits: torch.Tensor | None = None
        while start < len(tokens):
            end = min(len(tokens), (start // step + 1) * step)
            logits = self._forward(tokens[start:end], past)
            start = end
        assert logits is not None  # at least the last token is computed
        return logits

    def _forward(self, tokens: list[int], past: DynamicCache) -> torch.Tensor:
        ids = torch.tensor([tokens], device=self.model.device)
        output = self.model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def _store_from(self, prefill: Prefill, start: int) -> StoreReceipt:
        tokens = prefill.tokens[: prefill.past.get_seq_length()]
        kv = [(_plane(layer.keys)[start:], _plane(layer.values)[start:]) for layer in prefill.past.layers]
        return self.cache.store(tokens, kv, start=start, salt=prefill.salt, tenant=prefill.tenant)


def layout_of(model: PreTrainedModel) -> KVLayout:
    """The KV layout of a model with plain (multi-head or grouped-query) attention in every layer.

    Raises UnsupportedModel for sliding-window, hybrid and latent attention, which transformers caches in other shapes.
    """
    config: Any = model.config.get_text_config(decoder=True)
    kinds = sorted({type(layer).__name__ for layer in DynamicCache(config=config).layers})
    count = len(DynamicCache(config=config).layers)
    if kinds != [DynamicLayer.__name__] or count != config.num_hidden_layers:
        raise UnsupportedModel(
            f"{type(model).__name__} keeps the KV of its {config.num_hidden_layers} layers in {count} of kind "
            f"{', '.join(kinds)}; only full attention with a cache of its own in every layer can be cached here"
        )
    moving = sorted(_rope_types(config) - _FIXED_ROPE)
    if moving:
        raise UnsupportedModel(
            f"{type(model).__name__} has rotary embeddings of type {', '.join(moving)}, which rotate a token's key by the "
            "length of the whole sequence: its KV does not depend on the prefix alone, so it can't be reused"
        )
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    latent = [
        name for name in _LATENT if (value := getattr(config, name, None)) is not None and value != head_dim
    ]
    if latent:
        raise UnsupportedModel(
            f"{type(model).__name__} has latent attention ({', '.join(latent)} in its config), which transformers "
            "caches with keys and values of different sizes"
        )
    return KVLayout(
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        dtype=str(model.dtype).removeprefix("torch."),
    )


def _rope_types(config: Any) -> set[str]:
    """Every rotary type a config names, also per kind of layer (`rope_parameters`, formerly `rope_scaling`)."""
    found: set[str] = set()
    todo = [getattr(config, "rope_parameters", None), getattr(config, "rope_scaling", None)]
    while todo:
        settings = todo.pop()
        if not isinstance(settings, dict):
            continue
        found.update(
            str(settings[name]) for name in ("rope_type", "type") if isinstance(settings.get(name), str)
        )
        todo.extend(settings.values())
    return found


def namespace_of(model: PreTrainedModel, path: str | Path) -> Namespace:
    """The namespace of a model loaded from directory `path`: weights, versions, attention and rotary settings."""
    config: Any = model.config.get_text_config(decoder=True)
    return Namespace.for_model(
        path,
        engine="transformers",
        engine_version=f"{transformers_version}+torch{torch.__version__}",
        attention_backend=str(getattr(config, "_attn_implementation", "")),
        physical_layout="tokens,heads,dim",
        quantization=str(getattr(config, "quantization_config", "") or ""),
        rope=repr(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)),
    )


def _token_list(token_ids: Sequence[int] | torch.Tensor) -> list[int]:
    if isinstance(token_ids, torch.Tensor):
        shape = tuple(token_ids.shape)
        if len(shape) != 1 and shape[:-1] != (1,):
            raise LayoutMismatch(f"one sequence at a time: token ids of shape {shape}")
        tokens: list[int] = token_ids.reshape(-1).tolist()
    else:
        try:
            tokens = [int(token) for token in token_ids]
        except (TypeError, ValueError):
            raise LayoutMismatch(
                "one sequence at a time: token ids must be a flat sequence of integers"
            ) from None
    if not tokens:
        raise LayoutMismatch("a prompt has at least one token")
    return tokens


def _fill(past: DynamicCache, kv: torch.Tensor) -> None:
    """Make `kv` `[layers, 2, tokens, heads, dim]` the content of a fresh cache, uncopied: its first `update` copies anyway."""
    for layer, (keys, values) in zip(past.layers, kv.transpose(2, 3).unsqueeze(2), strict=True):
        layer.lazy_initialization(keys, values)
        layer.keys, layer.values = keys, values


def _plane(states: torch.Tensor) -> torch.Tensor:
    """`[1, heads, tokens, dim]` seen as `[tokens, heads, dim]`."""
    if states.shape[0] != 1:
        raise LayoutMismatch(f"one sequence at a time: the batch has {states.shape[0]}")
    return states[0].transpose(0, 1)


def _greedy(logits: torch.Tensor) -> int:
    return int(logits.argmax())


def _stops_of(model: PreTrainedModel) -> list[int]:
    stops = model.generation_config.eos_token_id if model.generation_config is not None else None
    if stops is None:
        return []
    return list(stops) if isinstance(stops, list | tuple) else [int(stops)]
