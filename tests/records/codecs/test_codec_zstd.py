from __future__ import annotations

import random
import struct
import tracemalloc

import numpy as np
import pytest
import zstandard

from kvtiers.model.errors import CodecError
from kvtiers.records.codecs.base import Codec
from kvtiers.records.codecs.zstd import ZstdPlanes
from kvtiers.testing.codec_kit import CodecContract, decoded, encoded, kv_like

MIB = 1 << 20


class TestZstdPlanes(CodecContract):
    @pytest.fixture
    def codec(self) -> Codec:
        return ZstdPlanes()


class TestZstdPlanesWithTheOptimalParser(CodecContract):
    @pytest.fixture
    def codec(self) -> Codec:
        return ZstdPlanes(level=19)


def saved(payload: bytes, itemsize: int, level: int = 3) -> float:
    return 1 - len(encoded(ZstdPlanes(level=level), payload, itemsize)) / len(payload)


@pytest.mark.parametrize("level", [1, 3, 9, 15])
def test_bf16_like_kv_shrinks_by_more_than_a_fifth_at_every_level(level: int) -> None:
    assert saved(kv_like(4 * MIB, 2), 2, level) > 0.2


def test_fp32_like_kv_shrinks_by_its_exponents() -> None:
    assert saved(kv_like(4 * MIB, 4), 4) > 0.1


def test_fp16_shrinks_by_its_exponents() -> None:
    values = np.random.default_rng(0).standard_normal(MIB).astype(np.float16)
    assert saved(values.tobytes(), 2) > 0.08


def test_bf16_kept_as_fp32_loses_its_empty_half() -> None:
    bf16 = np.frombuffer(kv_like(MIB, 2), np.uint16)
    assert saved((bf16.astype(np.uint32) << 16).tobytes(), 4) > 0.6


def test_planes_beat_plain_zstd_on_bf16() -> None:
    payload = kv_like(4 * MIB, 2)
    plain = 1 - len(zstandard.ZstdCompressor(level=3).compress(payload)) / len(payload)
    assert saved(payload, 2) > plain + 0.05


def test_optimal_parser_finds_repeats_that_the_entropy_coder_leaves() -> None:
    rng = random.Random(0)
    words = [rng.randbytes(12) for _ in range(500)]
    payload = b"".join(rng.choice(words) for _ in range(20_000))
    assert saved(payload, 1, level=16) > saved(payload, 1, level=15) + 0.1


def test_constant_payload_nearly_vanishes() -> None:
    assert saved(bytes(4 * MIB), 2) > 0.99


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8])
def test_random_payload_costs_nothing_but_lengths(itemsize: int) -> None:
    assert saved(random.Random(1).randbytes(MIB + 3), itemsize) > -0.0005


@pytest.mark.parametrize("value", range(0, 65536, 257))
def test_every_bf16_bit_pattern_survives(value: int) -> None:
    words = np.arange(value, value + 257, dtype=np.uint32).astype(np.uint16)
    payload = words.tobytes()
    codec = ZstdPlanes()
    assert decoded(codec, encoded(codec, payload, 2), len(payload), codec.parameters(2)) == payload


@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_single_bit_survives_in_its_place(itemsize: int) -> None:
    bits = np.array([1 << bit for bit in range(8 * itemsize)], dtype=f"<u{itemsize}")
    payload = np.concatenate([bits, ~bits]).tobytes()
    codec = ZstdPlanes()
    assert (
        decoded(codec, encoded(codec, payload, itemsize), len(payload), codec.parameters(itemsize)) == payload
    )


@pytest.mark.parametrize("level", [-1, 0, 23])
def test_level_zstd_does_not_have_is_refused(level: int) -> None:
    with pytest.raises(CodecError, match="from 1 to 22"):
        ZstdPlanes(level=level)


def test_too_little_room_is_refused() -> None:
    with pytest.raises(CodecError, match="of room"):
        ZstdPlanes().encode(memoryview(bytes(1000)), memoryview(bytearray(1000)), 2)


def test_frame_that_claims_another_size_is_refused_before_anything_is_allocated() -> None:
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes(64 * MIB))
    stream = struct.pack("<I", len(bomb)) + bomb
    out = memoryview(bytearray(10_000))
    codec = ZstdPlanes()
    tracemalloc.start()
    try:
        with pytest.raises(CodecError, match="claims another size"):
            codec.decode(memoryview(stream), out, codec.parameters(1))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()


def test_frame_without_a_size_is_refused() -> None:
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(bytes(5000))
    codec = ZstdPlanes()
    with pytest.raises(CodecError, match="claims another size"):
        codec.decode(
            memoryview(struct.pack("<I", len(frame)) + frame),
            memoryview(bytearray(5000)),
            codec.parameters(1),
        )


def test_bytes_behind_a_frame_are_refused() -> None:
    frame = zstandard.ZstdCompressor().compress(bytes(5000)) + b"more"
    codec = ZstdPlanes()
    with pytest.raises(CodecError):
        codec.decode(
            memoryview(struct.pack("<I", len(frame)) + frame),
            memoryview(bytearray(5000)),
            codec.parameters(1),
        )


def test_steady_path_allocates_no_payload() -> None:
    payload = kv_like(8 * MIB, 2)
    codec = ZstdPlanes()
    stored, out = bytearray(codec.bound(len(payload))), bytearray(len(payload))
    length = codec.encode(memoryview(payload), memoryview(stored), 2)
    codec.decode(memoryview(stored)[:length], memoryview(out), codec.parameters(2))
    tracemalloc.start()
    try:
        codec.encode(memoryview(payload), memoryview(stored), 2)
        codec.decode(memoryview(stored)[:length], memoryview(out), codec.parameters(2))
        assert tracemalloc.get_traced_memory()[1] < MIB
    finally:
        tracemalloc.stop()
