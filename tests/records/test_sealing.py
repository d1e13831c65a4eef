from __future__ import annotations

import mmap
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.model.errors import CodecError, InvariantBroken, RecordCorrupt, RecordForeign, RecordInvalid
from kvtiers.model.keys import ChunkKey
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.checksum import checksum
from kvtiers.records.codecs.base import Codec
from kvtiers.records.codecs.none import NoCodec
from kvtiers.records.codecs.registry import codec_for, decoder_for
from kvtiers.records.header import RecordHeader, decode_header
from kvtiers.records.sealing import SealedRecord, is_raw_size, open_payload, open_record, seal
from kvtiers.testing.codec_kit import kv_like

REF = RecordRef(b"n" * 32, ChunkKey(b"k" * 32), 0)
PAGE = 4096
BUFFERS = AlignedBuffers(8, 64 << 20)
ZSTD = codec_for("zstd")


class Truncating(Codec):
    """Lossy: keeps the upper byte of each bf16."""

    name: ClassVar[str] = "truncating"
    lossy: ClassVar[bool] = True

    def parameters(self, itemsize: int) -> bytes:
        return bytes([itemsize])

    def bound(self, nbytes: int) -> int:
        return nbytes

    def encode(self, payload: memoryview, out: memoryview, itemsize: int) -> int:
        kept = payload[itemsize - 1 :: itemsize]
        out[: len(kept)] = kept
        return len(kept)

    def decode(self, stored: memoryview, out: memoryview, parameters: bytes) -> None:
        itemsize = parameters[0]
        if len(stored) * itemsize != len(out):
            raise CodecError("another size")
        out[:] = bytes(len(out))
        out[itemsize - 1 :: itemsize] = stored


class Misbehaving(NoCodec):
    """Breaks one promise of the contract."""

    name: ClassVar[str] = "misbehaving"

    def __init__(self, stored_bytes: int = 1, parameters: bytes = b"") -> None:
        self.stored_bytes = stored_bytes
        self.own_parameters = parameters

    def parameters(self, itemsize: int) -> bytes:
        return self.own_parameters

    def encode(self, payload: memoryview, out: memoryview, itemsize: int) -> int:
        return self.stored_bytes


