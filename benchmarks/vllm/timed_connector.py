"""`KvtiersConnector`, with the time that the engine's threads spend in it written down every second.

Named by `kv_connector_module_path`; one file for each process in the folder that KVTIERS_TIMES names.
"""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvtiers.integrations.vllm import KvtiersConnector

_METHODS = (
    "on_new_request",
    "get_num_new_matched_tokens",
    "update_state_after_alloc",
    "build_connector_meta",
    "update_connector_output",
    "request_finished_all_groups",
    "has_pending_push_work",
    "get_kv_connector_stats",
    "start_load_kv",
    "wait_for_save",
    "get_finished",
    "get_block_ids_with_load_errors",
    "build_connector_worker_meta",
)
_steps = {"seconds": 0.0, "count": 0, "began": 0.0}
"""Of the scheduler's process: from what a step is told to what it has done, of those that compute something."""
_spent: dict[str, list[float]] = {name: [0.0, 0.0] for name in _METHODS}
_began = time.perf_counter()
_written = [_began]
_EVERY_S = 1.0


def _timed(name: str) -> Callable[..., Any]:
    method = getattr(KvtiersConnector, name)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        began = time.perf_counter()
        try:
            return method(self, *args, **kwargs)
        finally:
            ended = time.perf_counter()
            entry = _spent[name]
            entry[0] += ended - began
            entry[1] += 1
            _step(name, args, began, ended)
            if ended - _written[0] > _EVERY_S:
                _write(ended)

    return call


def _step(name: str, args: tuple[Any, ...], began: float, ended: float) -> None:
    if name == "build_connector_meta":
        _steps["began"] = ended if args[0].total_num_scheduled_tokens else 0.0
    elif name == "update_connector_output" and _steps["began"]:
        _steps["seconds"] += began - _steps["began"]
        _steps["count"] += 1
        _steps["began"] = 0.0


TimedConnector = type("TimedConnector", (KvtiersConnector,), {name: _timed(name) for name in _METHODS})


def _write(now: float) -> None:
    """Engines are killed, so there is no end to wait for."""
    _written[0] = now
    folder = os.environ.get("KVTIERS_TIMES")
    if folder:
        file = Path(folder) / f"{os.getpid()}.json"
        file.write_text(
            json.dumps(
                {"cpu_s": time.process_time(), "lived_s": now - _began, "steps": _steps, "spent": _spent}
            )
        )
