from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvtiers.model.errors import InvariantBroken, RecordCorrupt, RecordForeign, RecordInvalid
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import round_to_page
from kvtiers.model.namespace import FORMAT_VERSION
from kvtiers.model.parts import RecordRef
from kvtiers.records.checksum import CHECKSUM_BYTES, checksum
from kvtiers.records.header import (
    HEADER_BYTES,
    MAX_PARTS,
    MAX_PAYLOAD_BYTES,
    RecordHeader,
    check_header,
    decode_header,
    encode_header,
)

HEADER = RecordHeader(
    namespace=bytes(range(32)),
    key=ChunkKey(b"k" * 32),
    parent=ChunkKey(b"p" * 32),
    part=1,
    num_parts=3,
    token_start=512,
    token_count=256,
    itemsize=2,
    codec="zstd",
    codec_parameters=b"\x01\x02\x11",
    payload_bytes=5_898_240,
    stored_bytes=3_961_234,
    checksum=bytes(range(16)),
    stored_checksum=bytes(range(16, 32)),
    write_id=bytes(range(32, 48)),
)


def signed(page: bytearray) -> bytes:
    """The page with its header checksum made right again: what only a writer with a bug, or an adversary, could produce."""
    page[16:32] = bytes(16)
    page[16:32] = checksum(page)
    return bytes(page)


def patched(offset: int, data: bytes) -> bytes:
    page = bytearray(encode_header(HEADER))
    page[offset : offset + len(data)] = data
    return signed(page)


@st.composite
def headers(draw: st.DrawFn) -> RecordHeader:
    digest = st.binary(min_size=32, max_size=32)
    num_parts = draw(st.integers(1, MAX_PARTS))
    payload_bytes = draw(st.integers(1, MAX_PAYLOAD_BYTES))
    most_encoded = round_to_page(payload_bytes) - 4096
    name = draw(st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=16))
    raw = most_encoded == 0 or name == "none" or draw(st.booleans())
    digest_of_payload = draw(st.binary(min_size=16, max_size=16))
    return RecordHeader(
        namespace=draw(digest),
        key=ChunkKey(draw(digest)),
        parent=ChunkKey(draw(digest)),
        part=draw(st.integers(0, num_parts - 1)),
        num_parts=num_parts,
        token_start=draw(st.integers(0, 2**63 - 1)),
        token_count=draw(st.integers(1, 2**32 - 1)),
        itemsize=draw(st.sampled_from([1, 2, 4, 8])),
        codec="none" if raw else name,
        codec_parameters=b"" if raw else draw(st.binary(max_size=64)),
        payload_bytes=payload_bytes,
        stored_bytes=payload_bytes if raw else draw(st.integers(1, most_encoded)),
        checksum=digest_of_payload,
        stored_checksum=digest_of_payload if raw else draw(st.binary(min_size=16, max_size=16)),
    )


@given(headers())
def test_header_survives_its_page(header: RecordHeader) -> None:
    page = encode_header(header)
    assert len(page) == HEADER_BYTES
    assert decode_header(page) == header
    assert decode_header(memoryview(page + b"payload")) == header
    assert header.ref == (header.namespace, header.key, header.part)
    assert header.record_bytes % 4096 == 0
    assert 0 <= header.body_bytes - header.stored_bytes < 4096


