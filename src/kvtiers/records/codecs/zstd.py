"""Lossless: byte planes, and zstd's entropy coder on those that pay.

Of a float KV element only the exponent is predictable (2.7 bits of entropy of bf16's 8); sign and mantissa look random. So
the bits are dealt into planes, one byte of each element a plane:

    bf16, fp16   exponent plane: bits 14–7      sign and mantissa: bit 15, bits 6–0
    fp32         exponent plane: bits 30–23     sign and upper mantissa: bit 31, bits 22–16     bits 15–8     bits 7–0
    other        one plane: the bytes as they are (fp8, opaque bytes)

fp16 has five exponent bits, so its exponent plane holds three of mantissa too. A plane that does not shrink is stored raw.

zstd is here for its Huffman coder. Its matches, found among bytes that are random but few-valued, cost more than they save:
with a tiny hash table and a least match of seven bytes it saves more *and* runs faster than any plain level (the numbers:
docs/decisions/records-and-codecs.md). So levels 1–15 all mean that setting. From 16 on an optimal parser is used: about
one point more saved for about twenty times the encoding time.

Stream: for each tile of 2^k elements, for each plane: u32 little-endian length, then that many bytes, which are the plane
itself if the length is the tile's number of elements, else one zstd frame; at the end, raw, the bytes short of an element.
Parameters: version 1, planes, k. All vector work is numpy's on scratch that fits into the L2 cache, one set a thread, GIL
released. zstandard's objects are not thread-safe: one per thread as well.
"""

from __future__ import annotations

import threading
from typing import ClassVar, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import zstandard

from kvtiers.model.errors import CodecError
from kvtiers.records.codecs.base import Codec

ByteArray: TypeAlias = npt.NDArray[np.uint8]

_STREAM_VERSION: Final = 1
_TILE_LOG2: Final = 17
_TILE: Final = 1 << _TILE_LOG2
"""Elements a tile: long calls, because each one lets go of the GIL and must get it back (with 2^15, two threads decoded no faster than one)."""
_TILE_LOG2_ALLOWED: Final = range(10, 18)
_LENGTH_BYTES: Final = 4
_MOST_PLANES: Final = 4
_SAMPLE: Final = 8192
"""Bytes from the middle of a plane that decide whether the plane is tried."""
_PAYS_BELOW: Final = 31 / 32
"""A plane must shrink to this part of itself to be worth its decoding."""

_OPTIMAL_FROM_LEVEL: Final = 16
_LEVELS: Final = range(1, 23)
_BLOCK_LOG2: Final = 14
"""zstd's blocks are no longer than its window, and each has its own Huffman table: 16 KiB follow the data from head to head."""
_ENTROPY_ONLY: Final = {"min_match": 7, "hash_log": 7, "window_log": _BLOCK_LOG2}
_OPTIMAL: Final = {"min_match": 7, "window_log": _BLOCK_LOG2}

_WORDS: Final[dict[int, type[np.uint16 | np.uint32]]] = {2: np.uint16, 4: np.uint32}


class ZstdPlanes(Codec):
    """Lossless byte planes with zstd. `level` as in `compression_level`: 1–15 fast, 16–22 the last point of space."""

    name: ClassVar[str] = "zstd"

    def __init__(self, level: int = 3) -> None:
        if level not in _LEVELS:
            raise CodecError(f"zstd takes compression levels from 1 to 22, not {level}")
        self._optimal = level >= _OPTIMAL_FROM_LEVEL

    def parameters(self, itemsize: int) -> bytes:
        return bytes((_STREAM_VERSION, _planes_of(itemsize), _TILE_LOG2))

    def bound(self, nbytes: int) -> int:
        return nbytes + _LENGTH_BYTES * (nbytes // _TILE + _MOST_PLANES)

    def encode(self, payload: memoryview, out: memoryview, itemsize: int) -> int:
        if len(out) < self.bound(len(payload)):
            raise CodecError(f"{len(out)} bytes of room, {self.bound(len(payload))} are needed")
        planes = _planes_of(itemsize)
        source, target = np.frombuffer(payload, np.uint8), np.frombuffer(out, np.uint8)
        tile_bytes = _TILE * planes
        whole = len(source) // planes * planes
        bench = _bench
        compressor = bench.optimal if self._optimal else bench.entropy_only
        end = 0
        for start in range(0, whole, tile_bytes):
            tile = source[start : min(start + tile_bytes, whole)]
            for plane in _split(tile, planes, bench):
                end = _append(target, end, _shrunk(plane, compressor, bench))
        tail = source[whole:]
        target[end : end + len(tail)] = tail
        return end + len(tail)

    def decode(self, stored: memoryview, out: memoryview, parameters: bytes) -> None:
        planes, tile_elements = _read_parameters(parameters)
        target = np.frombuffer(out, np.uint8)
        whole = len(target) // planes * planes
        tile_bytes = tile_elements * planes
        bench = _bench
        at = 0
        for start in range(0, whole, tile_bytes):
            tile = target[start : min(start + tile_bytes, whole)]
            elements = len(tile) // planes
            found: list[ByteArray] = []
            for _ in range(planes):
                length = int.from_bytes(stored[at : at + _LENGTH_BYTES], "little")
                at += _LENGTH_BYTES
                if not 0 < length <= elements or at + length > len(stored):
                    raise CodecError(
                        f"a plane of {length} bytes at {at} of {len(stored)}, for {elements} elements"
                    )
                body = stored[at : at + length]
                at += length
                found.append(
                    np.frombuffer(body if length == elements else _inflate(body, elements, bench), np.uint8)
                )
            _merge(found, tile, bench)
        tail = len(target) - whole
        if len(stored) - at != tail:
            raise CodecError(f"{len(stored) - at} bytes behind the last tile, {tail} were expected")
        if tail:
            target[whole:] = np.frombuffer(stored[at:], np.uint8)


class _Bench(threading.local):
    """One thread's tools: zstandard's objects and scratch for one tile."""

    def __init__(self) -> None:
        self.entropy_only = _compressor(1, _ENTROPY_ONLY)
        self.decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 20)
        self.scratch = np.empty((2, _LARGEST_TILE * 4), np.uint8)
        self.planes = np.empty((_MOST_PLANES, _TILE), np.uint8)
        self._optimal: zstandard.ZstdCompressor | None = None

    @property
    def optimal(self) -> zstandard.ZstdCompressor:
        """Made when first used: it takes megabytes."""
        if self._optimal is None:
            self._optimal = _compressor(_OPTIMAL_FROM_LEVEL, _OPTIMAL)
        return self._optimal


