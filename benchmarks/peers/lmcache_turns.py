"""What LMCache is asked for in turn: a prompt stored, the same loaded, a lookup. Runs in the peer's interpreter."""

from __future__ import annotations

import gc
import importlib.metadata
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers.lmcache_in_process import InProcess
from benchmarks.peers.lmcache_multi_process import MultiProcess
from benchmarks.peers.peer_work import (
    LOOKUP_SHAPE,
    PeerError,
    Prompt,
    Shape,
    StoragePath,
    drop_page_cache,
    same_bits,
    seconds_of,
    wrong_chunks,
)

_MIB = 1 << 20
_IN_PROCESS = "in-process"
_ADAPTERS = ("fs", "fs_native", "fs_native O_DIRECT")
VARIANTS: dict[str, list[str]] = {
    "cpu": [_IN_PROCESS, "MP"],
    "disk": [_IN_PROCESS, *(f"MP {adapter}" for adapter in _ADAPTERS)],
    "redis": [_IN_PROCESS, "MP resp"],
    "lookup": [_IN_PROCESS, "MP"],
}
_PROMPTS_IN_MEMORY = 2.25
"""The last one and the next, and L1 does not begin to evict."""
_NO_LIMIT = 1 << 40
"""Of the disk: prompts are discarded here, and the in-process path never gives back what it counted for them."""
_PATIENCE_S = 60.0


class Turns:
    """One variant at one shape: prompts stored one after another, the last one loaded."""

    def __init__(self, path: StoragePath, kv: torch.Tensor, into: torch.Tensor, prompt: Prompt) -> None:
        """`prompt`: before the first. All have the same KV."""
        self.path = path
        self._kv, self._into = kv, into
        self._prompt = prompt
        self._is_checked = False

    def store(self) -> dict[str, Any]:
        last = self._prompt
        self.path.discard(last)
        self._prompt = prompt = Prompt.numbered(last.number + 1, last.chunks, last.shape)
        kept = 0

        def store() -> None:
            nonlocal kept
            kept = self.path.store(prompt, self._kv, patience_s=_PATIENCE_S)

        seconds = seconds_of(store)
        self._check("kept", kept)
        return {"seconds": seconds, "bytes": prompt.nbytes}

    def load(self, *, from_memory: bool, hot: bool) -> dict[str, Any]:
        if not from_memory:
            self.path.forget_memory()
            if not hot:
                drop_page_cache(self.path.files())
        if not self._is_checked:
            self._into.zero_()
        loaded = 0

        def load() -> None:
            nonlocal loaded
            loaded = self.path.load(self._prompt, self._into)

        seconds = seconds_of(load)
        self._check("loaded", loaded)
        if not self._is_checked and not same_bits(self._into, self._kv):
            raise PeerError("what was loaded is not what was stored")
        self._is_checked = True
        return {"seconds": seconds, "bytes": self._prompt.nbytes}

    def _check(self, what: str, tokens: int) -> None:
        expected = len(self._prompt.token_ids)
        if tokens != expected:
            raise PeerError(f"{tokens} of {expected} tokens were {what}")


