"""What every payload codec must do, as a pytest class to subclass.

    class TestMyCodec(CodecContract):
        @pytest.fixture
        def codec(self) -> Codec:
            return MyCodec(strength=7)

`decoder` is the codec as a reader has it, made without options; override it if the class can't be made so. All memory that
a codec gets here is surrounded by canaries, off any alignment, and read-only where it is input.
"""

from __future__ import annotations

import contextlib
import random
import resource
import threading
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest

from kvtiers.model.errors import CodecError
from kvtiers.records.codecs.base import MAX_NAME_BYTES, MAX_PARAMETER_BYTES, Codec

ITEMSIZES: Final = (1, 2, 4, 8)
SIZES: Final = (1, 2, 3, 5, 255, 4095, 4096, 4097, 65_537, 262_144, 1_310_727)
"""One byte, odd sizes, around a page, whole tiles, more than a megabyte."""
CONTENTS: Final = ("zeros", "ones", "random", "kv", "ramp", "half random")

_GUARD: Final = 67  # odd, so that what lies between two guards is aligned to nothing
_CANARY: Final = 0xA5


def kv_like(nbytes: int, itemsize: int, seed: int = 0, *, channels: int = 192) -> bytes:
    """Bytes that look like KV: gaussian with a scale of its own per channel; bf16 at 2 bytes an element, fp32 at 4."""
    rng = np.random.default_rng(seed)
    tokens = nbytes // (itemsize * channels) + 1
    scales = np.exp(rng.normal(0.0, 0.8, channels)).astype(np.float32)
    values = rng.standard_normal((tokens, channels), dtype=np.float32) * scales
    words: npt.NDArray[np.generic]
    if itemsize == 1:
        words = np.clip(np.rint(values * 16), -127, 127).astype(np.int8)
    elif itemsize == 2:
        words = (values.view(np.uint32) >> 16).astype(np.uint16)
    else:
        words = values.astype(f"<f{itemsize}")
    return words.tobytes()[:nbytes]


