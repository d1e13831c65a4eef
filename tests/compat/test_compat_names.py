"""The package's front: every name is there, loads lazily, and is documented."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import kvtiers.compat
from kvtiers.compat.answers import Answer
from kvtiers.compat.key_locks import KeyLocks
from kvtiers.compat.loop_thread import LoopThread
from kvtiers.model.errors import CacheClosed, DeadlineExceeded, KvtiersError, StoreTransient

DOCS = Path(__file__).parents[2] / "docs" / "compat.md"


def test_every_public_name_is_there_and_in_the_docs() -> None:
    text = DOCS.read_text()
    for name in kvtiers.compat.__all__:
        assert getattr(kvtiers.compat, name) is not None
        assert f"`{name}" in text, f"docs/compat.md does not mention {name}"
    with pytest.raises(AttributeError):
        kvtiers.compat.NoSuchName  # noqa: B018


def test_one_name_does_not_load_the_others() -> None:
    code = (
        "import sys\nfrom kvtiers.compat import StorageBackend, DiskBackend, TieredLRUPolicy, MemoryAllocator\n"
        "print([name for name in ('torch', 'pydantic', 'kvtiers.runtime.cache') if name in sys.modules])"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert told.stdout.strip() == "[]"


def test_every_error_is_ours() -> None:
    from kvtiers.compat import errors

    own = [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and value.__module__ == errors.__name__
    ]
    assert len(own) == 5
    assert all(issubclass(error, KvtiersError) for error in own)


# --- the pieces the facades share ----------------------------------------------------------------------------------------


def test_an_answer_survives_those_who_give_up() -> None:
    answer: Answer[int] = Answer()

    async def give_up() -> None:
        with pytest.raises(DeadlineExceeded, match="the work has not ended"):
            await answer.wait(0.01, "the work")
        task = asyncio.create_task(answer.wait(10, "the work"))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert answer._wakers == []

    asyncio.run(give_up())
    abandoned = asyncio.new_event_loop()
    task = abandoned.create_task(answer.wait(10, "the work"))
    abandoned.run_until_complete(asyncio.sleep(0))
    threading.Thread(target=answer.succeed, args=(7,)).start()
    assert abandoned.run_until_complete(task) == 7
    abandoned.close()
    answer.fail(ValueError("too late"))
    assert answer.wait_blocking(0, "the work") == 7
    assert asyncio.run(answer.wait(0, "the work")) == 7


def test_an_answer_to_a_closed_loop_breaks_nobody() -> None:
    answer: Answer[int] = Answer()
    loop = asyncio.new_event_loop()
    task = loop.create_task(answer.wait(10, "the work"))
    loop.run_until_complete(asyncio.sleep(0))
    assert len(answer._wakers) == 1
    loop.close()
    answer.succeed(1)
    assert answer.done()
    task._log_destroy_pending = False  # type: ignore[attr-defined]
    task.get_coro().close()


def test_an_error_is_raised_as_often_as_it_is_asked_for() -> None:
    answer: Answer[int] = Answer()
    answer.fail(ValueError("no"))
    for _ in range(3):
        with pytest.raises(ValueError, match="no") as caught:
            answer.wait_blocking(0, "the work")
        assert len(caught.traceback) <= 3


def test_a_loop_thread_runs_passes_errors_and_ends() -> None:
    loop = LoopThread("test-loop")

    async def fails(error: BaseException) -> int:
        raise error

    async def works() -> int:
        return 1

    assert loop.run(works, 10) == 1
    for error in (ValueError("mine"), TimeoutError("mine")):
        with pytest.raises(type(error), match="mine"):
            loop.run(lambda error=error: fails(error), 10)  # type: ignore[misc]
    assert loop.close(10)
    assert loop.close(10)
    with pytest.raises(CacheClosed):
        loop.run(works, 10)
    assert not [thread for thread in threading.enumerate() if "test-loop" in thread.name]


def test_one_key_at_a_time_and_nothing_kept() -> None:
    locks = KeyLocks(patience_s=0.01)
    with locks.held("a"), locks.held("b"):
        assert len(locks) == 2
        with pytest.raises(StoreTransient, match="hangs"), locks.held("a"):
            pass
    assert len(locks) == 0
