"""`KvtiersConnector`: what vLLM calls. Everything is handed to the scheduler's or the worker's side."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)
from vllm.v1.metrics.cache_hit_source import CacheHitSource

from kvtiers.integrations.vllm.backends import RankBackends, backends_of, name_of
from kvtiers.integrations.vllm.child import ChildService
from kvtiers.integrations.vllm.identity import namespace_of
from kvtiers.integrations.vllm.messages import CopyReport, StepJobs
from kvtiers.integrations.vllm.plan import EnginePlan, Geometry, NotCached, geometry_of
from kvtiers.integrations.vllm.prefill_rate import PrefillRate
from kvtiers.integrations.vllm.rank_memory import blocks_of
from kvtiers.integrations.vllm.scheduler import SchedulerSide
from kvtiers.integrations.vllm.settings import Settings, read_settings
from kvtiers.integrations.vllm.stats import KvtiersPromMetrics, KvtiersStats, labelled
from kvtiers.integrations.vllm.usage import report_every, usage_of
from kvtiers.integrations.vllm.versions import UnsupportedEngine, check_role
from kvtiers.integrations.vllm.worker import WorkerSide
from kvtiers.model.tiers import Tier
from kvtiers.node.client import NodeClient
from kvtiers.node.idle import watch_while_idle

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request

_log = logging.getLogger("vllm.kvtiers")

_CONNECT_WITHIN_S: Final = 10.0
_SOURCE_OF: Final = {Tier.CPU: CacheHitSource.HOST, Tier.DISK: CacheHitSource.DISK}


class StepMetadata(KVConnectorMetadata):
    """What begins with a step."""

    def __init__(self, jobs: StepJobs) -> None:
        self.jobs = jobs


class WorkerMetadata(KVConnectorWorkerMetadata):
    """What has ended by a step."""

    def __init__(self, report: CopyReport) -> None:
        self.report = report

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Of all ranks together."""
        assert isinstance(other, WorkerMetadata)
        self.report.add(other.report)
        return self


