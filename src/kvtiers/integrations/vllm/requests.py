"""What is known of one request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, NamedTuple, Protocol

from kvtiers.integrations.vllm.adapters import Asked
from kvtiers.model.tiers import Tier
from kvtiers.node.handles import Load

_MOST_TENANT_LETTERS: Final = 64
_NO: Final = ("", "false", "0", "no", "off", "none")


class Request(Protocol):
    """A `vllm.v1.request.Request`, as far as it is looked at."""

    request_id: str
    num_tokens: int
    num_computed_tokens: int
    num_output_placeholders: int
    block_hashes: Sequence[bytes]
    skip_reading_prefix_cache: bool
    kv_transfer_params: Mapping[str, Any] | None
    lora_request: Any | None


class Phase(Enum):
    """How far a request's load is."""

    NEW = "new"
    """Nothing was asked for it yet."""
    STAGING = "staging"
    """Its chunks are looked up and leased, or are being brought to the arena."""
    LOADING = "loading"
    """Workers copy into its blocks."""
    DONE = "done"
    """It has blocks, with or without a load; if it is asked about again it was preempted, or its load failed."""


@dataclass(slots=True)
class RequestState:
    """One request of the engine's."""

    request: Request
    epoch: int
    may_load: bool = True
    may_store: bool = True
    phase: Phase = Phase.NEW
    load: Load | None = None
    """Leases on chunks in the arena; None while there are none."""
    staged_at: float = 0.0
    """When that was asked for."""
    staged_again: bool = False
    """Whether it was asked for once more after a miss that may have passed."""
    first: int = 0
    """The chunk that what is staged begins with: those before it are the engine's own."""
    asked_tokens: int = 0
    """Tokens that were looked up for it, each counted once until it is preempted."""
    counted: bool = False
    """Whether what the engine has itself was told to the operator."""
    tenant: str = ""
    adapter: bytes | None = b""
    """What stands for its LoRA adapter in its keys. None: not known yet, and it is not cached until then."""
    asked: Asked | None = None
    """Whether its adapter's files are what they were; None once that was answered."""
    until: float | None = None
    """When it stops waiting for its turn's answer; None while it does not wait."""
    local_tokens: int = 0
    """Tokens that the engine's own blocks had when it asked last."""
    offered: int = 0
    """Chunks from the start that were offered to the cache, came from it, or are taken to be there."""
    taken_as_kept: bool = False
    """Whether some of them were not offered by this request: if the cache lacks them, they are."""
    sources: tuple[Tier, ...] = ()
    """Where the chunks of its last load came from, from `first` on."""
    loading_tokens: int = 0
    """Of its load that is under way."""
    load_failed: bool = False
    """Not tried again: it would fail again."""


class Wishes(NamedTuple):
    """What a request's `kv_transfer_params` say: `{"kvtiers.no_load": true, "kvtiers.no_store": true, "kvtiers.tenant": "a name"}`."""

    may_load: bool
    may_store: bool
    tenant: str

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> Wishes:
        """Nothing said: it may load and store, and is nobody's."""
        params = params or {}

        def says(name: str) -> bool:
            return str(params.get(name) or "").strip().lower() not in _NO  # what is not understood is kept to

        tenant = str(params.get("kvtiers.tenant", ""))[:_MOST_TENANT_LETTERS]
        return cls(not says("kvtiers.no_load"), not says("kvtiers.no_store"), tenant)
