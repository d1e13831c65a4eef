from __future__ import annotations

import pytest

from kvtiers.model.errors import CodecError
from kvtiers.records.codecs.base import Codec
from kvtiers.records.codecs.none import NoCodec
from kvtiers.testing.codec_kit import CodecContract, encoded


class TestNoCodec(CodecContract):
    @pytest.fixture
    def codec(self) -> Codec:
        return NoCodec()


def test_stored_bytes_are_the_payload() -> None:
    assert bytes(encoded(NoCodec(), b"payload", 1)) == b"payload"


def test_too_little_room_is_refused() -> None:
    with pytest.raises(CodecError, match="do not fit"):
        NoCodec().encode(memoryview(b"abc"), memoryview(bytearray(2)), 1)
