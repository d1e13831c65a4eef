"""Ctrl-C at random moments of the main thread: no lease is lost, no book is wrong, nothing waits for ever."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from kvtiers.runtime.uninterrupted import Uninterrupted

CHILD = Path(__file__).with_name("interrupt_child.py")
SETTINGS: list[dict[str, Any]] = [
    {},
    {"gpu.capacity": "1Mi", "gpu.device": "cpu", "disk.write_policy": "write_on_evict"},
    {"cpu.enabled": False},
]


@pytest.mark.parametrize("values", SETTINGS, ids=["plain", "gpu, on evict", "no cpu"])
def test_150_interrupts_at_random_moments_leave_the_books_right(
    tmp_path: Path, values: dict[str, Any]
) -> None:
    done = subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path / "cache"), "1", json.dumps(values)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"problems": [], "closed": True, "in_time": True}


class TestUninterrupted:
    """The block itself, with a handler that says when it was called."""

    @pytest.fixture(autouse=True)
    def calls(self) -> Any:
        calls: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, _: calls.append(number))
        yield calls
        signal.signal(signal.SIGINT, before)

    def test_an_interrupt_is_handled_at_the_end_of_the_outermost_block(self, calls: list[int]) -> None:
        with Uninterrupted():
            with Uninterrupted():
                signal.raise_signal(signal.SIGINT)
            assert calls == []
        assert calls == [signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        assert calls == [signal.SIGINT] * 2

    def test_a_handler_that_was_set_meanwhile_stays(self, calls: list[int]) -> None:
        def other(*_: object) -> None:
            calls.append(0)

        with Uninterrupted():
            signal.signal(signal.SIGINT, other)
        assert signal.getsignal(signal.SIGINT) is other

    def test_what_ignores_interrupts_goes_on_ignoring_them(self, calls: list[int]) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        assert calls == []

    def test_other_threads_leave_the_handler_alone(self, calls: list[int]) -> None:
        before, seen = signal.getsignal(signal.SIGINT), []

        def look() -> None:
            with Uninterrupted():
                seen.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        assert seen == [before]
        assert calls == []
