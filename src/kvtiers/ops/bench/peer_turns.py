"""A peer's turns in the rounds. What it fails at in a trial is left out and noted; so is all of it, where there is no peer."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kvtiers.model.errors import KvtiersError
from kvtiers.ops.bench.figures import Series
from kvtiers.ops.bench.measure import Contestant
from kvtiers.ops.bench.peer import Peer
from kvtiers.ops.bench.shapes import Shape

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
    turns = PeerTurns()
    if peer is None:
        turns.notes.append(_NO_PEER)
        return turns
    variants = peer.variants(tier)
    if variants:
        try:
            peer.open(shape, shape.chunks, directory)
        except KvtiersError as error:
            turns.notes.append(f"{peer.name} left out: {error}")
            return turns
    for variant in variants:
        name = f"{peer.name} {variant}"
        if turns.add(f"{name} store", "store", _store(peer, tier, variant)):
            turns.add(f"{name} load", "load", _load(peer, tier, variant))
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


def _store(peer: Peer, tier: str, variant: str) -> Callable[[], float]:
    return lambda: peer.store(tier, variant)


def _load(peer: Peer, tier: str, variant: str) -> Callable[[], float]:
    return lambda: peer.load(tier, variant)


def _lookup(peer: Peer, variant: str, tokens: int, hit: bool) -> Callable[[], float]:
    return lambda: peer.lookup(variant, tokens, hit=hit)
