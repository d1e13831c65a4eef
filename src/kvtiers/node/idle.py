"""For engines that make no steps while they have nothing to do: the arena of a service that is gone is let go of all the same.

As long as any engine maps the old arena its memory is taken, and the next service waits. One daemon thread for each connection
sleeps in `poll` until its socket ends, drops the mapping, and ends; it touches nothing else of the client.
"""

from __future__ import annotations

import logging
import os
import select
import threading
import weakref

from kvtiers.node.client import NodeClient
from kvtiers.node.mapped_arena import MappedArena

_log = logging.getLogger(__name__)


def watch_while_idle(client: NodeClient) -> None:
    """From its next connection on. Call it before the first `step`."""
    client.on_connected = _watch


def _watch(fd: int, arena: MappedArena) -> None:
    watched = os.dup(fd)  # the client may close its own at any time
    thread = threading.Thread(
        target=_wait, args=(watched, weakref.ref(arena)), name="kvtiers-idle", daemon=True
    )
    try:
        thread.start()
    except RuntimeError as error:  # no more threads: then the next step notices
        os.close(watched)
        _log.warning("the cache's end will be noticed at the next step only: %s", error)


def _wait(fd: int, arena: weakref.ref[MappedArena]) -> None:
    try:
        poll = select.poll()
        poll.register(fd, select.POLLRDHUP)
        poll.poll()  # ends with the connection: the client shuts it down, the service closes it, or is gone
        mapped = arena()
        if mapped is not None:
            mapped.drop()
    finally:
        os.close(fd)