def slot(nbytes: int, fill: int = 0xEE) -> memoryview:
    """Page-aligned memory of whole pages, full of something."""
    length = max(-(-nbytes // PAGE), 1) * PAGE
    view = memoryview(mmap.mmap(-1, length))
    view[:] = bytes([fill]) * length
    return view


def in_slot(data: bytes) -> memoryview:
    view = slot(len(data))
    view[: len(data)] = data
    return view[: len(data)]


def address_of(view: memoryview) -> int:
    address: int = np.frombuffer(view, np.uint8).__array_interface__["data"][0]
    return address


def sealed_bytes(
    payload: memoryview,
    codec: Codec,
    itemsize: int = 2,
    look: Callable[[SealedRecord], None] = lambda record: None,
    of: bytes | None = None,
) -> bytes:
    with seal(
        ref=REF,
        parent=ChunkKey(b"p" * 32),
        num_parts=1,
        token_start=256,
        token_count=256,
        itemsize=itemsize,
        checksum=of or checksum(payload),
        payload=payload,
        codec=codec,
        buffers=BUFFERS,
    ) as record:
        look(record)
        assert all(len(part) % PAGE == 0 and address_of(part) % PAGE == 0 for part in record.buffers)
        assert sum(map(len, record.buffers)) == record.record_bytes == record.header.record_bytes
        data = b"".join(record.buffers)
    assert BUFFERS.lent_bytes == 0
    return data


def reader_of(data: bytes | bytearray) -> Callable[[Sequence[memoryview]], int]:
    """Fills buffers as `preadv` does."""

    def read(buffers: Sequence[memoryview]) -> int:
        done = 0
        for buffer in buffers:
            piece = data[done : done + len(buffer)]
            buffer[: len(piece)] = piece
            done += len(piece)
        return done

    return read


def opened(data: bytes | bytearray, nbytes: int, ref: RecordRef = REF, size: int | None = None) -> bytes:
    out = slot(nbytes)
    try:
        header = open_record(
            ref, nbytes, len(data) if size is None else size, out, reader_of(data), buffers=BUFFERS
        )
    finally:
        assert BUFFERS.lent_bytes == 0
    assert header.checksum == checksum(out[:nbytes])
    return bytes(out[:nbytes])


# --- round trips -------------------------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    nbytes=st.one_of(st.integers(1, 20_000), st.sampled_from([4095, 4096, 4097, 8192, 300_001])),
    codec=st.sampled_from([NoCodec(), ZSTD]),
    itemsize=st.sampled_from([1, 2, 4, 8]),
    noise=st.booleans(),
)
def test_payload_survives_its_record(nbytes: int, codec: Codec, itemsize: int, noise: bool) -> None:
    payload = random.Random(nbytes).randbytes(nbytes) if noise else kv_like(nbytes, itemsize)
    assert opened(sealed_bytes(in_slot(payload), codec, itemsize), nbytes) == payload


@pytest.mark.parametrize("codec", [NoCodec(), ZSTD], ids=["none", "zstd"])
def test_record_goes_through_a_real_file_past_the_page_cache(tmp_path: Path, codec: Codec) -> None:
    payload = in_slot(kv_like(1_000_003, 2))
    path = tmp_path / "record"
    flags = os.O_RDWR | os.O_CREAT
    try:
        fd = os.open(path, flags | os.O_DIRECT, 0o600)
    except OSError:  # a file system that does not offer it
        fd = os.open(path, flags, 0o600)
    try:
        with seal(
            ref=REF,
            parent=ChunkKey(b"p" * 32),
            num_parts=1,
            token_start=0,
            token_count=1,
            itemsize=2,
            checksum=checksum(payload),
            payload=payload,
            codec=codec,
            buffers=BUFFERS,
        ) as record:
            assert os.pwritev(fd, record.buffers, 0) == record.record_bytes
        out = slot(len(payload))
        size = os.fstat(fd).st_size
        open_record(REF, len(payload), size, out, lambda buffers: os.preadv(fd, buffers, 0), buffers=BUFFERS)
    finally:
        os.close(fd)
    assert out[: len(payload)] == payload
    assert (size < len(payload)) == (codec is ZSTD)


# --- sealing -----------------------------------------------------------------------------------------------------------


def test_raw_payload_is_written_from_the_callers_memory() -> None:
    payload = in_slot(b"x" * 10_000)

    def look(record: SealedRecord) -> None:
        assert [len(part) for part in record.buffers] == [4096, 8192, 4096]
        assert address_of(record.buffers[1]) == address_of(payload)

    sealed_bytes(payload, NoCodec(), look=look)


def test_padding_is_zero_whatever_stands_behind_the_payload() -> None:
    for codec in (NoCodec(), ZSTD):
        for _ in range(2):  # the second time, scratch holds the first's bytes
            data = sealed_bytes(in_slot(kv_like(70_001, 2)), codec)
            header = decode_header(data)
            assert not any(data[PAGE + header.stored_bytes :])


def test_payload_of_whole_pages_has_no_tail() -> None:
    def look(record: SealedRecord) -> None:
        assert [len(part) for part in record.buffers] == [4096, 8192]

    sealed_bytes(in_slot(b"x" * 8192), NoCodec(), look=look)


def test_payload_off_a_page_is_copied_to_one() -> None:
    payload = slot(20_000)[13:10_013]
    assert opened(sealed_bytes(payload, NoCodec()), 10_000) == bytes(payload)


def test_read_only_payload_is_sealed() -> None:
    payload = kv_like(50_000, 2)
    for codec in (NoCodec(), ZSTD):
        assert opened(sealed_bytes(memoryview(payload), codec), 50_000) == payload


@pytest.mark.parametrize("nbytes", [1, 4096, 1 << 20])
def test_payload_that_does_not_shrink_by_a_page_is_stored_raw(nbytes: int) -> None:
    payload = random.Random(5).randbytes(nbytes)
    header = decode_header(sealed_bytes(in_slot(payload), ZSTD))
    assert (header.codec, header.codec_parameters, header.stored_bytes) == ("none", b"", nbytes)


def test_header_says_what_was_sealed() -> None:
    payload = in_slot(kv_like(100_000, 2))
    data = sealed_bytes(payload, ZSTD)
    header = decode_header(data)
    assert header == RecordHeader(
        namespace=REF.namespace,
        key=REF.key,
        parent=ChunkKey(b"p" * 32),
        part=0,
        num_parts=1,
        token_start=256,
        token_count=256,
        itemsize=2,
        codec="zstd",
        codec_parameters=ZSTD.parameters(2),
        payload_bytes=100_000,
        stored_bytes=header.stored_bytes,
        checksum=checksum(payload),
        stored_checksum=checksum(data[PAGE : PAGE + header.stored_bytes]),
    )
    assert header.stored_bytes < 100_000


def test_error_while_writing_gives_the_buffers_back() -> None:
    def fail(record: SealedRecord) -> None:
        raise OSError(28, "No space left on device")

    for codec in (NoCodec(), ZSTD):
        with pytest.raises(OSError, match="No space"):
            sealed_bytes(in_slot(kv_like(100_000, 2)), codec, look=fail)
        assert BUFFERS.lent_bytes == 0


@pytest.mark.parametrize("stored_bytes", [0, -1, 100_001])
def test_codec_beyond_its_bound_is_an_error(stored_bytes: int) -> None:
    with pytest.raises(CodecError, match=f"made {stored_bytes} bytes"):
        sealed_bytes(in_slot(bytes(100_000)), Misbehaving(stored_bytes))
    assert BUFFERS.lent_bytes == 0


def test_codec_with_too_many_parameters_is_an_error() -> None:
    with pytest.raises(CodecError, match="65 bytes of parameters"):
        sealed_bytes(in_slot(bytes(100_000)), Misbehaving(parameters=bytes(65)))


# --- damage ------------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_small_raw_body_is_found() -> None:
    data = sealed_bytes(in_slot(b"some KV bytes"), NoCodec())
    header, body = decode_header(data), in_slot(data[PAGE:])
    for bit in range(8 * PAGE):
        body[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordCorrupt):
            open_payload(header, body, body, buffers=BUFFERS)
        body[bit // 8] ^= 1 << bit % 8
    open_payload(header, body, body, buffers=BUFFERS)
    assert bytes(body[:13]) == b"some KV bytes"


def test_flipped_bit_in_any_byte_of_an_encoded_record_is_found() -> None:
    payload = kv_like(11_000, 2)
    data = bytearray(sealed_bytes(in_slot(payload), ZSTD))
    assert decode_header(data).codec == "zstd"
    rng = random.Random(3)
    for position in range(len(data)):
        flip = 1 << rng.randrange(8)
        data[position] ^= flip
        with pytest.raises(RecordInvalid):
            opened(data, len(payload))
        data[position] ^= flip
    assert opened(data, len(payload)) == payload


@pytest.mark.parametrize("damage", ["stream", "parameters", "payload checksum"])
def test_codec_that_gives_other_bytes_than_it_was_given_is_found(damage: str) -> None:
    payload = kv_like(11_000, 2)
    data = sealed_bytes(in_slot(payload), ZSTD)
    header, body = decode_header(data), in_slot(data[PAGE:])
    if damage == "stream":  # under a right checksum, as a codec with a bug would leave it
        body[header.stored_bytes - 1] ^= 1
        header = header._replace(stored_checksum=checksum(body[: header.stored_bytes]))
    elif damage == "parameters":
        header = header._replace(codec_parameters=b"\x01\x01\x11")
    else:
        header = header._replace(checksum=bytes(16))
    with pytest.raises(RecordCorrupt, match=r"stream is damaged|payload's checksum"):
        open_payload(header, body, slot(11_000), buffers=BUFFERS)


def test_payload_scribbled_on_after_its_commit_is_found() -> None:
    payload = in_slot(kv_like(30_000, 2))
    committed = checksum(payload)
    payload[100] ^= 1
    for codec in (NoCodec(), ZSTD):
        with pytest.raises(RecordCorrupt, match="checksum"):
            opened(sealed_bytes(payload, codec, of=committed), 30_000)


@pytest.mark.parametrize("codec", [NoCodec(), ZSTD], ids=["none", "zstd"])
def test_truncated_or_lengthened_record_is_corrupt(codec: Codec) -> None:
    payload = kv_like(50_000, 2)
    data = sealed_bytes(in_slot(payload), codec)
    for size in (0, 1, 4095, 4096, 4097, len(data) - 4096, len(data) - 1):
        with pytest.raises(RecordCorrupt):
            opened(data[:size], len(payload))
    for extra in (1, 4096, 1 << 20):
        with pytest.raises(RecordCorrupt):
            opened(data + bytes(extra), len(payload))


def test_record_that_shrank_since_its_size_was_asked_is_corrupt() -> None:
    data = sealed_bytes(in_slot(bytes(9000)), NoCodec())
    with pytest.raises(RecordCorrupt, match="ends after 8192 of 16384 bytes"):
        opened(data[:8192], 9000, size=len(data))


def test_record_of_another_chunk_is_foreign() -> None:
    data = sealed_bytes(in_slot(bytes(9000)), NoCodec())
    with pytest.raises(RecordForeign, match="of chunk"):
        opened(data, 9000, ref=REF._replace(key=ChunkKey(b"q" * 32)))


def test_record_of_another_layout_is_foreign() -> None:
    data = sealed_bytes(in_slot(bytes(9000)), NoCodec())
    with pytest.raises(RecordForeign, match="9000 bytes, 9001 were expected"):
        opened(data, 9001)


def test_no_read_is_asked_for_an_impossible_size() -> None:
    def read(buffers: Sequence[memoryview]) -> int:
        raise AssertionError("read was called")

    for size in (0, 4096, 16_385, 20_480, 1 << 62):
        with pytest.raises(RecordCorrupt, match="can't hold a payload of 9000"):
            open_record(REF, 9000, size, slot(9000), read, buffers=BUFFERS)


def test_slot_without_whole_pages_is_a_bug_not_a_corrupt_record() -> None:
    data = sealed_bytes(in_slot(bytes(9000)), NoCodec())
    with pytest.raises(InvariantBroken, match="whole pages"):
        open_record(REF, 9000, len(data), slot(9000)[:9000], reader_of(data), buffers=BUFFERS)


def test_size_tells_raw_from_encoded() -> None:
    assert is_raw_size(9000, 16_384)
    assert not is_raw_size(9000, 12_288)
    assert is_raw_size(1, 8192)


def test_codec_not_installed_here_makes_a_record_foreign() -> None:
    header = _header(stored_bytes=4096, codec="lz5")._replace(stored_checksum=checksum(slot(4096)))
    with pytest.raises(RecordForeign, match="can't be decoded here: no codec 'lz5'"):
        open_payload(header, slot(4096), slot(9000), buffers=BUFFERS)


def test_body_of_another_length_than_the_header_says_is_corrupt() -> None:
    header = _header(stored_bytes=4000, codec="zstd")
    with pytest.raises(RecordCorrupt, match="body has 8192 bytes"):
        open_payload(header, slot(8192), slot(9000), buffers=BUFFERS)


def test_slot_too_small_for_the_payload_is_never_written_to() -> None:
    out = slot(4096)
    with pytest.raises(RecordForeign, match="does not fit"):
        open_payload(_header(stored_bytes=4096, codec="zstd"), slot(4096), out, buffers=BUFFERS)
    assert set(bytes(out)) == {0xEE}


def _header(stored_bytes: int, codec: str) -> RecordHeader:
    return decode_header(sealed_bytes(in_slot(bytes(9000)), NoCodec()))._replace(
        codec=codec, stored_bytes=stored_bytes
    )


# --- opening -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", [NoCodec(), ZSTD], ids=["none", "zstd"])
def test_body_may_lie_in_the_slot_it_is_opened_into(codec: Codec) -> None:
    payload = kv_like(60_000, 2)
    data = sealed_bytes(in_slot(payload), codec)
    header = decode_header(data)
    out = slot(60_000)
    out[: header.body_bytes] = data[PAGE:]
    open_payload(header, out[: header.body_bytes], out, buffers=BUFFERS)
    assert out[:60_000] == payload
    assert BUFFERS.lent_bytes == 0


def test_nothing_is_written_behind_the_slot() -> None:
    payload = kv_like(60_000, 2)
    memory = slot(60_000 + 2 * PAGE)
    out = memory[PAGE:-PAGE]
    for codec in (NoCodec(), ZSTD):
        data = sealed_bytes(in_slot(payload), codec)
        open_record(REF, 60_000, len(data), out, reader_of(data), buffers=BUFFERS)
        assert set(bytes(memory[:PAGE]) + bytes(memory[-PAGE:])) == {0xEE}


def test_steady_path_maps_nothing_new() -> None:
    pool = AlignedBuffers(4, 16 << 20)
    payload = in_slot(kv_like(1 << 20, 2))
    out = slot(1 << 20)
    retained = set()
    for turn in range(6):
        for codec in (NoCodec(), ZSTD):
            with seal(
                ref=REF,
                parent=ChunkKey(b"p" * 32),
                num_parts=1,
                token_start=0,
                token_count=1,
                itemsize=2,
                checksum=checksum(payload),
                payload=payload,
                codec=codec,
                buffers=pool,
            ) as record:
                data = b"".join(record.buffers)
            open_record(REF, 1 << 20, len(data), out, reader_of(data), buffers=pool)
        if turn:
            retained.add(pool.retained_bytes)
    assert len(retained) == 1


# --- lossy codecs ------------------------------------------------------------------------------------------------------


def test_lossy_record_has_the_checksum_of_what_it_decodes_to() -> None:
    payload = kv_like(40_000, 2)
    data = sealed_bytes(in_slot(payload), Truncating())
    assert len(data) < 30_000
    out = slot(40_000)

    def lookup(name: str) -> Codec:
        return Truncating() if name == "truncating" else decoder_for(name)

    header = open_record(REF, 40_000, len(data), out, reader_of(data), buffers=BUFFERS, codec_for=lookup)
    assert header.checksum == checksum(out[:40_000]) != checksum(payload)
    assert out[1:40_000:2] == payload[1::2]


def test_lossy_codec_never_blesses_a_payload_that_was_scribbled_on() -> None:
    payload = in_slot(kv_like(40_000, 2))
    committed = checksum(payload)
    payload[7] ^= 1
    with pytest.raises(RecordCorrupt, match="between its commit and its sealing"):
        sealed_bytes(payload, Truncating(), of=committed)
    assert BUFFERS.lent_bytes == 0
