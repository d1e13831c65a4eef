"""LoRA adapters: vLLM's block hashes name them by name and path, which stay when an adapter is trained anew.

So the keys of their chunks have the adapter's weights in them too, taken at the first request of each one that the engine loads. What
can't be told apart is not cached: an adapter that is no directory here, that is loaded in place of another, or whose files are
overwritten while the engine has it (it may read them again at any time). Files that are overwritten between its loading and its first
request are not noticed: nobody tells a connector when vLLM loads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from kvtiers.model.namespace import ModelNotFound, fingerprint_model

_log = logging.getLogger(__name__)
_MOST: Final = 1024
"""Adapters remembered; more are not cached: looked at later, their files may not be what the engine has loaded."""


@dataclass(slots=True)
class Known:
    """An adapter as it was found."""

    fingerprint: bytes | None
    """None: not cached."""
    files: frozenset[tuple[str, int, int]]
    """Name, size and time of change."""


class Adapters:
    """The adapters that requests have named, by vLLM's number for each one loaded."""

    def __init__(self, fingerprint: Callable[[Path], str] = fingerprint_model) -> None:
        self._fingerprint = fingerprint
        self._known: dict[tuple[int, str], Known] = {}

    def key_of(self, lora: Any | None) -> bytes | None:
        """What to mix into the keys: nothing without an adapter, None if the request is not to be cached."""
        if lora is None:
            return b""
        if lora.load_inplace:
            return None
        name, path = (lora.lora_int_id, lora.lora_path), Path(lora.lora_path)
        known = self._known.get(name)
        if known is None:
            if len(self._known) >= _MOST:
                return None
            files = _files(path)  # before they are read
            known = self._known[name] = Known(self._look(path), files)
        elif known.fingerprint is not None:
            self._look_again(known, path)
        return known.fingerprint

    def _look(self, path: Path) -> bytes | None:
        try:
            return self._fingerprint(path).encode()
        except (ModelNotFound, OSError) as error:
            _log.warning("requests with the adapter %s are not cached: %s", path, error)
            return None

    def _look_again(self, known: Known, path: Path) -> None:
        files = _files(path)
        if files in (known.files, frozenset()):  # one that is gone can't be read again either
            return
        known.files = files
        if self._look(path) != known.fingerprint:
            known.fingerprint = None
            _log.warning(
                "requests with the adapter %s are not cached any more: its files were overwritten, and which of them the engine "
                "has can't be told. Load what was trained anew from another directory",
                path,
            )


def _files(path: Path) -> frozenset[tuple[str, int, int]]:
    """What lies there; nothing if it can't be looked at."""
    try:
        stats = [(entry.name, entry.stat()) for entry in path.iterdir()]
    except OSError:
        return frozenset()
    return frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
