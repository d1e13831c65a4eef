"""Frames survive any cut and nothing else does."""

from __future__ import annotations

from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.node import protocol as p
from kvtiers.node.framing import (
    MAX_FRAME_BYTES,
    FrameDecoder,
    ProtocolError,
    answer_decoder,
    encode_batch,
    encode_batches,
    request_decoder,
)

OPS = st.integers(1, 1 << 62)
DIGESTS = st.binary(min_size=32, max_size=32)
KEYS = st.lists(DIGESTS, max_size=5).map(b"".join)
REQUESTS: st.SearchStrategy[p.Request] = st.one_of(
    st.builds(p.Hello, st.integers(0, 9), st.text(max_size=20), st.binary(max_size=16)),
    st.builds(p.Attach, OPS, DIGESTS, st.just([(0, 0, 4096)]), st.integers(1, 512), st.integers(1, 4)),
    st.builds(p.Stage, OPS, st.integers(0, 99), KEYS, st.integers(0, 5000)),
    st.builds(p.OpenStore, OPS, st.integers(0, 99), DIGESTS, KEYS, st.integers(0, 5)),
    st.builds(p.Commit, OPS, OPS, st.none() | st.lists(st.integers(0, 99), max_size=5)),
    st.builds(p.Release, OPS),
    st.builds(p.Abort, OPS),
    st.builds(p.Settled, OPS),
    st.builds(p.Report, st.floats(0, 1), st.floats(0, 1e6)),
    st.builds(p.GetStats, OPS),
    st.just(p.Alive()),
    st.just(p.Goodbye()),
)
BATCHES = st.lists(st.lists(REQUESTS, max_size=4), max_size=4)


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = sorted({0, len(stream), *(place % (len(stream) + 1) for place in places)})
    return [stream[start:end] for start, end in pairwise(edges)]


@given(BATCHES, st.lists(st.integers(0, 1 << 20), max_size=20))
def test_batches_arrive_whole_however_they_are_cut(batches: list[list[p.Request]], places: list[int]) -> None:
    decoder = request_decoder()
    got = []
    for piece in cut(b"".join(encode_batch(batch) for batch in batches), places):
        decoder.feed(piece)
        got += list(decoder.batches())
    assert got == batches
    assert decoder.pending_bytes == 0


@given(BATCHES, st.binary(min_size=1, max_size=200), st.lists(st.integers(0, 1 << 20), max_size=10))
def test_garbage_ends_the_stream_and_nothing_before_it(
    batches: list[list[p.Request]], garbage: bytes, places: list[int]
) -> None:
    decoder = request_decoder()
    got: list[list[p.Request]] = []
    stream = b"".join(encode_batch(batch) for batch in batches)
    for piece in cut(stream, places):
        decoder.feed(piece)
        got += list(decoder.batches())
    try:
        decoder.feed(len(garbage).to_bytes(4, "little") + garbage)
        got += list(decoder.batches())
    except ProtocolError:
        with pytest.raises(ProtocolError):
            list(decoder.batches())
    else:  # it happened to make sense
        assert isinstance(msgspec.msgpack.decode(garbage), list)
    assert got[: len(batches)] == batches


@given(st.binary(max_size=400), st.lists(st.integers(0, 400), max_size=8))
def test_noise_raises_nothing_but_protocol_errors(noise: bytes, places: list[int]) -> None:
    for decoder in (request_decoder(), answer_decoder()):
        for piece in cut(noise, places):
            decoder.feed(piece)
            try:
                list(decoder.batches())
            except ProtocolError:
                break


def test_frame_that_is_too_long_is_refused_before_it_is_there() -> None:
    decoder = request_decoder()
    decoder.feed((MAX_FRAME_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(ProtocolError, match="at most"):
        list(decoder.batches())


@pytest.mark.parametrize(
    "message",
    [
        p.Stage(0, 1, b"", 0),
        p.Stage(1, 1, bytes(32 * (p.MAX_KEYS + 1)), 0),
        p.Stage(1, 1, b"", -1),
        p.OpenStore(1, 1, bytes(31), b""),
        p.Attach(1, bytes(32), [], 16, 2),
        p.Attach(1, bytes(32), [(0, 0, 0)], 16, 2),
        p.Report(float("nan"), 0.0),
        p.Report(1.5, 0.0),
    ],
)
def test_values_out_of_bounds_are_nonsense(message: p.Request) -> None:
    decoder = request_decoder()
    decoder.feed(encode_batch([message]))
    with pytest.raises(ProtocolError):
        list(decoder.batches())


def test_deeply_nested_lists_are_nonsense() -> None:
    body = b"\x91" * 100_000 + b"\x00"
    decoder: FrameDecoder[object] = FrameDecoder(list[object])
    decoder.feed(len(body).to_bytes(4, "little") + body)
    with pytest.raises(ProtocolError):
        list(decoder.batches())


def test_batch_larger_than_a_frame_becomes_several() -> None:
    messages: list[p.Request] = [p.Stage(op, 1, bytes(32 * p.MAX_KEYS), 0) for op in range(1, 20)]
    with pytest.raises(ProtocolError):
        encode_batch(messages)
    decoder = request_decoder()
    decoder.feed(encode_batches(messages))
    batches = list(decoder.batches())
    assert len(batches) > 1
    assert [message for batch in batches for message in batch] == messages


def test_batch_of_more_messages_than_a_frame_has_is_nonsense_and_never_sent() -> None:
    count = p.MAX_BATCH + 1
    body = b"\xdc" + count.to_bytes(2, "big") + b"\x91\x0a" * count  # Alive
    decoder = request_decoder()
    decoder.feed(len(body).to_bytes(4, "little") + body)
    with pytest.raises(ProtocolError, match="length"):
        list(decoder.batches())
    messages: list[p.Request] = [p.Release(op) for op in range(1, count + 1)]
    with pytest.raises(ProtocolError, match="messages"):
        encode_batch(messages)
    decoder = request_decoder()
    decoder.feed(encode_batches(messages))
    assert [message for batch in decoder.batches() for message in batch] == messages
