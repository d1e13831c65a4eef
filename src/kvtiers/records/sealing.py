"""From a payload to the pages of a record, and back. Runs on a store's I/O threads; holds no state, does no I/O itself.

Writing: `seal` gives page-aligned buffers for one `pwritev`. Raw payloads are written from the caller's own memory; only the
header and the last, partly filled page go through scratch, so the padding is zero whatever stands behind the payload. What a
codec encodes goes through one pooled buffer. Encoded is stored only if that saves at least one page, so **a record's size tells
a reader whether it is raw**, before it has seen the header.

Reading: `open_record` uses that. A raw record is read in one call, header into a scratch page and payload straight into the
caller's slot; an encoded one in one call into a pooled buffer, and decoded from there into the slot. No payload byte is
copied that need not be, and no read waits for a header to learn where the payload should go.

What always holds: after a return without an error, `out[:nbytes]` has the checksum in the header, and the header is that of
the record asked for. That checksum is over the payload as the reader gets it, so it also covers the codec; an encoded record
has a second one over its stream, so that every flipped bit is found and no decoder is fed a damaged stream.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import numpy as np

from kvtiers.model.errors import CodecError, InvariantBroken, RecordCorrupt, RecordForeign
from kvtiers.model.keys import ChunkKey
from kvtiers.model.layout import PAGE_BYTES, round_to_page
from kvtiers.model.parts import RecordRef
from kvtiers.records.buffers import AlignedBuffers
from kvtiers.records.checksum import checksum as checksum_of
from kvtiers.records.codecs.base import MAX_NAME_BYTES, MAX_PARAMETER_BYTES, Codec
from kvtiers.records.codecs.registry import decoder_for
from kvtiers.records.header import (
    HEADER_BYTES,
    NO_WRITE_ID,
    RAW_CODEC,
    RecordHeader,
    check_header,
    decode_header,
    encode_header,
)

CodecLookup = Callable[[str], Codec]
"""Finds the codec that a header names, or raises CodecError."""

_ZERO_PAGE: Final = bytes(PAGE_BYTES)


class UnknownCodec(RecordForeign):
    """A record that was encoded by a codec that is not installed here: sound, as far as can be told, and not ours to remove."""


class SealedRecord(NamedTuple):
    """A record ready to be written; valid inside the `with` block that made it."""

    header: RecordHeader
    buffers: tuple[memoryview, ...]
    """Header, body and tail: each page-aligned and a multiple of 4 KiB, in order."""
    record_bytes: int
    """Their sum: the record's size."""


@contextmanager
def seal(
    *,
    ref: RecordRef,
    parent: ChunkKey,
    num_parts: int,
    token_start: int,
    token_count: int,
    itemsize: int,
    checksum: bytes,
    payload: memoryview,
    codec: Codec,
    buffers: AlignedBuffers,
    write_id: bytes = NO_WRITE_ID,
) -> Iterator[SealedRecord]:
    """Seal `payload` (format "B", contiguous, made at commit with `checksum`); the keywords are those of a `SealedPart`.

    Raises CodecError when the codec fails, RecordCorrupt when a payload about to be changed by a lossy codec is no longer
    the one that was committed.
    """
    nbytes = len(payload)
    raw = RecordHeader(
        namespace=ref.namespace,
        key=ref.key,
        parent=parent,
        part=ref.part,
        num_parts=num_parts,
        token_start=token_start,
        token_count=token_count,
        itemsize=itemsize,
        codec=RAW_CODEC,
        codec_parameters=b"",
        payload_bytes=nbytes,
        stored_bytes=nbytes,
        checksum=checksum,
        stored_checksum=checksum,
        write_id=write_id,
    )
    if codec.name != RAW_CODEC:
        with buffers.take(HEADER_BYTES + codec.bound(nbytes)) as record:
            header = _encode_body(raw, payload, record[HEADER_BYTES:], codec, buffers)
            if header is not None:
                record[:HEADER_BYTES] = encode_header(header)
                record[HEADER_BYTES + header.stored_bytes : header.record_bytes] = _ZERO_PAGE[
                    : header.body_bytes - header.stored_bytes
                ]
                yield SealedRecord(header, (record[: header.record_bytes],), header.record_bytes)
                return
    if not _is_page_aligned(payload):
        with buffers.take(raw.record_bytes) as record:
            _copy(payload, record[HEADER_BYTES:])
            record[:HEADER_BYTES] = encode_header(raw)
            record[HEADER_BYTES + nbytes :] = _ZERO_PAGE[: raw.body_bytes - nbytes]
            yield SealedRecord(raw, (record,), raw.record_bytes)
            return
    with buffers.take(HEADER_BYTES + PAGE_BYTES) as scratch:
        scratch[:HEADER_BYTES] = encode_header(raw)
        full = nbytes // PAGE_BYTES * PAGE_BYTES
        pages = [scratch[:HEADER_BYTES]]
        if full:
            pages.append(payload[:full])
        if full < nbytes:
            tail = scratch[HEADER_BYTES:]
            tail[:] = _ZERO_PAGE
            tail[: nbytes - full] = payload[full:]
            pages.append(tail)
        yield SealedRecord(raw, tuple(pages), raw.record_bytes)


