"""kvtiers' side of the faults: what `lmcache_worker.py` is for the peer, through the public API of `TieredCache`.

    {"op": "open", "shape", "chunks", "directory"}  → {}
    {"op": "keep", "prompt", "patience_s"}          → {"tokens"}                   of the prompt that lie on disk in that time
    {"op": "serve", "prompt"}                       → {"tokens", "wrong_chunks"}   from disk
    {"op": "state"}                                 → {"unfinished", "held_bytes", "disk_bytes"}
    {"op": "close"}                                 → {}

A prompt is a number; its token ids and KV follow from it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from kvtiers import CacheConfig, KVLayout, Namespace, TieredCache
from kvtiers.model.errors import KvtiersError

_PROMPTS_IN_MEMORY = 3
_LOAD_PATIENCE_S = 60.0


class Worker:
    """One cache, on one directory."""

    def __init__(self) -> None:
        self._cache: TieredCache | None = None
        self._chunks = 0

    @property
    def cache(self) -> TieredCache:
        """The one that was opened."""
        assert self._cache is not None, "open comes first"
        return self._cache

    def do_hello(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": "kvtiers", "variants": {"disk": [""]}}

    def do_open(self, request: Mapping[str, Any]) -> None:
        shape = request["shape"]
        layout = KVLayout(shape["num_layers"], shape["num_kv_heads"], shape["head_dim"], shape["dtype"])
        self._chunks = request["chunks"]
        prompt_bytes = self._chunks * layout.nbytes(shape["chunk_tokens"])
        storage = {
            "chunk_tokens": shape["chunk_tokens"],
            # A whole prompt is staged at once, and as much is kept.
            "cpu": {"buffer_size": 2 * _PROMPTS_IN_MEMORY * prompt_bytes, "eviction_threshold": 0.5},
            "disk": {"enabled": True, "path": request["directory"], "min_free_space": 0},
        }
        config = CacheConfig.from_mapping(
            {"storage": storage, "async": {"load_timeout_ms": _LOAD_PATIENCE_S * 1000}}, environ={}
        )
        self._cache = TieredCache(config, layout, Namespace("faults", fingerprint="random KV", engine="none"))

    def do_keep(self, request: Mapping[str, Any]) -> dict[str, Any]:
        token_ids, kv = self._prompt(request)
        self.cache.store(token_ids, kv)
        with suppress(KvtiersError):  # what is not written by then does not count
            self.cache.flush(request["patience_s"])
        self.cache.evict("cpu")
        return {"tokens": self.cache.lookup(token_ids).num_tokens}

    def do_serve(self, request: Mapping[str, Any]) -> dict[str, Any]:
        token_ids, kv = self._prompt(request)
        self.cache.evict("cpu")
        into = np.zeros_like(kv)
        tokens = self.cache.load(token_ids, into=into).result(_LOAD_PATIENCE_S).num_tokens
        step = self.cache.chunk_tokens
        wrong = sum(
            not np.array_equal(into[:, :, at : at + step], kv[:, :, at : at + step])
            for at in range(0, tokens, step)
        )
        return {"tokens": tokens, "wrong_chunks": wrong}

    def do_state(self, _: Mapping[str, Any]) -> dict[str, int]:
        self.cache.evict("cpu")
        stats = self.cache.stats()
        cpu, disk = stats["tiers"]["cpu"], stats["tiers"]["disk"]
        return {
            "unfinished": stats["operations"],
            "held_bytes": cpu["write_leased_bytes"] + cpu["staged_bytes"],
            "disk_bytes": disk["usage_bytes"],
        }

    def close(self) -> None:
        """If it is open."""
        if self._cache is not None:
            self._cache.close()

    def _prompt(self, request: Mapping[str, Any]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint16]]:
        number, tokens = request["prompt"], self._chunks * self.cache.chunk_tokens
        token_ids = np.arange(tokens, dtype=np.uint32)
        token_ids[0] = 1_000_000 + number
        size = self.cache.layout.shape(tokens)
        return token_ids, np.random.default_rng(number).integers(0, 1 << 16, size, dtype=np.uint16)


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.peers.json_lines import answer_requests

    worker = Worker()
    answer_requests(worker, worker.close)
