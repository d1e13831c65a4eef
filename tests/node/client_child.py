"""A client in a process of its own, to be killed, stopped and forked by the tests.

`client_child.py SOCKET ENGINE ACTION [DOCUMENT]`; ENGINE in hex, or `-`. It says `holding …` when it has what the action names, and
then waits: to be ended, or for a line on stdin.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
from pathlib import Path

import numpy as np

from kvtiers.testing.direct_engine import DirectEngine

CHUNKS = 4


def say(*words: object) -> None:
    os.write(1, " ".join(map(str, words)).encode() + b"\n")


def fork_without_hooks() -> int:
    """As a library in C would do it: Python's `register_at_fork` hooks don't run."""
    return int(ctypes.PyDLL(None).fork())


def main() -> None:
    socket, token, action, *rest = sys.argv[1:]
    token_bytes = b"" if token == "-" else bytes.fromhex(token)
    engine = DirectEngine(Path(socket), engine=token_bytes).connect()
    tokens = engine.tokens(int(rest[0]) if rest else 1, CHUNKS)
    if action == "connect":
        say("holding")
        sys.stdin.readline()
        engine.client.close()
        say("closed")
    elif action == "store":
        store = engine.open_store(tokens)
        assert store.indices
        engine.slots(store, 0)[0][:100] = 7  # in the middle of writing
        say("holding", *store.offsets[:, 0])
    elif action == "hoard":
        given = 0
        for document in range(100, 1000):
            store = engine.open_store(engine.tokens(document, CHUNKS))
            given += len(store.indices)
            if store.refused:
                break
        say("holding", given)
    elif action == "load":
        load = engine.stage(tokens)
        assert load.num_chunks == CHUNKS
        say("holding", *load.offsets[:, 0])
    elif action == "fork":
        store = engine.open_store(tokens)
        assert store.indices
        child = fork_without_hooks()
        if child == 0:
            time.sleep(120)  # with the socket open
            os._exit(0)
        say("holding", child)
    elif action == "fork-write":
        store = engine.open_store(tokens)
        view = engine.slots(store, 0)[0]
        child = fork_without_hooks()
        if child == 0:
            view[0] = 1  # not mapped here
            os._exit(0)
        _, status = os.waitpid(child, 0)
        say("holding", os.waitstatus_to_exitcode(status))
    elif action == "late-writer":
        store = engine.open_store(tokens)
        slots = [engine.slots(store, row)[0] for row in range(len(store.indices))]
        say("holding", *store.offsets[:, 0])
        time.sleep(0.2)  # it is stopped here, for longer than the service has patience
        sys.stdin.readline()
        for slot in slots:
            np.copyto(slot, np.full_like(slot, 0xEE))  # it does not know yet that it was given up
        engine.client.commit(store)
        engine.client.step()
        say("written")
        sys.stdin.readline()
        engine.until(lambda: engine.client.counters["losses"] == 1)
        engine.connect()
        say("back", store.committed)
    sys.stdin.readline()


if __name__ == "__main__":
    main()
