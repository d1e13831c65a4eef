"""LMCache's turns: a process of its own, in its own virtualenv, that answers one line of JSON on stdout for each on stdin.

    {"op": "hello"}                                    → {"name", "variants": {"cpu": […], "disk": […], "redis": […], "lookup": […]}}
    {"op": "open", "shape", "chunks", "directory", "endpoint"} → {}   one shape at a time; opening another closes the last
    {"op": "store", "tier", "variant"}                 → {"seconds", "bytes"}   a new prompt, until it is kept in that tier
    {"op": "load", "tier", "variant", "hot": false}    → {"seconds", "bytes"}   that prompt, into the engine's KV; from disk with
                                                         the page cache dropped, unless it is to be hot
    {"op": "lookup", "variant", "tokens", "hit"}       → {"seconds"}
    {"op": "keep", "variant", "prompt", "patience_s"}  → {"tokens"}   prompt by number: how much was kept on disk in that time
    {"op": "serve", "variant", "prompt"}               → {"tokens", "wrong_chunks"}   from disk: how much was served, and how much of
                                                         that is not what had been stored
    {"op": "state", "variant"}                         → {"unfinished", "held_bytes", "disk_bytes"}
    {"op": "close"}                                    → {}   the process ends

What fails is answered with {"error"}. The first load of each variant is checked bit by bit. LMCache's log goes to stderr.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

_ENVIRONMENT = {
    "LMCACHE_TRACK_USAGE": "false",
    "LMCACHE_LOG_LEVEL": os.environ.get("LMCACHE_LOG_LEVEL", "WARNING"),
    "PYTHONHASHSEED": "0",  # or the in-process path would know no key of an earlier process
    "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin after a turn take the cores of whoever is next
}


def main() -> None:
    """Until it is told to close. Some settings are read when Python or a library starts, so it starts itself anew with them."""
    if any(os.environ.get(name) != value for name, value in _ENVIRONMENT.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | _ENVIRONMENT)  # noqa: S606 - itself
    # This folder has an lmcache.py that would hide the peer's package.
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from benchmarks.peers.json_lines import answer_requests
    from benchmarks.peers.lmcache_turns import Worker

    worker = Worker()
    answer_requests(worker, worker.close)


if __name__ == "__main__":
    main()