def is_raw_size(nbytes: int, record_bytes: int) -> bool:
    """Whether a record of this size holds its `nbytes` of payload raw; if not, it is encoded.

    Raises RecordCorrupt for a size that no sound record of such a payload has.
    """
    raw_bytes = HEADER_BYTES + round_to_page(nbytes)
    if record_bytes % PAGE_BYTES or not HEADER_BYTES + PAGE_BYTES <= record_bytes <= raw_bytes:
        raise RecordCorrupt(
            f"a record of {record_bytes} bytes can't hold a payload of {nbytes}: "
            f"it takes at most {raw_bytes}, in pages of {PAGE_BYTES}"
        )
    return record_bytes == raw_bytes


def open_record(
    ref: RecordRef,
    nbytes: int,
    record_bytes: int,
    out: memoryview,
    read: Callable[[Sequence[memoryview]], int],
    *,
    buffers: AlignedBuffers,
    codec_for: CodecLookup = decoder_for,
) -> RecordHeader:
    """Read the record of `ref`, `record_bytes` long, into `out[:nbytes]`, verified. `out`: at least `nbytes` in whole pages.

    `read` is called once; it fills the given page-aligned buffers in order from the record's start, as `preadv` does, and
    returns the number of bytes. Anything may stand in `out` after an error. Raises RecordForeign, RecordCorrupt, and
    whatever `read` raises.
    """
    if len(out) < round_to_page(nbytes):
        raise InvariantBroken(
            f"a slot of {len(out)} bytes for a payload of {nbytes}: it must have whole pages"
        )
    body_bytes = record_bytes - HEADER_BYTES
    if is_raw_size(nbytes, record_bytes):
        with buffers.take(HEADER_BYTES) as page:
            got = read((page, out[:body_bytes]))
            header = _checked(page, ref, nbytes, record_bytes, got)
            open_payload(header, out[:body_bytes], out, buffers=buffers, codec_for=codec_for)
    else:
        with buffers.take(record_bytes) as record:
            got = read((record,))
            header = _checked(record, ref, nbytes, record_bytes, got)
            open_payload(header, record[HEADER_BYTES:], out, buffers=buffers, codec_for=codec_for)
    return header


