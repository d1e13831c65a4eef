"""Codecs by name: ours, and those that other packages register as entry points of the group `kvtiers.codecs`.

An entry point names a `Codec` subclass, or a function, that takes the codec's options as keywords and gives a codec whose
`name` is the entry point's. Nothing is imported before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, Final

from kvtiers.model.errors import CodecError
from kvtiers.records.codecs.base import Codec

ENTRY_POINT_GROUP: Final = "kvtiers.codecs"
_OURS: Final = {
    "none": ("kvtiers.records.codecs.none", "NoCodec"),
    "zstd": ("kvtiers.records.codecs.zstd", "ZstdPlanes"),
}


def codec_names() -> list[str]:
    """Every codec this installation has."""
    return sorted({*_OURS, *entry_points(group=ENTRY_POINT_GROUP).names})


def codec_for(name: str, **options: Any) -> Codec:
    """A codec set up with `options`. Raises CodecError for an unknown name or for options it doesn't take."""
    try:
        codec = _maker_of(name)(**options)
    except TypeError as error:
        raise CodecError(f"codec {name!r} does not take these options: {error}") from error
    if not isinstance(codec, Codec) or codec.name != name:
        raise CodecError(
            f"the entry point {name!r} of {ENTRY_POINT_GROUP} does not give a codec of that name"
        )
    return codec


@lru_cache(maxsize=64)
def decoder_for(name: str) -> Codec:
    """A codec that decodes what any options encoded: the header's parameters tell it the rest."""
    return codec_for(name)


@lru_cache(maxsize=64)
def _maker_of(name: str) -> Callable[..., Any]:
    if name in _OURS:
        module, attribute = _OURS[name]
        maker: Callable[..., Any] = getattr(import_module(module), attribute)
        return maker
    for entry_point in entry_points(group=ENTRY_POINT_GROUP, name=name):
        return entry_point.load()  # type: ignore[no-any-return]
    raise CodecError(
        f"no codec {name!r}; there are {', '.join(codec_names())}. Install the package that brings it"
    )
