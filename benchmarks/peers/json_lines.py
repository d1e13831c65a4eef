"""A process that answers one line of JSON on stdout for each on stdin: `benchmarks/peers/*_worker.py`, in whatever interpreter."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any


def answer_requests(worker: object, close: Callable[[], object]) -> None:
    """`do_NAME(request)` for each {"op": NAME}, until stdin ends or "close" comes; then the process ends.

    What a request raises is answered with {"error": …}. Nothing but answers gets to stdout: what prints there goes to stderr.
    """
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            if request["op"] == "close":
                answers.write(json.dumps(_answer(lambda _: close(), request)) + "\n")
                break
            answers.write(json.dumps(_answer(getattr(worker, f"do_{request['op']}"), request)) + "\n")
    os._exit(0)  # threads that are stuck must not keep the process


def _answer(operation: Callable[[Mapping[str, Any]], object], request: Mapping[str, Any]) -> object:
    try:
        return operation(request) or {}
    except Exception as error:  # noqa: BLE001 - the one who asked decides what a failure means
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}
