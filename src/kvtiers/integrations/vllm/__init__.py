"""vLLM on kvtiers: prompts' KV survives in CPU memory, on disk and across restarts.

    --kv-transfer-config '{"kv_connector": "KvtiersConnector", "kv_connector_module_path": "kvtiers.integrations.vllm",
                           "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
                           "kv_connector_extra_config": {"config": "lmcache_config.yaml"}}'

    scheduler side ── keys, leases ──▶ the node's service (`kvtiers serve`, or a child of the engine's)
        │ metadata of each step: slots ⇄ blocks
        ▼
    worker side, one a rank ── copies between its blocks and the arena, in the background

`scheduler.py`, `requests.py`, `stores.py`, `counts.py`, `worker.py` and `blocks.py` know nothing of vLLM's classes but a few attributes, so they
are tested without it; `connector.py`, `rank_memory.py`, `plan.py`, `identity.py`, `backends.py` and `stats.py`
are what meets vLLM.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvtiers.integrations.vllm.connector import KvtiersConnector

__all__ = ["KvtiersConnector"]


def __getattr__(name: str) -> Any:
    """The connector, imported when it is asked for, after a look at vLLM's version."""
    if name == "KvtiersConnector":
        from kvtiers.integrations.vllm.versions import check_version

        check_version()
        from kvtiers.integrations.vllm.connector import KvtiersConnector

        return KvtiersConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
