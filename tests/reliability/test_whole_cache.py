"""The whole cache against an oracle: real threads, a real disk, and every order of calls, faults, damage and restarts hypothesis thinks of.

What always holds: a load gives the right bytes or fewer of them; what lies in memory or on the disk survives a restart; every hit
is counted once; and whenever nothing is under way, the audit has nothing to say.
"""

from __future__ import annotations

import shutil
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from kvtiers.core.settings import MemorySettings
from kvtiers.model.errors import CacheClosed, RecordInvalid, StoreTransient, StoreUnavailable
from kvtiers.model.reasons import MissReason
from kvtiers.model.tiers import Tier
from kvtiers.runtime.cache import TieredCache
from kvtiers.runtime.node import CacheNode
from kvtiers.runtime.plan import plan_node
from kvtiers.runtime.results import LoadedKV, PendingLoad
from kvtiers.stores.guard import Operation
from kvtiers.testing.cache_oracle import SMALL_CHUNK, SMALL_LAYOUT, CacheOracle
from kvtiers.testing.chaos import IMPATIENT, SLOT, faulty_plan, namespace, small_config, works_again
from kvtiers.testing.disk_damage import damage_file, record_files
from kvtiers.testing.faulty_store import Delay, Fail, FaultyStore, FlipBit, Full, Stall, TornWrite
from kvtiers.testing.store_kit import Damage

WAIT_S = 60.0
LONGEST = 8
PATHS = ("aaaaaaaa", "aaaabbbb", "aacc", "bb", "bbcdefgh")
"""Prompts that share prefixes: each letter is a chunk."""

MODELS = ("a-model", "another")
SALTS = (None, "salt")
PATIENT = replace(IMPATIENT, read_deadline_s=5.0, write_deadline_s=5.0)
"""A busy machine is not a stalled disk; breakers open here because operations fail."""

OPERATIONS = (Operation.READ, Operation.WRITE, Operation.DELETE)


def prompt(path: str, tail: int) -> list[int]:
    """A chunk of tokens for each letter, and `tail` more."""
    tokens = [ord(letter) * 1000 + place for letter in path for place in range(SMALL_CHUNK)]
    return [*tokens, *range(tail)]


@dataclass
class Run:
    """One life of the node, from opening to closing."""

    node: CacheNode
    disk: FaultyStore | None
    caches: list[TieredCache]
    oracles: list[CacheOracle]
    loads: int = 0
    tokens: int = 0
    misses: Counter[str] = field(default_factory=Counter)
    stalls: list[threading.Event] = field(default_factory=list)
    pending: list[tuple[int, list[int], str | None, PendingLoad]] = field(default_factory=list)
    faulty: bool = False
    """Faults are, or may still be, in force."""
    damaged: bool = False
    """Files were damaged since it was opened: the disk's own audit may tell of them."""
    flipped: bool = False
    """Reads have delivered flipped bits: some may lie in the arena, not asked for yet."""
    gave_up: bool = False
    """A load ended in an error, so that what it counted is not known here."""


