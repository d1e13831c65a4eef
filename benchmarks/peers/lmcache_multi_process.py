"""LMCache's node server ("MP"): its token hasher, storage manager, L1 memory and L2 adapters, without the socket before them.

Stores and loads take the calls that its request handlers make: hash, reserve, copy, finish; hash, prefetch, wait, read, finish.
What the socket, the session table and the copies by CUDA IPC would add is not timed.
"""

# mypy: disable-error-code="import-not-found"

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from benchmarks.peers.peer_work import PeerError, Prompt, Shape, chunk_of, wait_until
from lmcache.v1.distributed.api import (
    GroupedObjectKeys,
    MemoryLayoutDesc,
    ObjectKey,
    PrefetchTaskSpec,
)
from lmcache.v1.distributed.config import (
    EvictionConfig,
    L1ManagerConfig,
    L1MemoryManagerConfig,
    StorageManagerConfig,
)
from lmcache.v1.distributed.l2_adapters.config import L2AdaptersConfig
from lmcache.v1.distributed.l2_adapters.fs_l2_adapter import FSL2AdapterConfig
from lmcache.v1.distributed.l2_adapters.fs_native_l2_adapter import FSNativeL2AdapterConfig
from lmcache.v1.distributed.l2_adapters.resp_l2_adapter import RESPL2AdapterConfig
from lmcache.v1.distributed.storage_manager import StorageManager
from lmcache.v1.multiprocess.token_hasher import TokenHasher

_PREFETCH_PATIENCE_S = 60.0
_QUIET_S = 0.5
"""An adapter without work for so long will not store what is missing."""
_RANK = ObjectKey.ComputeKVRank(world_size=1, global_rank=0, local_world_size=1, local_rank=0)


class MultiProcess:
    """A `StoragePath`. `adapter`: "", "fs", "fs_native" or "fs_native O_DIRECT"; with an `endpoint` it is "resp"."""

    def __init__(
        self,
        shape: Shape,
        memory_bytes: int,
        directory: Path | None,
        adapter: str = "",
        *,
        endpoint: str = "",
    ) -> None:
        adapters = [] if directory is None else [_adapter_config(adapter, directory)]
        if endpoint:
            host, _, port = endpoint.rpartition(":")
            adapters = [RESPL2AdapterConfig(host, int(port))]
        memory = L1MemoryManagerConfig(size_in_bytes=memory_bytes, use_lazy=False, shm_name="")
        self._storage = StorageManager(
            StorageManagerConfig(
                l1_manager_config=L1ManagerConfig(memory),
                eviction_config=EvictionConfig("LRU", trigger_watermark=0.95),
                l2_adapter_config=L2AdaptersConfig(adapters),
            )
        )
        self._hasher = TokenHasher(shape.chunk_tokens)
        size = torch.Size([2, shape.num_layers, shape.chunk_tokens, shape.hidden])
        self._layout = MemoryLayoutDesc([size], [torch.bfloat16])
        self._chunk_tokens = shape.chunk_tokens
        self._directory = directory
        self._adapter = next((adapter for _, adapter in self._storage.l2_adapters()), None)

    def store(self, prompt: Prompt, kv: torch.Tensor, *, patience_s: float) -> int:
        before = self._disk_bytes()
        keys = self._keys(prompt.token_ids)
        reserved = self._storage.reserve_write(keys, self._layout)
        for number, key in enumerate(keys):
            if key in reserved:
                start = number * self._chunk_tokens
                reserved[key].tensor.copy_(chunk_of(kv, start, start + self._chunk_tokens))
        self._storage.finish_write(list(reserved))
        if self._adapter is None:
            return len(reserved) * self._chunk_tokens
        self._wait_for_adapter(before + len(reserved) * prompt.shape.chunk_bytes, patience_s)
        return (self._disk_bytes() - before) // prompt.shape.chunk_bytes * self._chunk_tokens

    def load(self, prompt: Prompt, into: torch.Tensor) -> int:
        keys = self._prefetch(prompt.token_ids)
        if not keys:
            return 0
        with self._storage.read_prefetched_results(keys) as held:
            if held is None:
                return 0
            for number, memory_obj in enumerate(held):
                start = number * self._chunk_tokens
                chunk_of(into, start, start + self._chunk_tokens).copy_(memory_obj.tensor)
        self._storage.finish_read_prefetched(keys)
        return len(keys) * self._chunk_tokens

    def lookup(self, token_ids: list[int]) -> int:
        keys = self._prefetch(token_ids)
        if keys:
            self._storage.finish_read_prefetched(keys)
        return len(keys) * self._chunk_tokens

    def forget_memory(self) -> None:
        self._storage.clear()

    def discard(self, prompt: Prompt) -> None:
        keys = self._keys(prompt.token_ids)
        self._storage.delete_l1_keys(keys, force=True)
        if self._adapter is not None:
            self._adapter.delete(keys)

    def files(self) -> list[Path]:
        return [] if self._directory is None else sorted(self._directory.iterdir())

    def state(self) -> dict[str, int]:
        self._storage.clear()  # what remains is held by someone
        return {
            "unfinished": self._unfinished(),
            "held_bytes": int(self._storage.get_l1_usage()[0]),
            "disk_bytes": self._disk_bytes(),
        }

    def close(self) -> None:
        self._storage.close()

    def _keys(self, token_ids: list[int]) -> list[Any]:
        return [
            ObjectKey(digest, "benchmark", _RANK) for digest in self._hasher.compute_chunk_hashes(token_ids)
        ]

    def _prefetch(self, token_ids: list[int]) -> list[Any]:
        """Keys of the prefix that lies in L1 now, read-locked."""
        keys = self._keys(token_ids)
        handle = self._storage.submit_prefetch_task(
            PrefetchTaskSpec([GroupedObjectKeys(keys, 0, self._layout)])
        )
        if not self._storage.wait_prefetch_status(handle, _PREFETCH_PATIENCE_S):
            raise PeerError(f"a prefetch was not done after {_PREFETCH_PATIENCE_S:.0f} s")
        result = self._storage.query_prefetch_status(handle)
        return [] if result is None else keys[: result.hit_cells[0].popcount()]

    def _wait_for_adapter(self, expected_bytes: int, patience_s: float) -> None:
        """Until it has stored so much, or has been without work for a while and will not store the rest."""
        began = time.perf_counter()
        while wait_until(lambda: self._disk_bytes() >= expected_bytes, _QUIET_S):
            if not self._unfinished():
                return
        quiet_since = time.perf_counter()
        while (now := time.perf_counter()) < began + patience_s and now < quiet_since + _QUIET_S:
            if self._unfinished():
                quiet_since = now
            elif self._disk_bytes() >= expected_bytes:
                return
            time.sleep(1e-3)

    def _unfinished(self) -> int:
        status = self._storage.report_status()["store_controller"]
        return int(status["pending_keys_count"]) + int(status["in_flight_task_count"])

    def _disk_bytes(self) -> int:
        return 0 if self._adapter is None else int(self._adapter.get_usage().total_bytes_used)


def _adapter_config(adapter: str, directory: Path) -> Any:
    if adapter == "fs":
        return FSL2AdapterConfig(str(directory))
    return FSNativeL2AdapterConfig(str(directory), use_odirect=adapter.endswith("O_DIRECT"))