def content(kind: str, nbytes: int, itemsize: int) -> bytes:
    """Payload of one of the CONTENTS."""
    if kind == "zeros":
        return bytes(nbytes)
    if kind == "ones":
        return b"\xff" * nbytes
    if kind == "random":
        return random.Random(nbytes).randbytes(nbytes)
    if kind == "ramp":
        return np.arange(nbytes, dtype=np.uint32).astype(np.uint8).tobytes()
    if kind == "half random":
        return bytes(nbytes - nbytes // 2) + random.Random(nbytes).randbytes(nbytes // 2)
    return kv_like(nbytes, itemsize)


class Guarded(NamedTuple):
    """Memory between canaries."""

    memory: bytearray
    view: memoryview

    @classmethod
    def of(cls, nbytes: int, data: bytes | memoryview = b"") -> Guarded:
        """`nbytes` of junk, or of `data`, with canaries around."""
        memory = bytearray([_CANARY]) * (nbytes + 2 * _GUARD)
        memory[_GUARD : _GUARD + len(data)] = data
        return cls(memory, memoryview(memory)[_GUARD : _GUARD + nbytes])

    def assert_untouched_around(self) -> None:
        canary = bytes([_CANARY]) * _GUARD
        assert self.memory[:_GUARD] == canary, "wrote before the output"
        assert self.memory[-_GUARD:] == canary, "wrote behind the output"


class CodecContract:
    """Subclass me, give me a fixture `codec` with the codec under test, and call the class `Test…`."""

    @pytest.fixture
    def decoder(self, codec: Codec) -> Codec:
        """The same codec as a reader has it: made without options."""
        return type(codec)()

    @pytest.mark.parametrize("itemsize", ITEMSIZES)
    def test_name_and_parameters_fit_into_the_header(self, codec: Codec, itemsize: int) -> None:
        assert codec.name.isascii()
        assert codec.name.isprintable()
        assert 1 <= len(codec.name) <= MAX_NAME_BYTES
        assert len(codec.parameters(itemsize)) <= MAX_PARAMETER_BYTES
        assert codec.parameters(itemsize) == codec.parameters(itemsize)

    def test_bound_grows_with_the_payload(self, codec: Codec) -> None:
        bounds = [codec.bound(nbytes) for nbytes in SIZES]
        assert bounds == sorted(bounds)
        assert bounds[0] >= 1

    @pytest.mark.parametrize("kind", CONTENTS)
    @pytest.mark.parametrize("itemsize", ITEMSIZES)
    @pytest.mark.parametrize("nbytes", SIZES)
    def test_round_trip_within_the_bound(
        self, codec: Codec, decoder: Codec, nbytes: int, itemsize: int, kind: str
    ) -> None:
        payload = content(kind, nbytes, itemsize)
        stored = encoded(codec, payload, itemsize)
        first = decoded(decoder, stored, nbytes, codec.parameters(itemsize))
        if codec.lossy:
            assert first == decoded(codec, stored, nbytes, codec.parameters(itemsize))
        else:
            assert first == payload

    @pytest.mark.parametrize("itemsize", ITEMSIZES)
    def test_stream_of_another_size_is_refused(self, codec: Codec, itemsize: int) -> None:
        payload = content("kv", 70_001, itemsize)
        stored = encoded(codec, payload, itemsize)
        for nbytes in (1, len(payload) - 1, len(payload) + 1, 2 * len(payload)):
            out = Guarded.of(nbytes)
            with pytest.raises(CodecError):
                codec.decode(stored, out.view, codec.parameters(itemsize))
            out.assert_untouched_around()

    @pytest.mark.parametrize("itemsize", ITEMSIZES)
    @pytest.mark.parametrize("kind", ["kv", "zeros", "random"])
    def test_truncated_stream_is_refused(self, codec: Codec, itemsize: int, kind: str) -> None:
        payload = content(kind, 20_001, itemsize)
        stored = encoded(codec, payload, itemsize)
        cuts = {0, 1, 2, 3, 4, 5, len(stored) // 2, len(stored) - 1, *range(0, len(stored), 997)}
        for cut in sorted(cuts & set(range(len(stored)))):
            out = Guarded.of(len(payload))
            with pytest.raises(CodecError):
                codec.decode(stored[:cut], out.view, codec.parameters(itemsize))
            out.assert_untouched_around()

    @pytest.mark.parametrize("itemsize", ITEMSIZES)
    @pytest.mark.parametrize("kind", ["kv", "zeros", "random"])
    def test_flipped_bits_never_crash_or_write_outside(self, codec: Codec, itemsize: int, kind: str) -> None:
        payload = content(kind, 9_001, itemsize)
        stored = encoded(codec, payload, itemsize)
        rng = random.Random(itemsize)
        front = range(8 * min(len(stored), 48))  # where lengths and tables are
        anywhere = [rng.randrange(8 * len(stored)) for _ in range(300)]
        for bit in [*front, *anywhere]:
            damaged = bytearray(stored)
            damaged[bit // 8] ^= 1 << bit % 8
            assert_survives(codec, bytes(damaged), len(payload), codec.parameters(itemsize))

    @pytest.mark.parametrize("itemsize", ITEMSIZES)
    def test_garbage_never_crashes_or_writes_outside(self, codec: Codec, itemsize: int) -> None:
        rng = random.Random(itemsize)
        for nbytes in (1, 100, 5_000):
            for junk in (b"", b"\0" * nbytes, b"\xff" * nbytes, *(rng.randbytes(nbytes) for _ in range(50))):
                assert_survives(codec, junk, 5_000, codec.parameters(itemsize))

    def test_parameters_of_others_never_crash(self, codec: Codec) -> None:
        stored = bytes(encoded(codec, content("kv", 9_001, 2), 2))
        rng = random.Random(0)
        own = codec.parameters(2)
        flipped = [
            own[: i // 8] + bytes([own[i // 8] ^ (1 << i % 8)]) + own[i // 8 + 1 :]
            for i in range(8 * len(own))
        ]
        for junk in (
            b"",
            b"\0",
            b"\xff" * 64,
            *flipped,
            *(rng.randbytes(rng.randrange(65)) for _ in range(100)),
        ):
            assert_survives(codec, stored, 9_001, junk)

    def test_four_threads_share_a_codec(self, codec: Codec) -> None:
        wrong: list[str] = []
        gate = threading.Barrier(4)

        def work(seed: int) -> None:
            payload = kv_like(300_000 + seed, 2, seed)
            expected = decoded(codec, encoded(codec, payload, 2), len(payload), codec.parameters(2))
            gate.wait(30)
            for turn in range(10):
                got = decoded(codec, encoded(codec, payload, 2), len(payload), codec.parameters(2))
                if got != expected or (not codec.lossy and got != payload):
                    wrong.append(f"thread {seed}, turn {turn}")

        threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads)
        assert not wrong

    def test_memory_does_not_grow(self, codec: Codec) -> None:
        payload = kv_like(1 << 18, 2)
        stored = bytearray(codec.bound(len(payload)))
        out = bytearray(len(payload))
        parameters = codec.parameters(2)

        def rounds(count: int) -> None:
            for _ in range(count):
                length = codec.encode(memoryview(payload), memoryview(stored), 2)
                codec.decode(memoryview(stored)[:length], memoryview(out), parameters)
                with contextlib.suppress(CodecError):
                    codec.decode(memoryview(stored)[: length // 2], memoryview(out), parameters)

        rounds(20)
        before = _resident_bytes()
        rounds(100)
        assert _resident_bytes() - before < 8 << 20  # half of one payload a round would be 12 MiB


def encoded(codec: Codec, payload: bytes, itemsize: int) -> memoryview:
    """Encode into exactly `bound` bytes between canaries; the stream, read-only."""
    source = Guarded.of(len(payload), payload)
    out = Guarded.of(codec.bound(len(payload)))
    length = codec.encode(source.view.toreadonly(), out.view, itemsize)
    out.assert_untouched_around()
    assert 1 <= length <= codec.bound(len(payload))
    return out.view[:length].toreadonly()


def decoded(codec: Codec, stored: memoryview, nbytes: int, parameters: bytes) -> bytes:
    """Decode into exactly `nbytes` bytes between canaries."""
    out = Guarded.of(nbytes)
    codec.decode(stored, out.view, parameters)
    out.assert_untouched_around()
    return bytes(out.view)


def assert_survives(codec: Codec, stored: bytes, nbytes: int, parameters: bytes) -> None:
    """Decoding this may raise CodecError or give garbage, and nothing else."""
    source = Guarded.of(len(stored), stored)
    out = Guarded.of(nbytes)
    with contextlib.suppress(CodecError):
        codec.decode(source.view.toreadonly(), out.view, parameters)
    out.assert_untouched_around()


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
