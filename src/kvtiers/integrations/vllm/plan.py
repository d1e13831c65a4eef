"""How one engine's KV is cut into chunks: from vLLM's configuration, and equal on the scheduler's and every worker's side.

A chunk is a whole number of blocks. Its part for a rank is, region after region, the bytes of these blocks as they lie in that
rank's memory, opaque: backends differ in what they put there. So everything that decides what these bytes mean is in the
namespace (`identity.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

from kvtiers.integrations.vllm.settings import Settings
from kvtiers.model.namespace import Namespace
from kvtiers.model.parts import Part, Parts


class Region(NamedTuple):
    """Blocks that lie one behind the other: of a layer, or of all layers."""

    start: int
    """Byte offset in the allocation."""
    block_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Geometry:
    """How KV is cut: what both sides must agree on."""

    block_tokens: int
    """Tokens of one of the scheduler's blocks."""
    hash_tokens: int
    """Tokens that one of `Request.block_hashes` covers."""
    chunk_tokens: int
    group: int
    """The KV cache group that is cached."""
    world_size: int
    num_blocks: int
    regions: tuple[Region, ...]
    itemsize: int

    @property
    def blocks_per_chunk(self) -> int:
        """A whole number."""
        return self.chunk_tokens // self.block_tokens

    @property
    def hashes_per_chunk(self) -> int:
        """A whole number."""
        return self.chunk_tokens // self.hash_tokens

    @property
    def block_bytes(self) -> int:
        """Of one block in all regions of one rank."""
        return sum(region.block_bytes for region in self.regions)

    @property
    def parts(self) -> Parts:
        """One for each rank."""
        nbytes = self.blocks_per_chunk * self.block_bytes
        return Parts([Part(0, rank, nbytes) for rank in range(self.world_size)])

    def named(self, namespace: Namespace) -> EnginePlan:
        """With the namespace that its chunks belong to."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return EnginePlan(**{**values, "namespace": namespace})


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePlan(Geometry):
    """And whose it is: what the scheduler's side has to know beside it."""

    namespace: Namespace

    def with_backend(self, name: str) -> EnginePlan:
        """The same, of an engine whose blocks are read and written by that attention backend."""
        return replace(self, namespace=replace(self.namespace, attention_backend=name))

    def with_epoch(self, epoch: int) -> EnginePlan:
        """The same in another namespace: after a reset nothing from before may be found."""
        return replace(self, namespace=replace(self.namespace, epoch=epoch))


class NotCached(NamedTuple):
    """This engine is served correctly, without a cache."""

    reason: str


def geometry_of(settings: Settings, vllm_config: Any, kv_cache_config: Any) -> Geometry | NotCached:
    """How this engine's KV is cut, or why it is not cached."""
    from vllm.v1.core.kv_cache_utils import resolve_kv_cache_block_sizes

    reason = _not_cached(vllm_config, kv_cache_config)
    if reason is not None:
        return NotCached(reason)
    block_tokens, hash_tokens = resolve_kv_cache_block_sizes(kv_cache_config, vllm_config)
    group = kv_cache_config.prefix_cacheable_group_ids[0]
    spec = kv_cache_config.kv_cache_groups[group].kv_cache_spec
    return Geometry(
        block_tokens=block_tokens,
        hash_tokens=hash_tokens,
        chunk_tokens=-(-settings.config.storage.chunk_tokens // block_tokens) * block_tokens,
        group=group,
        world_size=vllm_config.parallel_config.world_size,
        num_blocks=kv_cache_config.num_blocks,
        regions=regions_of(kv_cache_config),
        itemsize=getattr(spec.dtype, "itemsize", 1),
    )


def regions_of(kv_cache_config: Any) -> tuple[Region, ...]:
    """Where each rank's blocks lie in its allocation (`KVCacheTensor`s, `vllm/v1/kv_cache_interface.py`)."""
    found: dict[int, Region] = {}
    blocks = kv_cache_config.num_blocks
    for tensor in kv_cache_config.kv_cache_tensors:
        span = blocks * tensor.block_stride
        if tensor.layer_stride >= span:  # layer after layer
            starts = [tensor.offset + layer * tensor.layer_stride for layer in range(len(tensor.layers))]
            # several runs of blocks in one layer's: one for each group of heads
            pieces = tensor.layer_stride // span
            starts = [start + piece * span for start in starts for piece in range(pieces)]
        else:  # block after block, each with all layers
            starts = [0]
        for start in starts:
            found.setdefault(start, Region(start, tensor.block_stride))
    return tuple(found[start] for start in sorted(found))


def _not_cached(vllm_config: Any, kv_cache_config: Any) -> str | None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    parallel = vllm_config.parallel_config
    if not vllm_config.cache_config.enable_prefix_caching:
        # MLA on a CPU: prefill behind loaded KV gave other tokens there, which is why vLLM switches it off
        return (
            "prefix caching is off: vLLM does so where attention can't go on from cached KV, or was told to"
        )
    if getattr(parallel, "nnodes", 1) > 1:
        return "an engine over several machines: their ranks can't share one arena. Run one engine on each"
    if parallel.pipeline_parallel_size > 1:
        return "pipeline parallelism: the stages' parts differ, which this version does not support"
    if parallel.decode_context_parallel_size > 1 or getattr(parallel, "prefill_context_parallel_size", 1) > 1:
        return "context parallelism is not supported by this version"
    groups = kv_cache_config.kv_cache_groups
    if len(groups) != 1 or len(kv_cache_config.prefix_cacheable_group_ids) != 1:
        kinds = ", ".join(sorted({type(group.kv_cache_spec).__name__ for group in groups}))
        return (
            f"the model has {len(groups)} kinds of KV cache ({kinds}); only full attention and MLA are cached. "
            "With --disable-hybrid-kv-cache-manager vLLM keeps sliding windows as full attention, which is"
        )
    spec = groups[0].kv_cache_spec
    if not isinstance(spec, FullAttentionSpec):
        return f"{type(spec).__name__} is not cached by this version, only full attention and MLA"
    return None
