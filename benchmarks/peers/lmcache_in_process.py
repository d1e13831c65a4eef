"""LMCache inside the engine's process: its `LMCacheEngine` with the CPU backend, and the disk or Redis backend beneath it.

The whole of its path is timed: hashing, allocation, copy, bookkeeping, write. Only the GPU is left out: the connector, which
is the engine's part, copies between the engine's KV in host memory and LMCache's buffers.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import gc
import itertools
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers.peer_work import PeerError, Prompt, Shape, chunk_of, wait_until
from lmcache.v1.cache_engine import LMCacheEngine
from lmcache.v1.config import LMCacheEngineConfig
from lmcache.v1.gpu_connector.gpu_connectors import GPUConnectorInterface
from lmcache.v1.metadata import LMCacheMetadata
from lmcache.v1.token_database import ChunkedTokenDatabase

_GIB = 1 << 30
_FORGET_PATIENCE_S = 10.0


class InProcess:
    """A `StoragePath`."""

    def __init__(
        self,
        shape: Shape,
        memory_bytes: int,
        directory: Path | None,
        disk_bytes: int = 0,
        *,
        remote_url: str = "",
    ) -> None:
        """Without a directory and a `remote_url` the CPU backend is alone."""
        values: dict[str, Any] = {
            "chunk_size": shape.chunk_tokens,
            "local_cpu": True,
            "max_local_cpu_size": memory_bytes / _GIB,
        }
        if directory is not None:
            values |= {"local_disk": str(directory), "max_local_disk_size": disk_bytes / _GIB}
        if remote_url:
            values |= {"remote_url": remote_url, "remote_serde": "naive"}
        config = LMCacheEngineConfig.from_dict(values)
        metadata = LMCacheMetadata(
            model_name="benchmark",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=torch.bfloat16,
            kv_shape=(shape.num_layers, 2, shape.chunk_tokens, shape.num_kv_heads, shape.head_dim),
        )
        self._tokens = ChunkedTokenDatabase(config, metadata)
        self._engine = LMCacheEngine(
            config, metadata, self._tokens, _HostConnector(shape), _no_other_rank, _no_other_rank
        )
        self._engine.post_init()
        gc.enable()  # the engine turns it off for the whole process
        self._storage = self._engine.storage_manager
        self._memory = self._storage.storage_backends["LocalCPUBackend"]
        self._disk = self._storage.storage_backends.get("LocalDiskBackend")
        self._remote = self._storage.storage_backends.get("RemoteBackend")
        self._directory = directory
        self._requests = itertools.count()

    def store(self, prompt: Prompt, kv: torch.Tensor, *, patience_s: float) -> int:
        token_ids = prompt.token_ids
        self._engine.store(token_ids, kv=kv, req_id=str(next(self._requests)))
        if self._remote is not None:
            return self._wait_for_remote(token_ids, patience_s)
        if self._disk is None:
            return self.lookup(token_ids)
        wait_until(lambda: not self._disk.disk_worker.put_tasks, patience_s)
        return int(self._engine.lookup(token_ids, search_range=["LocalDiskBackend"]))

    def _wait_for_remote(self, token_ids: list[int], patience_s: float) -> int:
        """Until the server has all of them: its list of puts does not tell when they have ended."""
        deadline = time.perf_counter() + patience_s
        while True:
            kept = int(self._engine.lookup(token_ids, search_range=["RemoteBackend"]))
            if kept == len(token_ids) or time.perf_counter() > deadline:
                return kept
            time.sleep(2e-3)

    def load(self, prompt: Prompt, into: torch.Tensor) -> int:
        hit = self._engine.retrieve(prompt.token_ids, kv=into, req_id=str(next(self._requests)))
        return int(hit.sum())

    def lookup(self, token_ids: list[int]) -> int:
        return int(self._engine.lookup(token_ids))

    def forget_memory(self) -> None:
        self._memory.clear()
        if self._remote is not None:  # what is still being put stays, until it has been

            def empty() -> bool:
                self._memory.clear()
                return not self._memory.hot_cache

            wait_until(empty, _FORGET_PATIENCE_S)

    def discard(self, prompt: Prompt) -> None:
        for _, _, key in self._tokens.process_tokens(prompt.token_ids):
            self._memory.remove(key)  # not in a server: it has no way to
            if self._disk is not None:
                with suppress(FileNotFoundError):
                    self._disk.remove(key)

    def files(self) -> list[Path]:
        return [] if self._directory is None else sorted(self._directory.iterdir())

    def state(self) -> dict[str, int]:
        self._memory.clear()  # what remains is held by someone
        disk = self._disk
        return {
            "unfinished": 0 if disk is None else len(disk.disk_worker.put_tasks),
            "held_bytes": _allocated(self._memory.get_memory_allocator()),
            "disk_bytes": 0 if disk is None else int(disk.usage),
        }

    def close(self) -> None:
        if self._remote is None:  # with one, LMCache 0.5.6 does not come back from it
            self._engine.close()


class _HostConnector(GPUConnectorInterface):  # type: ignore[misc]  # untyped base
    """Between LMCache's buffers and the engine's KV, given as `kv=`."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def from_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        memory_obj.tensor.copy_(chunk_of(kwargs["kv"], start, end))

    def to_gpu(self, memory_obj: Any, start: int, end: int, **kwargs: Any) -> None:
        chunk_of(kwargs["kv"], start, end).copy_(memory_obj.tensor)

    def batched_from_gpu(
        self, memory_objs: list[Any], starts: list[int], ends: list[int], **kwargs: Any
    ) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.from_gpu(memory_obj, start, end, **kwargs)

    def batched_to_gpu(
        self, memory_objs: list[Any], starts: list[int], ends: list[int], **kwargs: Any
    ) -> None:
        for memory_obj, start, end in zip(memory_objs, starts, ends, strict=True):
            self.to_gpu(memory_obj, start, end, **kwargs)

    def get_shape(self, num_tokens: int) -> torch.Size:
        return torch.Size([2, self._shape.num_layers, num_tokens, self._shape.hidden])


def _no_other_rank(*_: object) -> None:
    raise PeerError("one rank has no one to broadcast to")


def _allocated(allocator: Any) -> int:
    """Bytes of its pool that are in use."""
    pool = getattr(allocator, "pin_allocator", allocator)
    return int(pool.total_allocated_size)
