from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtiers.model.errors import CodecError
from kvtiers.records.codecs import registry
from kvtiers.records.codecs.registry import codec_for, codec_names, decoder_for

THIRD_PARTY = """
from kvtiers.records.codecs.none import NoCodec

class Mirror(NoCodec):
    name = "mirror"
    def __init__(self, tilt: int = 0) -> None:
        self.tilt = tilt

class Misnamed(NoCodec):
    name = "other"
"""


@pytest.fixture
def third_party(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An installed distribution that registers codecs."""
    (tmp_path / "mirror_codec.py").write_text(THIRD_PARTY)
    info = tmp_path / "mirror_codec-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mirror-codec\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[kvtiers.codecs]\nmirror = mirror_codec:Mirror\nmisnamed = mirror_codec:Misnamed\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    forget()
    yield
    sys.modules.pop("mirror_codec", None)
    forget()


def forget() -> None:
    registry._maker_of.cache_clear()
    registry.decoder_for.cache_clear()


def test_ours_are_there() -> None:
    assert {"none", "zstd"} <= set(codec_names())
    assert codec_for("none").name == "none"
    assert codec_for("zstd", level=7).name == "zstd"


def test_decoder_is_made_once() -> None:
    assert decoder_for("zstd") is decoder_for("zstd")


def test_unknown_codec_names_those_there_are() -> None:
    with pytest.raises(CodecError, match=r"no codec 'lz5'; there are .*none.*zstd"):
        codec_for("lz5")


def test_option_a_codec_does_not_take_is_an_error() -> None:
    with pytest.raises(CodecError, match="does not take these options"):
        codec_for("none", level=3)


@pytest.mark.usefixtures("third_party")
def test_third_party_codec_is_found_by_its_entry_point() -> None:
    assert "mirror" in codec_names()
    assert "mirror_codec" not in sys.modules
    assert vars(codec_for("mirror", tilt=4)) == {"tilt": 4}
    assert decoder_for("mirror").name == "mirror"


@pytest.mark.usefixtures("third_party")
def test_entry_point_with_another_name_than_its_codec_is_refused() -> None:
    with pytest.raises(CodecError, match="does not give a codec of that name"):
        codec_for("misnamed")
