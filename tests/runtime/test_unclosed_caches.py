"""Nobody has called `close`: the end of the process writes out what only memory holds, the collector warns and lets go."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from kvtiers.runtime.cache import TieredCache
from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import chaos, namespace, small_config, wait_until

pytestmark = pytest.mark.slow

TOKENS = list(range(100))

LEAVES = """
    import sys
    from pathlib import Path
    from kvtiers.runtime.cache import TieredCache
    from kvtiers.stores.guard import Operation
    from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
    from kvtiers.testing.chaos import chaos, namespace, small_config
    from kvtiers.testing.faulty_store import Delay

    oracle, tokens = CacheOracle(namespace()), list(range(100))
    if sys.argv[2] == "slow":
        one = chaos(Path(sys.argv[1]))
        one.disk.inject(Delay(0.05), Operation.WRITE, times=None)
        cache = one.cache
    else:
        values = {"disk.write_policy": sys.argv[2]}
        cache = TieredCache(small_config(Path(sys.argv[1]), values), SMALL_LAYOUT, namespace())
    assert cache.store(tokens, oracle.kv(tokens)).accepted == 6
    if sys.argv[3] == "raises":
        raise SystemExit(7)
"""

STALLED = """
    import sys, threading
    from pathlib import Path
    from kvtiers.stores.guard import Operation
    from kvtiers.testing.chaos import chaos
    from kvtiers.testing.faulty_store import Stall

    ones = [chaos(Path(sys.argv[1]) / str(number), {"async.close_timeout_s": 1.0}) for number in range(2)]
    for one in ones:
        stalled = one.disk.inject(Stall(threading.Event(), longest_s=600), Operation.WRITE, times=None)
        tokens = list(range(100))
        one.cache.store(tokens, one.oracle.kv(tokens))
        assert stalled.wait_for_hit(20)
    print("ends", flush=True)
"""

DROPS_AT_EXIT = """
    import sys
    from pathlib import Path
    from kvtiers.runtime.cache import TieredCache
    from kvtiers.testing.cache_oracle import SMALL_LAYOUT, CacheOracle
    from kvtiers.testing.chaos import namespace, small_config

    oracle, tokens = CacheOracle(namespace()), list(range(100))
    cache = TieredCache(small_config(Path(sys.argv[1]), {"disk.write_policy": "write_on_evict"}), SMALL_LAYOUT, namespace())
    cache.store(tokens, oracle.kv(tokens))
    del cache  # and the process ends at once, while the ticker may be letting go of it
"""


def run(program: str, *arguments: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def found_by_the_next(path: Path, oracle: CacheOracle) -> int:
    with TieredCache(small_config(path), SMALL_LAYOUT, namespace()) as cache:
        loaded = cache.load(TOKENS).result()
        oracle.check(TOKENS, loaded.num_tokens, loaded.kv)
        assert cache.check_integrity() == []
        return loaded.num_tokens


@pytest.mark.parametrize(
    ("policy", "ending", "code"),
    [("write_through", "ends", 0), ("write_on_evict", "ends", 0), ("write_on_evict", "raises", 7), ("slow", "ends", 0)],
)  # fmt: skip
def test_what_was_stored_is_on_disk_when_the_process_has_ended(
    tmp_path: Path, oracle: CacheOracle, policy: str, ending: str, code: int
) -> None:
    ended = run(LEAVES, str(tmp_path / "cache"), policy, ending)
    assert (ended.returncode, ended.stderr) == (code, "")
    assert found_by_the_next(tmp_path / "cache", oracle) == 96


def test_stalled_disks_do_not_keep_the_process(tmp_path: Path) -> None:
    ended = run(STALLED, str(tmp_path), timeout=60)  # the stall is of ten minutes
    assert ended.returncode == 0
    assert ended.stdout == "ends\n"
    assert "Traceback" not in ended.stderr


def test_a_cache_dropped_just_before_the_end_is_written_out_too(tmp_path: Path, oracle: CacheOracle) -> None:
    ended = run(DROPS_AT_EXIT, str(tmp_path / "cache"))
    assert (ended.returncode, ended.stderr) == (0, "")
    assert found_by_the_next(tmp_path / "cache", oracle) == 96


def test_a_collected_cache_warns_and_is_closed_in_the_background(tmp_path: Path, oracle: CacheOracle) -> None:
    cache = TieredCache(
        small_config(tmp_path / "cache", {"disk.write_policy": "write_on_evict"}), SMALL_LAYOUT, namespace()
    )
    node = cache.node
    cache.store(TOKENS, oracle.kv(TOKENS))
    gc.disable()  # what is not part of a cycle is gone with its last reference
    try:
        with pytest.warns(ResourceWarning, match="unclosed <kvtiers.*TieredCache"):
            del cache
    finally:
        gc.enable()
    assert wait_until(lambda: node.closed)
    assert found_by_the_next(tmp_path / "cache", oracle) == 96


def test_a_collected_cache_on_a_shared_node_ends_its_session_only(
    tmp_path: Path, oracle: CacheOracle
) -> None:
    one = chaos(tmp_path / "cache")
    cache = TieredCache(one.cache.config, SMALL_LAYOUT, namespace(), node=one.node)
    assert one.node.stats()["sessions"] == 2
    with pytest.warns(ResourceWarning, match="unclosed"):
        del cache
    assert wait_until(lambda: one.node.stats()["sessions"] == 1)
    assert one.cache.store(TOKENS, oracle.kv(TOKENS)).accepted == 6
    one.cache.close()
    assert one.node.close()


def test_collecting_takes_no_lock(tmp_path: Path) -> None:
    """The collector may run on a thread that is inside the node."""
    one = chaos(tmp_path / "cache")
    cache = TieredCache(one.cache.config, SMALL_LAYOUT, namespace(), node=one.node)
    collected = threading.Event()

    def collect() -> None:
        with pytest.warns(ResourceWarning, match="unclosed"):
            cache.__del__()
        collected.set()

    with one.node._core._lock, one.cache._activity._changed:
        thread = threading.Thread(target=collect)
        thread.start()
        assert collected.wait(20)
    thread.join()
    cache.close()
    one.cache.close()
    assert one.node.close()


def test_closed_caches_and_those_of_closed_nodes_do_not_warn(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    one = chaos(tmp_path / "cache")
    closed = TieredCache(one.cache.config, SMALL_LAYOUT, namespace(), node=one.node)
    closed.close()
    left = TieredCache(one.cache.config, SMALL_LAYOUT, namespace(), node=one.node)
    one.cache.close()
    assert one.node.close()
    del closed, left
    gc.collect()
    assert [str(warning.message) for warning in recwarn if warning.category is ResourceWarning] == []
