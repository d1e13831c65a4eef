"""LoRA adapters: vLLM's block hashes name them by name and path, which stay when an adapter is trained anew.

So the keys of their chunks have the adapter's weights in them too, taken at the first request of each one that the engine loads. What
can't be told apart is not cached: an adapter that is no directory here, that is loaded in place of another, or whose files are
overwritten while the engine has it (it may read them again at any time). Files that are overwritten between its loading and its first
request are not noticed: nobody tells a connector when vLLM loads.

Reading an adapter takes seconds and its file system may hang, so one thread of our own does it, and nothing here touches a file on the
engine's. Each request asks for a look that begins after it came, and is answered from memory once there was one. No locks: the
engine's thread raises `asked` before it reads `queued`, the other one lowers `queued` before it reads `asked`, so that no question is
missed; what was found is the other one's to write, `looked` last.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Final, NamedTuple

from kvtiers.model.namespace import ModelNotFound, fingerprint_model

_log = logging.getLogger(__name__)
_MOST: Final = 1024
"""Adapters remembered; more are not cached: looked at later, their files may not be what the engine has loaded."""


@dataclass(slots=True, eq=False)
class Adapter:
    """One that the engine has loaded, as the last look found it."""

    path: Path
    key: bytes | None = None
    """What to mix into the keys. None: not read yet, or not to be cached (`looked` tells which)."""
    files: frozenset[tuple[str, int, int]] = frozenset()
    """Name, size and time of change."""
    asked: int = 0
    """Looks that requests have asked for."""
    looked: int = 0
    """Of these, those that a look has answered since."""
    queued: bool = False
    """Whether a look is to begin; several requests share it."""


class Asked(NamedTuple):
    """One request's question."""

    adapter: Adapter
    number: int

    @property
    def answered(self) -> bool:
        """Whether its files were looked at since the request came."""
        return self.adapter.looked >= self.number

    @property
    def key(self) -> bytes | None:
        """As far as is known by now; None once answered: the request is not to be cached."""
        return self.adapter.key


class Adapters:
    """The adapters that requests have named, by vLLM's number for each one loaded."""

    def __init__(self, fingerprint: Callable[[Path], str] = fingerprint_model) -> None:
        self._fingerprint = fingerprint
        self._known: dict[tuple[int, str], Adapter] = {}
        self._queue: SimpleQueue[Adapter | None] = SimpleQueue()  # each adapter is in it once
        self._thread: threading.Thread | None = None

    def ask(self, lora: Any) -> Asked | None:
        """What stands for a request's adapter, once it is known; None if the request is not to be cached."""
        if lora.load_inplace:
            return None
        name = (lora.lora_int_id, lora.lora_path)
        adapter = self._known.get(name)
        if adapter is None:
            if len(self._known) >= _MOST:
                return None
            adapter = self._known[name] = Adapter(Path(lora.lora_path))
        adapter.asked += 1
        if not adapter.queued:
            adapter.queued = True
            self._queue.put(adapter)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kvtiers-vllm-adapters", daemon=True)
            self._thread.start()
        return Asked(adapter, adapter.asked)

    def close(self) -> None:
        """End the thread after the look that is under way. Never waits."""
        if self._thread is not None:
            self._queue.put(None)

    # --- the looking thread -------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (adapter := self._queue.get()) is not None:
            adapter.queued = False
            number = adapter.asked
            try:
                self._look(adapter)
            except Exception:  # noqa: BLE001 - what can't be looked at can't be told apart
                _log.exception(
                    "the adapter %s could not be looked at; this is a bug in kvtiers", adapter.path
                )
                adapter.key = None
            adapter.looked = number

    def _look(self, adapter: Adapter) -> None:
        if not adapter.looked:
            adapter.files = _files(adapter.path)  # before they are read
            adapter.key = self._read(adapter.path)
        elif adapter.key is not None:
            self._look_again(adapter)

    def _look_again(self, adapter: Adapter) -> None:
        files = _files(adapter.path)
        if files in (adapter.files, frozenset()):  # one that is gone can't be read again either
            return
        adapter.files = files
        if self._read(adapter.path) != adapter.key:
            adapter.key = None
            _log.warning(
                "requests with the adapter %s are not cached any more: its files were overwritten, and which of them the engine "
                "has can't be told. Load what was trained anew from another directory",
                adapter.path,
            )

    def _read(self, path: Path) -> bytes | None:
        try:
            return self._fingerprint(path).encode()
        except (ModelNotFound, OSError) as error:
            _log.warning("requests with the adapter %s are not cached: %s", path, error)
            return None


def _files(path: Path) -> frozenset[tuple[str, int, int]]:
    """What lies there; nothing if it can't be looked at."""
    try:
        stats = [(entry.name, entry.stat()) for entry in path.iterdir()]
    except OSError:
        return frozenset()
    return frozenset((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