class KvtiersConnector(KVConnectorBase_V1, SupportsHMA):
    """vLLM's prompts in the tiers of a kvtiers service."""

    _cache_hit_source = CacheHitSource.HOST

    def __init__(
        self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig
    ) -> None:
        """Raises ConfigError, UnsupportedEngine. A service that can't be reached is no error: everything is a miss then."""
        super().__init__(vllm_config, role, kv_cache_config)
        transfer = vllm_config.kv_transfer_config
        check_role(transfer.kv_role)
        self._settings: Settings = read_settings(transfer.kv_connector_extra_config)
        self._socket: Path = self._settings.socket_for(transfer.engine_id)
        self._geometry = geometry_of(self._settings, vllm_config, kv_cache_config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._client: NodeClient | None = None
        self._child: ChildService | None = None
        self._pool: BlockPool | None = None
        self._told: dict[str, float] = {}
        self._reported_at = 0.0
        self._rate = PrefillRate(in_flight=vllm_config.max_concurrent_batches)
        self._bad_blocks: set[int] = set()
        self._backends: RankBackends | None = None
        self._plan: EnginePlan | None = None
        if role is KVConnectorRole.SCHEDULER:
            plan = self._planned(kv_cache_config)
            if isinstance(plan, NotCached):
                _log.warning("kvtiers caches nothing for this engine: %s", plan.reason)
            else:
                self._plan = plan  # it begins when the workers have said what its bytes mean

    @property
    def requires_kv_delivery(self) -> bool:
        """A store that is dropped is a miss later, and nothing else."""
        return False

    def shutdown(self) -> None:
        """End copies, say goodbye, end the engine's own service. Idempotent."""
        worker, self._worker = self._worker, None
        scheduler, self._scheduler = self._scheduler, None
        client, self._client = self._client, None
        if scheduler is not None:
            scheduler.close()
        elif client is not None and worker is not None:
            if worker.close():
                client.close()
            else:  # a goodbye would say that nobody touches a slot any more
                _log.warning("copies had not ended when the worker was shut down")
        child, self._child = self._child, None
        if child is not None:
            child.stop()

    # --- worker -------------------------------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """The rank's memory is there: connect."""
        plan = self._geometry
        if isinstance(plan, NotCached):
            return
        self._backends = backends_of(self._vllm_config.compilation_config.static_forward_context, kv_caches)
        # not connected to before the first step: workers are made before the scheduler, whose affair a service of the engine's own is
        self._client = self._make_client(f"vLLM worker {self._rank}")
        self._worker = WorkerSide(
            self._client,
            blocks_of(plan, kv_caches),
            rank=self._rank,
            part_bytes=plan.blocks_per_chunk * plan.block_bytes,
            block_bytes=plan.block_bytes,
        )

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """What the rank's blocks are read and written by."""
        return self._backends

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Loads are asynchronous: their requests are in none of this step's passes."""
        if self._worker is not None:
            self._worker.begin_loads(self._jobs())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Nothing is loaded layer by layer."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Nothing is saved layer by layer."""

    def wait_for_save(self) -> None:
        """Hand stores over; nothing is waited for, as their blocks are pinned."""
        if self._worker is not None:
            self._worker.begin_stores(self._jobs())

    def get_finished(self, finished_req_ids: set[str]) -> tuple[set[str] | None, set[str] | None]:
        """Requests whose loads have ended."""
        if self._worker is None:
            return None, None
        loaded, bad = self._worker.take_loaded()
        self._bad_blocks = bad
        return None, loaded or None

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Blocks of these that were not filled; asked for right after `get_finished`."""
        bad, self._bad_blocks = self._bad_blocks, set()
        return bad

    def build_connector_worker_meta(self) -> KVConnectorWorkerMetadata | None:
        """What was copied, for the scheduler's side."""
        report = self._worker.take_report() if self._worker is not None else None
        return None if report is None else WorkerMetadata(report)

    # --- scheduler ----------------------------------------------------------------------------------------------------

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        """The workers have their memory: connect. Raises UnsupportedEngine if the service does not take this engine's KV."""
        plan, self._plan = self._plan, None
        if plan is not None:
            self._begin_scheduler(plan.with_backend(name_of(metadata)))

    def bind_gpu_block_pool(self, gpu_block_pool: BlockPool) -> None:
        """For pins."""
        self._pool = gpu_block_pool
        if self._scheduler is not None:
            self._scheduler.bind(gpu_block_pool)

    def on_new_request(self, request: Request) -> None:
        """Stage at once."""
        if self._scheduler is not None:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """(None, False) while it is being found out."""
        if self._scheduler is None:
            return 0, False
        return self._scheduler.matched(request, num_computed_tokens)

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Load into these blocks."""
        if self._scheduler is not None:
            self._scheduler.allocated(request, self._ids(blocks.get_block_ids()), num_external_tokens)

    def get_external_cache_hit_sources(
        self, request: Request, num_external_tokens: int
    ) -> dict[CacheHitSource, int]:
        """By tier."""
        found: dict[CacheHitSource, int] = {}
        if self._scheduler is not None:
            for tier, tokens in self._scheduler.sources(request, num_external_tokens).items():
                source = _SOURCE_OF.get(tier, CacheHitSource.EXTERNAL_UNSPECIFIED)
                found[source] = found.get(source, 0) + tokens
        return found

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> KVConnectorMetadata:
        """What begins with this step."""
        if self._scheduler is None:
            return StepMetadata(StepJobs())
        state = scheduler_output.kv_connector_block_state

        def block_ids(request_id: str) -> Sequence[int]:
            return self._ids(state.resolve_block_ids(request_id)) if state is not None else ()

        jobs = self._scheduler.begin_step(scheduler_output.num_scheduled_tokens, block_ids)
        self._report(scheduler_output.total_num_scheduled_tokens)
        return StepMetadata(jobs)

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        """What the workers have done."""
        if self._scheduler is None:
            return
        if connector_output.invalid_block_ids:
            self._scheduler.not_filled(connector_output.invalid_block_ids)
        self._scheduler.loaded(connector_output.finished_recving or ())
        meta = connector_output.kv_connector_worker_meta
        if isinstance(meta, WorkerMetadata):
            report = meta.report
            self._scheduler.copied(report)

    def request_finished(self, request: Request, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Blocks may be freed: those still to be copied are pinned."""
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Request, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """The same."""
        if self._scheduler is not None:
            self._scheduler.finished(request, self._ids(block_ids))
        return False, None

    def has_pending_push_work(self) -> bool:
        """Whether blocks are pinned, or what was stored is yet to be counted: an idle engine goes on stepping until that is over."""
        side = self._scheduler
        return side is not None and (side.stores.busy or side.stores.settling)

    def has_pending_block_frees(self) -> bool:
        """Whether blocks come free by waiting a moment: vLLM holds a request back that finds none, instead of preempting one."""
        return self._scheduler is not None and self._scheduler.stores.frees_blocks

    def reset_cache(self) -> bool | None:
        """Nothing from before is found again by this engine. False if the engine's own blocks still hold some of it."""
        if self._scheduler is None:
            return None
        pool = self._pool
        if (
            pool is not None and pool.get_num_free_blocks() != pool.num_gpu_blocks - 1
        ):  # all but the null block
            _log.warning("blocks of the engine are in use, so its prefix cache can't be reset, nor kvtiers'")
            return False
        self._scheduler.reset(secrets.randbits(62) | 1)
        return True

    # --- metrics ------------------------------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        """What was counted since the last call; on the scheduler's side, which hears of the workers' too."""
        side, client = self._scheduler, self._client
        if side is None or client is None:
            return None
        now = {
            **side.counts.total,
            **side.stores.counters,
            **labelled("tenant", side.counts.by_tenant),
            **labelled("tier", side.counts.by_tier),
            "losses": client.counters["losses"],
        }
        since = {name: value - self._told.get(name, 0) for name, value in now.items()}
        self._told = dict(now)
        stats = KvtiersStats(data={name: value for name, value in since.items() if value})
        return None if stats.is_empty() else stats

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats | None:
        """For vLLM's logger."""
        return KvtiersStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls, vllm_config: VllmConfig, metric_types: Any, labelnames: list[str], per_engine_labelvalues: Any
    ) -> KVConnectorPromMetrics:
        """For vLLM's /metrics."""
        return KvtiersPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

    # --- inside -------------------------------------------------------------------------------------------------------

    def _planned(self, kv_cache_config: KVCacheConfig) -> EnginePlan | NotCached:
        geometry = self._geometry
        if isinstance(geometry, NotCached):
            return geometry
        namespace = namespace_of(self._settings, geometry, self._vllm_config, kv_cache_config)
        if isinstance(namespace, NotCached):
            return namespace
        wanted = self._settings.config.storage.chunk_tokens
        _log.info(
            "chunks of %d tokens%s, %d blocks, %.1f KiB on each of %d ranks",
            geometry.chunk_tokens,
            ""
            if geometry.chunk_tokens == wanted
            else f" (storage.chunk_tokens is {wanted}: rounded up to whole blocks)",
            geometry.blocks_per_chunk,
            geometry.blocks_per_chunk * geometry.block_bytes / 1024,
            geometry.world_size,
        )
        return geometry.named(namespace)

    def _begin_scheduler(self, plan: EnginePlan) -> None:
        transfer = self._vllm_config.kv_transfer_config
        if transfer.kv_load_failure_policy == "fail":
            _log.warning(
                'kv_load_failure_policy is "fail": a chunk that can\'t be read would fail its request. '
                'Set "kv_load_failure_policy": "recompute" in --kv-transfer-config'
            )
        if self._settings.without_effect:
            _log.warning(
                "no effect under vLLM, which owns the GPU's memory (--gpu-memory-utilization): %s",
                ", ".join(self._settings.without_effect),
            )
        if self._settings.socket is None:
            self._child = ChildService(self._settings, self._socket)
            self._child.ensure()
        self._client = self._make_client("vLLM scheduler")
        self._scheduler = SchedulerSide(
            self._client,
            plan,
            load_timeout_s=self._settings.load_timeout_s,
            max_pinned_share=self._settings.max_pinned_share,
        )
        if self._pool is not None:
            self._scheduler.bind(self._pool)
        deadline = time.monotonic() + _CONNECT_WITHIN_S
        while not self._scheduler.ready and time.monotonic() < deadline:
            self._client.step()
            if self._scheduler.error is not None:
                raise UnsupportedEngine(
                    f"the cache's service does not take this engine's KV: {self._scheduler.error}"
                )
            time.sleep(0.01)

    def _make_client(self, name: str) -> NodeClient:
        token = hashlib.sha256(str(self._vllm_config.kv_transfer_config.engine_id).encode()).digest()
        client = NodeClient(self._socket, name=name, engine=token)
        watch_while_idle(client)
        return client

    @property
    def _rank(self) -> int:
        return int(self._vllm_config.parallel_config.rank)

    def _jobs(self) -> StepJobs:
        metadata = self._connector_metadata
        return metadata.jobs if isinstance(metadata, StepMetadata) else StepJobs()

    def _ids(self, by_group: Sequence[Sequence[int]]) -> Sequence[int]:
        geometry = self._geometry
        return by_group[geometry.group] if isinstance(geometry, Geometry) else ()

    def _report(self, tokens: int) -> None:
        """Once a second, for a large pool less often: how full the engine's pool is, cached blocks included, how fast it computes, what it had itself."""
        now = time.monotonic()
        self._rate.step(tokens, now)
        side, client, pool = self._scheduler, self._client, self._pool
        if side is None or client is None or pool is None:
            return
        if now - self._reported_at < report_every(pool.num_gpu_blocks):
            return
        self._reported_at = now
        if self._child is not None and not client.connected:
            self._child.start_again()
        usage = usage_of(pool.blocks)
        if client.report(gpu_usage=usage, prefill_tokens_per_s=self._rate.tokens_per_s, **side.counts.own):
            side.counts.own.update(dict.fromkeys(side.counts.own, 0))
