"""A rank's KV memory, as vLLM registers it: layers' tensors over one allocation, taken as raw bytes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from kvtiers.integrations.vllm.blocks import Blocks, HostBlocks
from kvtiers.integrations.vllm.plan import Geometry
from kvtiers.integrations.vllm.versions import UnsupportedEngine


def blocks_of(plan: Geometry, kv_caches: dict[str, torch.Tensor]) -> Blocks:
    """The rank's blocks as regions of raw bytes. Raises UnsupportedEngine if its memory is not what the plan says."""
    tensor = next(iter(_tensors(kv_caches.values())))
    raw = torch.empty(0, dtype=torch.int8, device=tensor.device).set_(tensor.untyped_storage())
    end = max(region.start + plan.num_blocks * region.block_bytes for region in plan.regions)
    if raw.numel() < end:
        raise UnsupportedEngine(
            f"the engine's KV allocation has {raw.numel()} bytes, its configuration says {end}"
        )
    views = [
        raw[region.start : region.start + plan.num_blocks * region.block_bytes].view(
            plan.num_blocks, region.block_bytes
        )
        for region in plan.regions
    ]
    if tensor.device.type == "cpu":
        return HostBlocks([view.numpy().view("uint8") for view in views], plan.blocks_per_chunk)
    from kvtiers.integrations.vllm.device_blocks import DeviceBlocks

    return DeviceBlocks(views, plan.blocks_per_chunk)


def _tensors(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    for value in values:
        yield from value if isinstance(value, list | tuple) else (value,)