class Walk:
    """A history of one cache: each step is drawn from a random source, so that equal seeds make equal calls."""

    def __init__(self, draw: Random, tell: Callable[[str], None]) -> None:
        self.tell = tell
        self.place = Path(tempfile.mkdtemp(prefix="kvtiers-whole-"))
        self.lives = 0
        self.damaged = False
        """Some file on the disk is, or may be, not what was stored: prompts may be found and then not be had."""
        self.has_disk = draw.random() < 0.85
        self.verify = draw.random() < 0.5
        self.values: dict[str, Any] = {
            "async.max_workers": draw.randint(1, 3),
            "cpu.verify_on_hit": self.verify,
        }
        if draw.random() < 0.4:
            self.values |= {"gpu.capacity": "1Mi", "gpu.device": "cpu"}
            self.values |= {"gpu.max_utilization": 0.1, "gpu.eviction_threshold": 0.1}  # eight chunks
        if self.has_disk:
            self.values["disk.compression"] = draw.choice(["none", "zstd"])
            self.values["disk.write_policy"] = draw.choice(["write_through", "write_on_evict"])
        kept = draw.choice([0, 6, 24, 24])
        self.memory = MemorySettings((kept + LONGEST) * SLOT, kept * SLOT, max(0, kept - 2) * SLOT)
        tell(f"{self.values}, {kept} chunks in memory")
        self.open(self.place / "0")

    def step(self, draw: Random) -> None:
        """One call, fault, accident or restart; then what always holds is checked."""
        run = self.run
        steps: list[tuple[float, Callable[[Random], None]]] = [
            (7, self.store),
            (9, self.load),
            (1, self.lookup),
            (3, self.evict),
            (1, self.storm),
            (0.4, self.end_a_session_and_begin_another),
        ]
        if self.has_disk:
            steps += [(1.5, self.fail), (0.7, self.stall), (0.3, self.damage), (0.7, self.crash)]
            if run.faulty:
                steps.append((5, self.heal))
            else:
                steps.append((0.7, self.restart))
        (chosen,) = draw.choices([step for _, step in steps], [weight for weight, _ in steps])
        chosen(draw)
        self.books_add_up()

    def open(self, path: Path) -> None:
        self.path = path
        config = small_config(path if self.has_disk else None, self.values)
        plan, disk = plan_node(config), None
        if self.has_disk:
            plan, disk = faulty_plan(plan, guard=PATIENT)
        plan = replace(plan, core=replace(plan.core, cpu=self.memory))
        node = CacheNode(plan)
        names = (*MODELS, MODELS[0])
        caches = [TieredCache(config, SMALL_LAYOUT, namespace(name), node=node) for name in names]
        self.run = Run(node, disk, caches, [CacheOracle(namespace(name)) for name in names])

    # --- what engines do ----------------------------------------------------------------------------------------------

    def prompt(self, draw: Random) -> tuple[int, str, list[int], str | None]:
        """Who asks, the chunks as letters, the tokens, the salt."""
        path = draw.choice(PATHS)
        if draw.random() < 0.3:
            path = path[: draw.randint(0, LONGEST)]
        salt = draw.choice(SALTS) if draw.random() < 0.3 else None
        return draw.choice((0, 0, 1, 2, 2)), path, prompt(path, draw.randint(0, 5)), salt

    def store(self, draw: Random) -> None:
        run = self.run
        who, path, tokens, salt = self.prompt(draw)
        start = draw.randint(0, len(tokens)) if draw.random() < 0.2 else 0
        self.tell(f"{who} stores {path} salt {salt} from {start}")
        kv = run.oracles[who].kv(tokens, salt=salt, start=start)
        receipt = run.caches[who].store(tokens, kv, start=start, salt=salt)
        assert receipt.accepted + len(receipt.refusals) == max(0, len(path) - -(-start // SMALL_CHUNK))

    def load(self, draw: Random) -> None:
        run = self.run
        who, path, tokens, salt = self.prompt(draw)
        wait = draw.random() < 0.6
        self.tell(f"{who} loads {path} salt {salt}")
        target = np.zeros(SMALL_LAYOUT.shape(len(tokens)), np.uint16) if draw.random() < 0.5 else None
        timeout = WAIT_S if wait and not run.faulty else 0.03
        before = run.caches[who].lookup(tokens, salt=salt).num_tokens if self.is_quiet() else 0
        pending = run.caches[who].load(tokens, into=target, salt=salt, timeout=timeout)
        if run.faulty and wait:
            run.pending.append((who, tokens, salt, pending))
            return
        loaded = pending.result(WAIT_S)
        self.account(who, tokens, salt, loaded)
        if before and timeout == WAIT_S and not self.damaged and loaded.stopped_by is not MissReason.NO_SLOT:
            assert loaded.num_tokens >= before, f"it had {before} tokens and gave {loaded}"

    def lookup(self, draw: Random) -> None:
        who, path, tokens, salt = self.prompt(draw)
        match = self.run.caches[who].lookup(tokens, salt=salt)
        assert match.num_tokens == len(match.tiers) * SMALL_CHUNK <= len(path) * SMALL_CHUNK
        assert (match.stopped_by is None) is (match.num_tokens == len(tokens))

    def account(self, who: int, tokens: list[int], salt: str | None, loaded: LoadedKV) -> None:
        run = self.run
        run.oracles[who].check(tokens, loaded.num_tokens, loaded.kv, salt=salt)
        assert len(loaded.tiers) * SMALL_CHUNK == loaded.num_tokens
        assert (loaded.stopped_by is None) is (loaded.num_tokens == len(tokens))
        run.loads += 1
        run.tokens += loaded.num_tokens
        if loaded.stopped_by is not None:
            run.misses[loaded.stopped_by] += 1

    def storm(self, draw: Random) -> None:
        """Several threads store and load at once."""
        run, seeds = self.run, [draw.random() for _ in range(3)]
        self.tell("storm")
        asked: list[tuple[int, list[int], str | None, PendingLoad]] = []

        def blow(seed: float) -> None:
            draw = Random(seed)
            for _ in range(8):
                who, _, tokens, salt = self.prompt(draw)
                if draw.random() < 0.5:
                    run.caches[who].store(tokens, run.oracles[who].kv(tokens, salt=salt), salt=salt)
                else:
                    pending = run.caches[who].load(tokens, salt=salt, timeout=0.03 if run.faulty else WAIT_S)
                    asked.append((who, tokens, salt, pending))

        threads = [threading.Thread(target=blow, args=(seed,)) for seed in seeds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert not any(thread.is_alive() for thread in threads)
        for who, tokens, salt, pending in asked:
            self.account(who, tokens, salt, pending.result(WAIT_S))

    # --- what operators do --------------------------------------------------------------------------------------------

    def evict(self, draw: Random) -> None:
        there = [tier for tier in Tier if self.run.node.capacity(tier)]
        tier = draw.choice([*there, Tier.CPU])
        share = (
            draw.choice([0.0, 0.0, 0.02, 0.3]) if tier is not Tier.DISK else draw.choice([0.0, 0.002, 0.004])
        )
        self.tell(f"{tier} is evicted to {share}: {self.run.caches[0].evict(tier, share)}")

    def end_a_session_and_begin_another(self, draw: Random) -> None:
        run, who = self.run, draw.randrange(3)
        self.tell(f"{who} ends and begins again")
        assert run.caches[who].close(WAIT_S)
        run.caches[who] = TieredCache(
            run.caches[who].config, SMALL_LAYOUT, namespace((*MODELS, MODELS[0])[who]), node=run.node
        )

    def restart(self, _: Random) -> None:
        """Everything that lies anywhere is found again: closing writes out what only memory holds."""
        self.tell("restart")
        before = self.found() if self.settle() and not self.damaged else {}
        self.close()
        self.open(self.path)
        self.nothing_was_lost(before)

    def crash(self, draw: Random) -> None:
        """The directory as it is at this moment, whatever is being written, is opened by a new node; the old one is forgotten."""
        self.tell("crash")
        before: dict[Any, int] = {}
        if draw.random() < 0.5 and not self.run.faulty and self.settle() and not self.damaged:
            before = self.found({Tier.DISK})
        self.lives += 1
        there = self.place / str(self.lives)
        copy_as_it_is(self.path, there)
        self.close()
        self.open(there)
        self.nothing_was_lost(before)

    def nothing_was_lost(self, before: dict[Any, int]) -> None:
        after = self.found()
        lost = {key: (count, after[key]) for key, count in before.items() if after[key] < count}
        assert not lost, lost

    def found(self, only: set[Tier] | None = None) -> dict[Any, int]:
        """Tokens of each prompt that can be found, in these tiers."""
        found = {}
        for who in range(2):
            for path in PATHS:
                for salt in SALTS:
                    tiers = self.run.caches[who].lookup(prompt(path, 0), salt=salt).tiers
                    if only is not None:
                        tiers = tiers[
                            : next((i for i, tier in enumerate(tiers) if tier not in only), len(tiers))
                        ]
                    found[who, path, salt] = len(tiers)
        return found

    # --- what disks do ------------------------------------------------------------------------------------------------

    def fail(self, draw: Random) -> None:
        assert self.run.disk is not None
        kinds = ["transient", "unavailable", "full", "torn", "slow", *(["flip"] if self.verify else [])]
        fault, on, times = draw.choice(kinds), draw.choice(OPERATIONS), draw.randint(1, 6)
        self.tell(f"the disk will be {fault} in {on} {times} times")
        faults: dict[str, tuple[Any, Operation]] = {
            "transient": (Fail(StoreTransient), on),
            "unavailable": (Fail(StoreUnavailable), on),
            "full": (Full(), Operation.WRITE),
            "torn": (TornWrite(), Operation.WRITE),
            "slow": (Delay(0.01), on),
            "flip": (FlipBit(4_711), Operation.READ),
        }
        what, where = faults[fault]
        self.run.disk.inject(what, where, times=times)
        self.run.faulty = True
        self.damaged |= fault in {"torn", "flip"}
        self.run.flipped |= fault == "flip"

    def stall(self, draw: Random) -> None:
        assert self.run.disk is not None
        on, times = draw.choice(OPERATIONS), draw.randint(1, 4)
        self.tell(f"the disk will hang in {on} {times} times")
        released = threading.Event()
        self.run.stalls.append(released)
        self.run.disk.inject(Stall(released), on, times=times)
        self.run.faulty = True

    def heal(self, _: Random) -> None:
        run = self.run
        self.tell("the disk works")
        assert run.disk is not None
        run.disk.heal()
        for released in run.stalls:
            released.set()
        run.stalls.clear()
        assert works_again(run.node, WAIT_S)
        self.collect()
        run.faulty = False

    def damage(self, draw: Random) -> None:
        files = sorted(record_files(self.path).items())
        if not files:
            return
        (ref, file), (_, other), how = draw.choice(files), draw.choice(files), draw.choice(list(Damage))
        self.tell(f"{how} of {ref.key.hex()[:12]}")
        self.run.damaged = self.damaged = True
        try:
            if how is Damage.SWAP:
                shutil.copyfile(other, file)
            else:
                damage_file(file, how)
        except (OSError, ValueError, RecordInvalid):
            return  # it was evicted meanwhile, has no padding, or was damaged before
        for tier in (Tier.GPU, Tier.CPU):
            if self.run.node.capacity(tier):
                self.run.caches[0].evict(tier)
        timeout = 0.03 if self.run.faulty else WAIT_S
        for who, path in product(range(2), PATHS):
            loaded = self.run.caches[who].load(prompt(path, 0), timeout=timeout).result(WAIT_S)
            self.account(who, prompt(path, 0), None, loaded)

    # --- what always holds --------------------------------------------------------------------------------------------

    def is_quiet(self) -> bool:
        return not self.run.faulty and self.settle()

    def settle(self) -> bool:
        assert self.run.node.wait_settled(WAIT_S), f"it does not come to rest: {self.run.node.stats()}"
        return True

    def books_add_up(self) -> None:
        run = self.run
        if run.faulty:
            problems = run.node.inspect(lambda core: core.check_integrity())
            assert not problems, problems
            return
        self.settle()
        problems = run.node.check_integrity(WAIT_S)
        if run.damaged:
            problems = run.node.inspect(lambda core: core.check_integrity())
        if run.flipped:
            problems = [problem for problem in problems if not problem.startswith("cpu: the bytes of chunk")]
        assert not problems, problems
        stats = run.node.stats()
        assert stats["open_tickets"] == 0
        assert all(pool["errors"] == 0 for pool in stats["async"]["pools"].values())
        if not run.gave_up:
            assert stats["requests"] == run.loads
            assert (
                sum(tier["hit_tokens"] for tier in stats["tiers"].values() if "hit_tokens" in tier)
                == run.tokens
            )
            assert {reason: n for reason, n in stats["misses"].items() if n} == dict(run.misses)

    def collect(self) -> None:
        """The loads that were left waiting while something was wrong."""
        run = self.run
        for who, tokens, salt, pending in run.pending:
            try:
                self.account(who, tokens, salt, pending.result(WAIT_S))
            except CacheClosed:
                run.gave_up = True
        run.pending.clear()

    def close(self) -> None:
        run = self.run
        if run.disk is not None:
            run.disk.heal()
        for released in run.stalls:
            released.set()
        for cache in run.caches:
            assert cache.close(WAIT_S)
        self.collect()
        assert run.node.close(WAIT_S)

    def end(self) -> None:
        try:
            self.close()
        finally:
            shutil.rmtree(self.place, ignore_errors=True)


def copy_as_it_is(source: Path, target: Path) -> None:
    """Copy a directory that changes meanwhile: what vanishes is left out."""
    target.mkdir()
    for item in list(source.iterdir()):
        try:
            if item.is_dir():
                copy_as_it_is(item, target / item.name)
            else:
                shutil.copyfile(item, target / item.name)
        except (FileNotFoundError, IsADirectoryError):  # gone, or gone and made again between the two looks
            continue


class WholeCache(RuleBasedStateMachine):
    """A walk whose seeds hypothesis chooses."""

    @initialize(seed=st.integers(0, 1 << 64))
    def begin(self, seed: int) -> None:
        self.walk = Walk(Random(seed), note)
        self.steps = 0

    @rule(seed=st.integers(0, 1 << 64))
    def step(self, seed: int) -> None:
        self.steps += 1
        self.walk.step(Random(f"{seed}/{self.steps}"))

    def teardown(self) -> None:
        if hasattr(self, "walk"):
            self.walk.end()


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(
        WholeCache,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            database=None,
            phases=(Phase.generate,),  # threads make no two runs alike, so shrinking would chase shadows
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_the_whole_cache_agrees_with_the_oracle() -> None:
    run_machine(examples=8, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_whole_cache_agrees_with_the_oracle_for_longer() -> None:
    run_machine(examples=70, steps=50)


@pytest.mark.nightly
@pytest.mark.timeout(3000)
def test_the_whole_cache_agrees_with_the_oracle_all_night() -> None:
    run_machine(examples=2000, steps=100)