def test_every_flipped_bit_is_found() -> None:
    page = bytearray(encode_header(HEADER))
    for bit in range(8 * HEADER_BYTES):
        page[bit // 8] ^= 1 << bit % 8
        with pytest.raises(RecordInvalid):
            decode_header(page)
        page[bit // 8] ^= 1 << bit % 8
    assert decode_header(page) == HEADER


@settings(max_examples=200)
@given(st.binary(max_size=9000))
def test_junk_is_invalid(junk: bytes) -> None:
    with pytest.raises(RecordInvalid):
        decode_header(junk)


def test_layout_on_disk_is_pinned() -> None:
    page = encode_header(HEADER)
    assert page[:8] == b"KVTIERS\0"
    assert struct.unpack_from("<I", page, 8) == (FORMAT_VERSION,)
    assert page[32:64] == HEADER.namespace
    assert page[64:96] == HEADER.key
    assert page[96:128] == HEADER.parent
    assert struct.unpack_from("<IIIIQQQ", page, 128) == (1, 3, 2, 256, 512, 5_898_240, 3_961_234)
    assert page[168:184] == HEADER.checksum
    assert page[184:200] == HEADER.stored_checksum
    assert page[200:216] == b"zstd".ljust(16, b"\0")
    assert page[216:220] == b"\x03\x01\x02\x11"
    assert not any(page[220:281])
    assert page[281:297] == HEADER.write_id
    assert not any(page[297:])
    assert page[16:32].hex() == "91c7ffd44c6b26c51824acf64c4b1978"


def test_cut_off_header_is_corrupt() -> None:
    for length in (0, 1, 8, 100, 4095):
        with pytest.raises(RecordCorrupt, match=f"ends after {length} "):
            decode_header(encode_header(HEADER)[:length])


def test_page_of_zeros_is_corrupt() -> None:
    with pytest.raises(RecordCorrupt, match="zeros"):
        decode_header(bytes(4096))


def test_other_file_is_foreign() -> None:
    with pytest.raises(RecordForeign, match=r"not a kvtiers record.*ELF"):
        decode_header(b"\x7fELF".ljust(4096, b"\1"))


def test_other_format_version_is_foreign_and_named() -> None:
    newer = encode_header(HEADER._replace(format_version=FORMAT_VERSION + 1))
    with pytest.raises(
        RecordForeign, match=f"version {FORMAT_VERSION + 1}; .* reads version {FORMAT_VERSION}"
    ):
        decode_header(newer)


def test_damaged_version_is_corrupt_not_foreign() -> None:
    page = bytearray(encode_header(HEADER))
    page[8] ^= 2
    with pytest.raises(RecordCorrupt, match="checksum"):
        decode_header(page)


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        pytest.param(12, b"\1", id="reserved bytes in front"),
        pytest.param(297, b"\1", id="first reserved byte behind"),
        pytest.param(4095, b"\1", id="last reserved byte"),
        pytest.param(128, struct.pack("<I", 3), id="part not below the number of parts"),
        pytest.param(132, struct.pack("<I", MAX_PARTS + 1), id="too many parts"),
        pytest.param(136, struct.pack("<I", 3), id="itemsize"),
        pytest.param(140, struct.pack("<I", 0), id="no tokens"),
        pytest.param(144, struct.pack("<Q", 2**63), id="token start"),
        pytest.param(152, struct.pack("<Q", 0), id="no payload"),
        pytest.param(152, struct.pack("<Q", MAX_PAYLOAD_BYTES + 1), id="payload too large"),
        pytest.param(160, struct.pack("<Q", 0), id="nothing stored"),
        pytest.param(160, struct.pack("<Q", 2**64 - 1), id="more stored than there is"),
        pytest.param(160, struct.pack("<Q", 5_898_240 - 4095), id="no page saved"),
        pytest.param(200, bytes(16), id="no codec name"),
        pytest.param(200, b"zs\0td", id="zero inside the codec name"),
        pytest.param(200, b"z\xff", id="codec name not ASCII"),
        pytest.param(200, b"none", id="raw with parameters and another length"),
        pytest.param(216, b"\x41", id="too many parameters"),
        pytest.param(216, b"\x02", id="bytes behind the parameters"),
    ],
)
def test_nonsense_under_a_right_checksum_is_corrupt(offset: int, data: bytes) -> None:
    with pytest.raises(RecordCorrupt, match="makes no sense"):
        decode_header(patched(offset, data))


@pytest.mark.parametrize(
    "change",
    [
        {"key": b"short"},
        {"checksum": b"short"},
        {"stored_checksum": b"short"},
        {"codec": "none", "codec_parameters": b"", "stored_bytes": 5_898_240},
        {"part": 3},
        {"codec": "näme"},
        {"codec": "a-name-of-17-bytes"},
        {"codec_parameters": bytes(65)},
        {"stored_bytes": 5_898_240},
        {"codec": "none"},
    ],
)
def test_nonsense_is_never_written(change: dict[str, object]) -> None:
    with pytest.raises(InvariantBroken, match="must not be written"):
        encode_header(HEADER._replace(**change))  # type: ignore[arg-type]


def test_header_of_what_was_asked_for_passes() -> None:
    check_header(HEADER, HEADER.ref, HEADER.payload_bytes)


@pytest.mark.parametrize(
    ("ref", "nbytes", "message"),
    [
        (HEADER.ref._replace(namespace=bytes(32)), HEADER.payload_bytes, "of namespace 0001"),
        (HEADER.ref._replace(key=ChunkKey(bytes(32))), HEADER.payload_bytes, "of chunk 6b6b"),
        (HEADER.ref._replace(part=2), HEADER.payload_bytes, "is part 1 .* not 2"),
        (HEADER.ref, HEADER.payload_bytes - 1, "has 5898240 bytes, 5898239 were expected"),
    ],
)
def test_header_of_another_record_is_foreign(ref: RecordRef, nbytes: int, message: str) -> None:
    with pytest.raises(RecordForeign, match=message):
        check_header(HEADER, ref, nbytes)


def test_checksum_is_xxh3_128() -> None:
    assert checksum(b"").hex() == "99aa06d3014798d86001c324468d497f"  # the reference implementation's
    assert len(checksum(memoryview(bytearray(5000)))) == CHECKSUM_BYTES
