"""A peer's turns in the rounds. What it fails at in a trial is left out and noted; so is all of it, where there is no peer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from kvtiers.model.errors import KvtiersError
from kvtiers.ops.bench.figures import Series
from kvtiers.ops.bench.measure import Contestant
from kvtiers.ops.bench.peer import Peer
from kvtiers.ops.bench.shapes import Shape
from kvtiers.ops.engines import Engine

_NO_PEER = "no peer took part (--peer)"


@dataclass(slots=True)
class PeerTurns:
    """Contestants by name, and what each of them does."""

    contestants: dict[str, Contestant] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    _does: dict[str, str] = field(default_factory=dict)
    _failed: set[str] = field(default_factory=set)

    def add(self, name: str, does: str, turn: Contestant) -> bool:
        """Try it once; False, and a note, if it fails. One that fails later has no figure, and the run goes on."""

        def careful() -> float:
            if name in self._failed:
                return math.nan
            try:
                return turn()
            except KvtiersError as error:
                self._failed.add(name)
                self.notes.append(f"{name} left out: {error}")
                return math.nan

        careful()
        if name in self._failed:
            return False
        self.contestants[name] = careful
        self._does[name] = does
        return True

    def series(self, does: str, taken: Mapping[str, Series]) -> list[Series]:
        """Those of its series that did this, in every round."""
        return [taken[name] for name, what in self._does.items() if what == does and name not in self._failed]


def tier_turns(peer: Peer | None, shape: Shape, tier: str, directory: Path) -> PeerTurns:
    """Stores and loads of a prompt in "cpu" or "disk", for each of its variants."""
    turns = _opened(peer, shape, tier, directory)
    if peer is None or turns.notes:
        return turns
    for variant in peer.variants(tier):
        name = f"{peer.name} {variant}"
        if turns.add(f"{name} store", "store", _store(peer, tier, variant)):
            turns.add(f"{name} load", "load", _load(peer, tier, variant))
    return turns


def remote_turns(peer: Peer | None, shape: Shape, directory: Path, engine: Engine) -> PeerTurns:
    """Stores and loads of a prompt in a Redis server of its own, emptied before each, for each of its variants."""
    turns = _opened(peer, shape, "redis", directory, endpoint=engine.endpoint)
    if peer is None or turns.notes:
        return turns

    def store(variant: str) -> float:
        engine.clear()
        return peer.store("redis", variant)

    def load(variant: str) -> float:
        store(variant)
        return peer.load("redis", variant)

    for variant in peer.variants("redis"):
        name = f"{peer.name} {variant}"
        if turns.add(f"{name} store", "store", partial(store, variant)):
            turns.add(f"{name} load", "load", partial(load, variant))
    return turns


def lookup_turns(peer: Peer | None, tokens: int) -> PeerTurns:
    """Lookups of a prompt that hits everywhere, and of one that misses."""
    turns = PeerTurns()
    if peer is None:
        turns.notes.append(_NO_PEER)
        return turns
    for variant in peer.variants("lookup"):
        for hit in (True, False):
            what = "hit" if hit else "miss"
            turns.add(f"{peer.name} {variant} {what}", what, _lookup(peer, variant, tokens, hit))
    return turns


def _opened(peer: Peer | None, shape: Shape, tier: str, directory: Path, *, endpoint: str = "") -> PeerTurns:
    """Turns to add to; a note says why there will be none."""
    turns = PeerTurns()
    if peer is None:
        turns.notes.append(_NO_PEER)
    elif peer.variants(tier):
        try:
            peer.open(shape, shape.chunks, directory, endpoint=endpoint)
        except KvtiersError as error:
            turns.notes.append(f"{peer.name} left out: {error}")
    return turns


def _store(peer: Peer, tier: str, variant: str) -> Callable[[], float]:
    return lambda: peer.store(tier, variant)


def _load(peer: Peer, tier: str, variant: str) -> Callable[[], float]:
    return lambda: peer.load(tier, variant)


def _lookup(peer: Peer, variant: str, tokens: int, hit: bool) -> Callable[[], float]:
    return lambda: peer.lookup(variant, tokens, hit=hit)