def _compressor(level: int, settings: dict[str, int]) -> zstandard.ZstdCompressor:
    parameters = zstandard.ZstdCompressionParameters.from_level(
        level, write_content_size=True, write_checksum=False, **settings
    )
    return zstandard.ZstdCompressor(compression_params=parameters)


_LARGEST_TILE: Final = 1 << _TILE_LOG2_ALLOWED[-1]
_bench = _Bench()


def _planes_of(itemsize: int) -> int:
    return itemsize if itemsize in _WORDS else 1


def _read_parameters(parameters: bytes) -> tuple[int, int]:
    """Planes and elements a tile."""
    if len(parameters) != 3 or parameters[0] != _STREAM_VERSION:
        raise CodecError(f"parameters {parameters.hex()} are not of stream version {_STREAM_VERSION}")
    _, planes, tile_log2 = parameters
    if (planes != 1 and planes not in _WORDS) or tile_log2 not in _TILE_LOG2_ALLOWED:
        raise CodecError(f"no such stream: {planes} planes in tiles of 2^{tile_log2} elements")
    return planes, 1 << tile_log2


def _append(target: ByteArray, end: int, body: ByteArray) -> int:
    start = end + _LENGTH_BYTES
    target[end:start] = np.frombuffer(len(body).to_bytes(_LENGTH_BYTES, "little"), np.uint8)
    np.copyto(target[start : start + len(body)], body)
    return start + len(body)


def _shrunk(plane: ByteArray, compressor: zstandard.ZstdCompressor, bench: _Bench) -> ByteArray:
    """The plane as a zstd frame, or as it is when that does not pay."""
    if len(plane) > 2 * _SAMPLE:
        middle = len(plane) // 2
        sample = bench.entropy_only.compress(plane[middle : middle + _SAMPLE].data)
        if len(sample) > _SAMPLE * _PAYS_BELOW:
            return plane
    frame = compressor.compress(plane.data)
    return np.frombuffer(frame, np.uint8) if len(frame) < len(plane) * _PAYS_BELOW else plane


def _inflate(frame: memoryview, nbytes: int, bench: _Bench) -> bytes:
    """One zstd frame of exactly `nbytes`; a frame that claims another size is refused before anything is allocated."""
    try:
        if zstandard.frame_content_size(frame) != nbytes:
            raise CodecError(f"a zstd frame claims another size than the {nbytes} bytes of its plane")
        plane = bench.decompressor.decompress(frame, max_output_size=nbytes, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise CodecError(f"a zstd frame is damaged: {error}") from error
    if len(plane) != nbytes:
        raise CodecError(f"a zstd frame gave {len(plane)} bytes instead of {nbytes}")
    return plane


def _split(tile: ByteArray, planes: int, bench: _Bench) -> list[ByteArray]:
    """Deal a tile's bits into planes, exponents first; they lie in the thread's scratch until its next call."""
    if planes == 1:
        return [tile]
    word = _WORDS[planes]
    bits = planes * 8
    elements = tile.view(word)
    count = len(elements)
    found = [bench.planes[index, :count] for index in range(planes)]
    high, low = (scratch.view(word)[:count] for scratch in bench.scratch)
    np.right_shift(elements, word(bits - 9), out=high)
    np.copyto(found[0], high, casting="unsafe")
    if planes > 2:
        np.right_shift(elements, word(bits - 16), out=high)
        np.bitwise_and(high, word(0x807F), out=high)
    else:
        np.bitwise_and(elements, word(0x807F), out=high)
    np.right_shift(high, word(8), out=low)
    np.bitwise_or(high, low, out=high)
    np.copyto(found[1], high, casting="unsafe")
    for index in range(2, planes):
        np.right_shift(elements, word(bits - 8 * (index + 1)), out=high)
        np.copyto(found[index], high, casting="unsafe")
    return found


def _merge(found: list[ByteArray], tile: ByteArray, bench: _Bench) -> None:
    """The inverse of `_split`."""
    planes = len(found)
    if planes == 1:
        np.copyto(tile, found[0])
        return
    word = _WORDS[planes]
    bits = planes * 8
    elements = tile.view(word)
    part = bench.scratch[0].view(word)[: len(elements)]
    np.copyto(elements, found[0])
    np.left_shift(elements, word(bits - 9), out=elements)
    np.copyto(part, found[1])
    np.multiply(
        part, word(0x0101 << (bits - 16)), out=part
    )  # the byte twice: once for the sign, once for the mantissa
    np.bitwise_and(part, word(0x807F << (bits - 16)), out=part)
    np.bitwise_or(elements, part, out=elements)
    for index in range(2, planes):
        np.copyto(part, found[index])
        np.left_shift(part, word(bits - 8 * (index + 1)), out=part)
        np.bitwise_or(elements, part, out=elements)
