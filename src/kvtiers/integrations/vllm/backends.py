"""The attention backends that an engine's layers really use.

They decide what the bytes of a block mean, and where none is asked for vLLM chooses by itself, in its workers. So each rank says what
its layers got, in the handshake that follows the registration of its memory, and the scheduler's side begins with that.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata


@dataclass(frozen=True)
class RankBackends(KVConnectorHandshakeMetadata):
    """Of one rank: names, each one once."""

    names: tuple[str, ...]


def backends_of(layers: Mapping[str, Any], cached: Iterable[str]) -> RankBackends:
    """Of the layers that have KV. `layers`: all of the model's, by name."""
    found = {layers[name].get_attn_backend().get_name() for name in cached if name in layers}
    return RankBackends(tuple(sorted(found)))


def name_of(ranks: Mapping[int, Any]) -> str:
    """One name for what all ranks said; another connector's metadata, which vLLM may hand out as well, says nothing."""
    names = {name for one in ranks.values() if isinstance(one, RankBackends) for name in one.names}
    return ",".join(sorted(names)) or "unknown"
