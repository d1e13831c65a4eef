"""What a machine with a GPU has to show: `make test-gpu`. In `make test` the same tests run with the tier simulated on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from kvtiers.config import CacheConfig
from kvtiers.memory.arena import Arena
from kvtiers.memory.cuda import DevicePool, host_register
from kvtiers.memory.mapping import CloseOutcome
from kvtiers.model.layout import KVLayout
from kvtiers.model.namespace import Namespace
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache

pytestmark = pytest.mark.slow

MIB = 1 << 20
LAYOUT = KVLayout(num_layers=4, num_kv_heads=2, head_dim=64, dtype="bfloat16")
CHUNK = 64
TOKENS = list(range(8 * CHUNK))


def random_bits(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, seed: int = 0
) -> torch.Tensor:
    """Every bit pattern, NaNs too: a copy moves bytes, it doesn't compute."""
    generator = torch.Generator().manual_seed(seed)
    count = int(np.prod(shape)) * dtype.itemsize
    bits = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return bits.view(dtype).view(shape).to(device)


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(one.cpu().contiguous().view(torch.uint8), other.cpu().contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn], ids=str
)
def test_strided_tensors_come_back_bit_for_bit(dtype: torch.dtype, device: torch.device) -> None:
    pool = DevicePool(4 * MIB, device)
    paged = random_bits((16, 2, 32, 4, 64), dtype, device)
    source = [paged[block, plane, :16] for block in (3, 11, 7) for plane in (0, 1)]
    nbytes = pool.copy_in(MIB, *source)
    target = [torch.zeros_like(tensor, memory_format=torch.contiguous_format) for tensor in source]
    assert pool.copy_out(MIB, *target) == nbytes
    assert all(same_bits(one, other) for one, other in zip(source, target, strict=True))
    assert pool.close() is CloseOutcome.UNMAPPED


def test_bytes_go_to_the_registered_arena_and_back(device: torch.device) -> None:
    arena = Arena(8 * MIB)
    registration = host_register(arena.view(0, arena.nbytes), device, piece_bytes=2 * MIB)
    assert registration.nbytes == arena.nbytes
    pool = DevicePool(8 * MIB, device)
    bits = random_bits((2 * MIB,), torch.uint8, device)
    pool.copy_in(2 * MIB, bits)
    pool.copy_to_host(2 * MIB, arena.view(2 * MIB, 2 * MIB))
    assert same_bits(torch.from_numpy(arena.view(2 * MIB, 2 * MIB).copy()), bits)
    pool.copy_from_host(4 * MIB, arena.view(2 * MIB, 2 * MIB))
    back = torch.zeros_like(bits)
    pool.copy_out(4 * MIB, back)
    assert same_bits(back, bits)
    assert pool.close() is CloseOutcome.UNMAPPED
    registration.unregister()
    assert arena.close() is CloseOutcome.UNMAPPED


def test_a_copy_sees_what_the_caller_queued_before_it(device: torch.device) -> None:
    """Stream order: kernels queued on the caller's stream have run before the pool reads, without a synchronize of ours."""
    pool = DevicePool(64 * MIB, device)
    values = torch.zeros(8 * MIB, dtype=torch.float32, device=device)
    for round_number in range(20):
        for _ in range(10):  # keeps a GPU busy well past the call
            values = values * 1.0 + 0.1
        expected = values.clone()
        pool.copy_in(0, values)
        values.fill_(-1.0)  # queued after it, must not be seen
        back = torch.empty_like(expected)
        pool.copy_out(0, back)
        assert same_bits(back, expected), f"round {round_number}"
        values = expected
    assert pool.in_flight() == 0
    pool.close()


def test_a_cache_brings_kv_from_every_tier_to_the_device(device: torch.device, tmp_path: Path) -> None:
    storage = {
        "chunk_tokens": CHUNK,
        "gpu": {"capacity": "16Mi", "device": str(device)},
        "cpu": {"buffer_size": "16Mi"},
        "disk": {"enabled": True, "path": str(tmp_path / "disk"), "max_size": "1Gi", "min_free_space": "0"},
    }
    config = CacheConfig.from_mapping({"storage": storage}, environ={})
    namespace = Namespace(model="acceptance", fingerprint="none", engine="test")
    kv = random_bits(LAYOUT.shape(len(TOKENS)), torch.bfloat16, device)
    with TieredCache(config, LAYOUT, namespace) as cache:
        assert cache.stats()["tiers"][Tier.GPU]["simulated"] is (device.type == "cpu")
        assert cache.store(TOKENS, kv).accepted_tokens == len(TOKENS)
        cache.flush()
        for tier, above in ((Tier.GPU, ()), (Tier.CPU, (Tier.GPU,)), (Tier.DISK, (Tier.GPU, Tier.CPU))):
            for one in above:
                for _ in range(len(TOKENS) // CHUNK):
                    cache.evict(one)
                    cache.flush()
            into = torch.zeros_like(kv)
            loaded = cache.load(TOKENS, into=into).result(30)
            assert loaded.tiers == (tier,) * (len(TOKENS) // CHUNK)
            assert same_bits(into, kv)
            cache.flush()
        assert cache.check_integrity() == []