class Worker:
    """Answers requests. What a variant needs is made at its first turn."""

    def __init__(self) -> None:
        self._template = Prompt.numbered(0, 1, LOOKUP_SHAPE)
        self._kv = self._template.kv()
        self._into = torch.zeros_like(self._kv)
        self._directory = Path()
        self._endpoint = ""
        self._turns: dict[tuple[str, str], Turns] = {}
        self._lookups: dict[tuple[str, int], StoragePath] = {}

    def do_hello(self, _: Mapping[str, Any]) -> dict[str, Any]:
        return {"name": f"LMCache {importlib.metadata.version('lmcache')}", "variants": VARIANTS}

    def do_open(self, request: Mapping[str, Any]) -> dict[str, Any]:
        for tier, variant in self._close_turns():
            if tier == "disk":
                shutil.rmtree(self._place(variant))
        shape = request["shape"]
        if shape["dtype"] != "bfloat16":
            raise PeerError(f"only bfloat16 is compared, not {shape['dtype']}")
        sizes = Shape(shape["num_layers"], shape["num_kv_heads"], shape["head_dim"], shape["chunk_tokens"])
        self._template = Prompt.numbered(0, request["chunks"], sizes)
        self._kv = self._template.kv()
        self._into = torch.zeros_like(self._kv)
        self._directory = Path(request["directory"])
        self._endpoint = request.get("endpoint", "")
        return {}

    def do_store(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return self._turns_of(request["tier"], request["variant"]).store()

    def do_load(self, request: Mapping[str, Any]) -> dict[str, Any]:
        turns = self._turns_of(request["tier"], request["variant"])
        return turns.load(from_memory=request["tier"] == "cpu", hot=request.get("hot", False))

    def do_lookup(self, request: Mapping[str, Any]) -> dict[str, Any]:
        chunks = request["tokens"] // LOOKUP_SHAPE.chunk_tokens
        path = self._lookup_path(request["variant"], chunks)
        token_ids = Prompt.numbered(1 if request["hit"] else 2, chunks, LOOKUP_SHAPE).token_ids
        found = 0

        def lookup() -> None:
            nonlocal found
            found = path.lookup(token_ids)

        seconds = seconds_of(lookup)
        if found != (len(token_ids) if request["hit"] else 0):
            raise PeerError(f"a lookup found {found} of {len(token_ids)} tokens")
        return {"seconds": seconds}

    def do_keep(self, request: Mapping[str, Any]) -> dict[str, Any]:
        prompt = self._numbered(request)
        path = self._turns_of("disk", request["variant"]).path
        return {"tokens": path.store(prompt, prompt.kv(), patience_s=request["patience_s"])}

    def do_serve(self, request: Mapping[str, Any]) -> dict[str, Any]:
        prompt = self._numbered(request)
        path = self._turns_of("disk", request["variant"]).path
        path.forget_memory()
        into = torch.zeros_like(prompt.kv())
        tokens = path.load(prompt, into)
        return {"tokens": tokens, "wrong_chunks": wrong_chunks(prompt, into, tokens)}

    def do_state(self, request: Mapping[str, Any]) -> dict[str, Any]:
        return dict(self._turns_of("disk", request["variant"]).path.state())

    def close(self) -> None:
        """Everything that is open. Files stay."""
        self._close_turns()
        for path in self._lookups.values():
            path.close()

    def _turns_of(self, tier: str, variant: str) -> Turns:
        if (tier, variant) not in self._turns:
            place = self._place(variant) if tier == "disk" else None
            endpoint = self._endpoint if tier == "redis" else ""
            path = self._open(self._template.shape, self._template.chunks, variant, place, endpoint)
            self._turns[tier, variant] = Turns(path, self._kv, self._into, self._template)
        return self._turns[tier, variant]

    def _lookup_path(self, variant: str, chunks: int) -> StoragePath:
        if (variant, chunks) not in self._lookups:
            path = self._lookups[variant, chunks] = self._open(LOOKUP_SHAPE, chunks, variant, None)
            prompt = Prompt.numbered(1, chunks, LOOKUP_SHAPE)
            path.store(prompt, prompt.kv(), patience_s=_PATIENCE_S)
        return self._lookups[variant, chunks]

    def _open(
        self, shape: Shape, chunks: int, variant: str, directory: Path | None, endpoint: str = ""
    ) -> StoragePath:
        if all(variant not in known for known in VARIANTS.values()):
            raise PeerError(f"there is no such way: {variant}")
        memory_bytes = int(_PROMPTS_IN_MEMORY * chunks * shape.chunk_bytes) + 16 * _MIB
        if directory is not None:
            directory.mkdir(parents=True, exist_ok=True)
        if variant == _IN_PROCESS:
            url = f"redis://{endpoint}" if endpoint else ""
            return InProcess(shape, memory_bytes, directory, _NO_LIMIT, remote_url=url)
        adapter = variant.removeprefix("MP").strip()
        return MultiProcess(shape, memory_bytes, directory, adapter, endpoint=endpoint)

    def _numbered(self, request: Mapping[str, Any]) -> Prompt:
        return Prompt.numbered(request["prompt"], self._template.chunks, self._template.shape)

    def _place(self, variant: str) -> Path:
        return self._directory / variant.replace(" ", "-")

    def _close_turns(self) -> list[tuple[str, str]]:
        """Those that were open."""
        closed = list(self._turns)
        for turns in self._turns.values():
            turns.path.close()
        self._turns.clear()
        gc.collect()
        return closed
