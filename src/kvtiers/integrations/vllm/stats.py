"""What the connector tells vLLM's own log and its /metrics: counters under `vllm:kvtiers_…`.

The cache's own metrics (tiers, hit rates, latencies) are the service's; these are the engine's view of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats

COUNTERS: Final = {
    "asked_tokens": "Tokens of prompts that were looked up in the cache, once for each time that a request got its blocks.",
    "loaded_tokens": "Tokens whose KV came from the cache instead of being computed.",
    "loads": "Requests whose KV was loaded.",
    "load_failures": "Requests whose load failed: they were computed.",
    "load_bytes": "Bytes copied from the arena to the engine's blocks.",
    "load_seconds": "Seconds in which they were copied, on the workers' own threads.",
    "lapsed": "Requests that waited so long for their turn that what was staged for them was let go; it is staged again then.",
    "stored": "Chunks stored: the cache has said that they can be hit.",
    "refused": "Chunks that the cache did not want: most of them it has already.",
    "failed": "Chunks whose copy to the arena failed, or that were lost with the service.",
    "not_offered": "Chunks of requests that ended while too many blocks were pinned.",
    "unread_adapters": "Requests that were computed because their LoRA adapter had not been read yet.",
    "store_bytes": "Bytes copied from the engine's blocks to the arena.",
    "store_seconds": "Seconds in which they were copied, on the workers' own threads.",
    "losses": "Connections to the service that were lost.",
}
"""Each is counted up; the name on /metrics is `vllm:kvtiers_<name>_total`."""


LABELLED: Final = {
    "tenant": "Tokens whose KV came from the cache, by the tenant that kv_transfer_params name.",
    "tier": "Tokens whose KV came from the cache, by the tier that they lay in.",
}
"""Tokens loaded, by label: `vllm:kvtiers_tenant_loaded_tokens_total{tenant}` and so on; `tenant:NAME` in an interval's data."""


def labelled(label: str, tokens: Mapping[Any, int]) -> dict[str, int]:
    """Counters by value of a label, as they stand in an interval's data."""
    return {f"{label}:{value}": count for value, count in tokens.items()}


@dataclass
class KvtiersStats(KVConnectorStats):
    """Counters of one interval, by name."""

    def reset(self) -> None:
        """Begin a new interval."""
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> KVConnectorStats:
        """Add another's."""
        for name, value in other.data.items():
            self.data[name] = self.data.get(name, 0) + value
        return self

    def reduce(self) -> dict[str, int | float]:
        """What the log shows."""
        return {name: round(value, 3) for name, value in sorted(self.data.items()) if value}

    def is_empty(self) -> bool:
        """Whether nothing happened."""
        return not any(self.data.values())


class KvtiersPromMetrics(KVConnectorPromMetrics):
    """The same as Prometheus counters, one series for each engine."""

    def __init__(
        self,
        vllm_config: Any,
        metric_types: Any,
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> None:
        super().__init__(vllm_config, metric_types, labelnames, per_engine_labelvalues)
        self._counters = {
            name: self._counter_cls(name=f"vllm:kvtiers_{name}", documentation=text, labelnames=labelnames)
            for name, text in COUNTERS.items()
        }
        self._labelled = {
            label: self._counter_cls(
                name=f"vllm:kvtiers_{label}_loaded_tokens",
                documentation=text,
                labelnames=[*labelnames, label],
            )
            for label, text in LABELLED.items()
        }

    def observe(self, transfer_stats_data: dict[str, Any], engine_idx: int = 0) -> None:
        """Add one interval."""
        labels = self.per_engine_labelvalues[engine_idx]
        for name, value in transfer_stats_data.items():
            label, _, of = name.partition(":")
            if of:
                self._labelled[label].labels(*labels, of).inc(value)
            else:
                self._counters[name].labels(*labels).inc(value)
