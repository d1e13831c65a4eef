"""Oldest leaf first, in order of arrival; a use changes nothing.

The cheapest policy, and the one whose evictions are easiest to foretell: what was stored first goes first, however often it was
used. For caches that hold nearly everything, and to compare with. A chunk that is passed over because somebody holds it, one
whose probation a use has ended, and one that was idle and is used again, counts as having arrived then.
"""

from __future__ import annotations

from kvtiers.core.policies.base import K
from kvtiers.core.policies.leaf_first import LeafFirst
from kvtiers.core.policies.lines import Line


class LeafFirstFIFO(LeafFirst[K]):
    """First in, first out, leaves first."""

    def __init__(self) -> None:
        super().__init__(Line())
