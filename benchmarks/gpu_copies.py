"""Copies between arena and GPU pool beside the link's own limit (a pinned `torch` copy of the same size), interleaved.

    python benchmarks/gpu_copies.py [--device cuda] [--rounds 9]

Part of `make test-gpu`. With `--device cpu` the tier is simulated and the "link" is host memory: it shows that the code runs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from kvtiers.memory.arena import Arena
from kvtiers.memory.cuda import DevicePool, host_register

MIB = 1 << 20
CHUNK = 32 * MIB  # 256 tokens of Llama-3-8B in bf16
CHUNKS = 8


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} sees no CUDA device; --device cpu simulates the tier")
    arena = Arena(CHUNK * CHUNKS)
    registration = host_register(arena.view(0, arena.nbytes), device, piece_bytes=CHUNK)
    pool = DevicePool(CHUNK * CHUNKS, device)
    pinned = torch.zeros(CHUNK * CHUNKS, dtype=torch.uint8, pin_memory=device.type == "cuda")
    on_device = torch.zeros(CHUNK * CHUNKS, dtype=torch.uint8, device=device)

    def each_chunk(copy: Callable[[int], None]) -> None:
        for offset in range(0, CHUNK * CHUNKS, CHUNK):
            copy(offset)

    work: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "host to device": (
            lambda: on_device.copy_(pinned, non_blocking=True),
            lambda: each_chunk(lambda at: pool.copy_from_host(at, arena.view(at, CHUNK))),
        ),
        "device to host": (
            lambda: pinned.copy_(on_device, non_blocking=True),
            lambda: each_chunk(lambda at: pool.copy_to_host(at, arena.view(at, CHUNK))),
        ),
    }
    print(
        f"{pool.describe()}; {registration.nbytes / MIB:.0f} MiB of arena registered; chunks of {CHUNK / MIB:.0f} MiB"
    )
    for name, (limit, ours) in work.items():
        pairs = [(_seconds(limit, device), _seconds(ours, device)) for _ in range(options.rounds + 1)][1:]
        ratios = sorted(one / other for one, other in pairs)
        rate = CHUNK * CHUNKS / statistics.median(other for _, other in pairs) / 1e9
        low, high = ratios[len(ratios) // 20], ratios[-1 - len(ratios) // 20]
        print(
            f"{name}: {rate:.1f} GB/s, {statistics.median(ratios):.2f} of the link's limit ({low:.2f} to {high:.2f})"
        )
    pool.close()
    registration.unregister()
    arena.close()


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
