"""Whatever happens to an engine, its ranks and its service: every byte that counts is right, and in the end nothing is held.

`PagedEngine.check` looks at every block after every step; what lies in the tiers is read by somebody else at the end.
"""

from __future__ import annotations

import random
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from kvtiers.model.keys import ChunkKey
from kvtiers.model.tiers import Tier
from kvtiers.node.client import NodeClient
from kvtiers.testing.chaos import wait_until
from kvtiers.testing.direct_engine import PATIENCE_S
from kvtiers.testing.local_node import LocalNode, MakeLocal
from kvtiers.testing.paged_blocks import CHUNK_BLOCKS, CHUNK_TOKENS, RANKS, PagedRequest, block_kv
from kvtiers.testing.paged_engine import PagedEngine

if TYPE_CHECKING:
    from tests.integrations.vllm.conftest import MakePaged

ACTIONS = 400


class Walk:
    """What may happen, one at a time."""

    def __init__(self, engine: PagedEngine, node: LocalNode, make_local: MakeLocal, seed: int) -> None:
        self.engine = engine
        self.node: LocalNode | None = node
        self.socket = node.socket
        self.make_local = make_local
        self.rng = random.Random(seed)
        self.count = 0

    def act(self) -> None:
        rng = self.rng
        actions, weights = zip(
            (self.steps, 40),
            (self.new_request, 16),
            (self.abort, 4),
            (self.preempt, 3),
            (self.refuse, 3),
            (self.lose_an_arena, 3),
            (self.hold_up, 4),
            (self.forget, 6),
            (self.reset, 1),
            (self.leap, 1),
            (self.service, 1),
            (self.evict, 1),
            (self.calm_down, 12),
            strict=True,
        )
        rng.choices(actions, weights)[0]()
        self.engine.step()

    def steps(self) -> None:
        for _ in range(self.rng.randrange(1, 8)):
            self.engine.step()
            time.sleep(self.rng.choice((0.0, 0.001)))

    def new_request(self) -> None:
        rng = self.rng
        if len(self.engine.waiting) > 6:
            return
        self.count += 1
        document = rng.randrange(1, 4) * 1_000_000
        tokens = list(range(document, document + rng.randrange(1, 5 * CHUNK_TOKENS)))
        if rng.random() < 0.3:
            tokens += [rng.randrange(10) for _ in range(rng.randrange(CHUNK_TOKENS))]
        if rng.random() < 0.2:
            tokens = tokens[: max(1, len(tokens) // CHUNK_TOKENS) * CHUNK_TOKENS]
        params = {f"kvtiers.no_{rng.choice(('load', 'store'))}": True} if rng.random() < 0.1 else None
        self.engine.add(
            PagedRequest(
                f"r{self.count}",
                tokens,
                rng.choice((1, 1, 3, 2 * CHUNK_TOKENS)),
                kv_transfer_params=params,
                skip_reading_prefix_cache=rng.random() < 0.05,
            )
        )

    def abort(self) -> None:
        everyone = [*self.engine.waiting, *self.engine.running]
        if everyone:
            self.engine.abort(self.rng.choice(everyone))

    def preempt(self) -> None:
        if self.engine.running:
            self.engine.preempt(self.rng.choice(self.engine.running))

    def refuse(self) -> None:
        self.engine.refuse_blocks = not self.engine.refuse_blocks

    def lose_an_arena(self) -> None:
        link = self.rng.choice(self.engine.ranks).link
        link.lost_after = self.rng.randrange(3) if link.lost_after < 0 else -1

    def hold_up(self) -> None:
        gate = self.rng.choice(self.engine.ranks).link.gate
        if gate.is_set():
            gate.clear()
        else:
            gate.set()

    def forget(self) -> None:
        self.engine.pool.forget()

    def reset(self) -> None:
        self.engine.reset()

    def leap(self) -> None:
        self.engine.skew += self.rng.choice((1.0, 9.0, 35.0))

    def service(self) -> None:
        if self.node is not None:
            assert self.node.end() == []
            self.node = None
        else:
            self.start()

    def evict(self) -> None:
        if self.node is not None:
            self.node.node.evict(Tier.CPU, self.rng.choice((0, 1 << 17)))

    def start(self) -> LocalNode:
        if self.node is None:
            self.node = self.make_local(path=self.socket)
        return self.node

    def calm_down(self) -> None:
        """Nothing is in the way any more."""
        self.start()
        self.engine.refuse_blocks = False
        for rank in self.engine.ranks:
            rank.link.lost_after = -1
            rank.link.gate.set()
        self.engine.connect()


def audit(engine: PagedEngine, node: LocalNode) -> int:
    """Reads all that any tier has of the engine's prompts, and compares; the number of chunks."""
    client = NodeClient(node.socket, name="auditor")
    checked = set[tuple[int, ChunkKey]]()

    def stepped(condition: object) -> bool:
        client.step()
        return bool(condition)

    for weights, chains in engine.seen.items():
        plan = engine.plan.with_epoch(weights)
        space = client.attach(
            plan.namespace.digest, plan.parts, chunk_tokens=plan.chunk_tokens, itemsize=plan.itemsize
        )
        assert wait_until(lambda space=space: stepped(None) or space.ready, PATIENCE_S)  # type: ignore[misc]
        for chain in sorted(chains, key=len, reverse=True):
            keys = [ChunkKey(chain[end - 1]) for end in range(CHUNK_BLOCKS, len(chain) + 1, CHUNK_BLOCKS)]
            if not keys or (weights, keys[-1]) in checked:
                continue
            load = client.stage(space, keys, deadline=time.monotonic() + PATIENCE_S)
            assert wait_until(lambda load=load: stepped(None) or load.done, PATIENCE_S)  # type: ignore[misc]
            for row in range(load.num_chunks):
                hashes = chain[row * CHUNK_BLOCKS : (row + 1) * CHUNK_BLOCKS]
                for rank in range(RANKS):
                    right = [
                        block_kv(block_hash, rank, index, weights, region.block_bytes)
                        for index, region in enumerate(plan.regions)
                        for block_hash in hashes
                    ]
                    nbytes = plan.blocks_per_chunk * plan.block_bytes
                    found = client.view(load.arena, int(load.offsets[row, rank]), nbytes)
                    assert found is not None
                    assert np.array_equal(found, np.concatenate(right))
                checked.add((weights, keys[row]))
            client.release(load)
    client.step()
    client.close()
    return len(checked)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_every_byte_is_right_and_nothing_stays_held(
    make_local: MakeLocal, make_paged: MakePaged, seed: int
) -> None:
    node = make_local()
    engine = make_paged(node, num_blocks=40, load_timeout_s=3.0).connect()
    walk = Walk(engine, node, make_local, seed)
    for _ in range(ACTIONS):
        walk.act()
    walk.calm_down()
    engine.drain()
    node = walk.start()
    assert node.comes_to_rest()
    assert audit(engine, node) > 0
    assert node.comes_to_rest()
    counters = engine.side.counts.total
    assert counters["loads"] > 0
    assert engine.side.stores.counters["stored"] > 0
