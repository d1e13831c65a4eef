"""What is to happen when an object is dropped without having been closed, as programs written for other caches do.

The collector runs at any moment on any thread, also on one that holds the very lock that letting go needs. So the work is
done on a fresh daemon thread, in the process that made the object (a forked child has copies of what is its parent's), and not at
the end of the interpreter: what the process held ends with it.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable


def when_collected(thing: object, let_go: Callable[[], object]) -> Callable[[], object]:
    """Call `let_go`, which must not refer to `thing`, after the last reference to it. Returns a call that takes this back."""
    finalizer = weakref.finalize(thing, _let_go_elsewhere, let_go, os.getpid())
    finalizer.atexit = False
    return finalizer.detach


def _let_go_elsewhere(let_go: Callable[[], object], owner: int) -> None:
    if os.getpid() == owner:
        threading.Thread(target=let_go, name="kvtiers-let-go", daemon=True).start()