def open_payload(
    header: RecordHeader,
    stored: memoryview,
    out: memoryview,
    *,
    buffers: AlignedBuffers,
    codec_for: CodecLookup = decoder_for,
) -> None:
    """Decode and verify the body `stored` (with its padding) into `out[:header.payload_bytes]`.

    For a raw record `stored` may be the memory of `out`: nothing is copied then. Raises RecordCorrupt for wrong padding,
    stream or checksum, RecordForeign for a codec that isn't installed.
    """
    if len(stored) != header.body_bytes:
        raise RecordCorrupt(f"the record's body has {len(stored)} bytes, its header says {header.body_bytes}")
    if len(out) < header.payload_bytes:
        raise RecordForeign(f"a payload of {header.payload_bytes} bytes does not fit into {len(out)}")
    padding = bytes(stored[header.stored_bytes :])
    if padding != _ZERO_PAGE[: len(padding)]:
        raise RecordCorrupt("the padding behind the payload is not zero")
    payload = out[: header.payload_bytes]
    body = stored[: header.stored_bytes]
    if header.codec == RAW_CODEC:
        if _address(body) != _address(payload):
            _copy(body, payload)
    elif checksum_of(body) != header.stored_checksum:
        raise RecordCorrupt("the checksum of the encoded payload is wrong")
    elif np.may_share_memory(_bytes_of(stored), _bytes_of(out)):
        with buffers.take(len(body)) as moved:
            _copy(body, moved)
            _decode(header, moved[: len(body)], payload, codec_for)
    else:
        _decode(header, body, payload, codec_for)
    if checksum_of(payload) != header.checksum:
        raise RecordCorrupt("the payload's checksum is wrong")


def _encode_body(
    raw: RecordHeader, payload: memoryview, out: memoryview, codec: Codec, buffers: AlignedBuffers
) -> RecordHeader | None:
    """Encode into `out` and give the header for it; None if that would not save a page."""
    parameters = codec.parameters(raw.itemsize)
    if len(parameters) > MAX_PARAMETER_BYTES or len(codec.name) > MAX_NAME_BYTES:
        raise CodecError(
            f"codec {codec.name!r} asks for {len(parameters)} bytes of parameters; a header has room for "
            f"{MAX_PARAMETER_BYTES} and for a name of {MAX_NAME_BYTES}"
        )
    stored_bytes = codec.encode(payload, out[: codec.bound(len(payload))], raw.itemsize)
    if not 0 < stored_bytes <= codec.bound(len(payload)):
        raise CodecError(
            f"codec {codec.name!r} made {stored_bytes} bytes, its bound is {codec.bound(len(payload))}"
        )
    if round_to_page(stored_bytes) >= raw.body_bytes:
        return None
    header = raw._replace(
        codec=codec.name,
        codec_parameters=parameters,
        stored_bytes=stored_bytes,
        stored_checksum=checksum_of(out[:stored_bytes]),
    )
    if not codec.lossy:
        return header
    if checksum_of(payload) != raw.checksum:
        raise RecordCorrupt("the payload changed between its commit and its sealing")
    with buffers.take(len(payload)) as decoded:
        codec.decode(out[:stored_bytes], decoded[: len(payload)], parameters)
        return header._replace(checksum=checksum_of(decoded[: len(payload)]))


def _checked(page: memoryview, ref: RecordRef, nbytes: int, record_bytes: int, got: int) -> RecordHeader:
    if got != record_bytes:
        raise RecordCorrupt(f"the record ends after {got} of {record_bytes} bytes")
    header = decode_header(page)
    check_header(header, ref, nbytes)
    if header.record_bytes != record_bytes:
        raise RecordCorrupt(f"the record has {record_bytes} bytes, its header says {header.record_bytes}")
    return header


def _decode(header: RecordHeader, body: memoryview, payload: memoryview, codec_for: CodecLookup) -> None:
    try:
        codec = codec_for(header.codec)
    except CodecError as error:
        raise UnknownCodec(f"the record can't be decoded here: {error}") from error
    try:
        codec.decode(body, payload, header.codec_parameters)
    except CodecError as error:
        raise RecordCorrupt(f"the record's stream is damaged: {error}") from error


def _bytes_of(view: memoryview) -> np.ndarray[tuple[int], np.dtype[np.uint8]]:
    return np.frombuffer(view, np.uint8)


def _address(view: memoryview) -> int:
    address: int = _bytes_of(view).__array_interface__["data"][0]
    return address


def _is_page_aligned(view: memoryview) -> bool:
    return _address(view) % PAGE_BYTES == 0


def _copy(source: memoryview, target: memoryview) -> None:
    """Into the first bytes of `target`, with the GIL released."""
    np.copyto(_bytes_of(target)[: len(source)], _bytes_of(source))
