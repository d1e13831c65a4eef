"""Whose KV it is: everything that makes the blocks of two engines interchangeable, as a namespace.

What can't be told is not guessed: an engine whose weights are not found is not cached.
"""

from __future__ import annotations

import hashlib
import json
import logging
import platform
from pathlib import Path
from typing import Any, Final

from kvtiers.integrations.vllm.plan import Geometry, NotCached
from kvtiers.integrations.vllm.settings import Settings
from kvtiers.integrations.vllm.versions import UnsupportedEngine, installed_version
from kvtiers.model.namespace import ModelNotFound, Namespace, fingerprint_model

_log = logging.getLogger(__name__)

_OF_THE_MODEL: Final = (
    "max_model_len",
    "quantization_config",
    "disable_sliding_window",
    "model_impl",
    "model_class_overrides",
    "code_revision",
)
_OF_MEDIA: Final = (
    "mm_processor_kwargs",
    "media_io_kwargs",
    "video_pruning_rate",
    "mm_encoder_attn_backend",
    "mm_encoder_attn_dtype",
)


def namespace_of(
    settings: Settings, geometry: Geometry, vllm_config: Any, kv_cache_config: Any
) -> Namespace | NotCached:
    """The engine's namespace, or why it can have none. Raises UnsupportedEngine for what the user should change.

    Without the attention backend, which only workers know (`backends.py`).
    """
    from vllm import envs
    from vllm.platforms import current_platform

    model, parallel, cache = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config
    probe = hash_probe(vllm_config)
    if probe != hash_probe(vllm_config):  # its seed is drawn anew each time
        raise UnsupportedEngine(
            f"--prefix-caching-hash-algo {cache.prefix_caching_hash_algo} gives every process other hashes, so nothing could be "
            "found again: set PYTHONHASHSEED to the same number for every engine, or use sha256"
        )
    fingerprint = _fingerprint(settings, vllm_config)
    if fingerprint is None:
        return NotCached(
            f"the weights of {model.model} are not found on this machine, so nothing tells whether they are the same the next time. "
            'Name them yourself: "fingerprint" in kv_connector_extra_config'
        )
    spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
    layout = {
        "kv_cache_layout": str(kv_cache_config.kv_cache_layout),
        "regions": [region.block_bytes for region in geometry.regions],
        "spec": repr(spec),
        "device": _cpu() if current_platform.is_cpu() else current_platform.get_device_name(),
        "cache_dtype": str(cache.cache_dtype),
        "dtype": str(model.dtype),
        "shuffled": bool(envs.VLLM_ROCM_SHUFFLE_KV_CACHE_LAYOUT),  # within one backend and layout
    }
    return Namespace(
        model=Path(str(model.model)).name,
        fingerprint=fingerprint,
        engine="vllm",
        engine_version=installed_version(),
        physical_layout=json.dumps(layout, sort_keys=True),
        quantization=str(model.quantization),
        speculative=_speculative(vllm_config.speculative_config),
        block_tokens=geometry.block_tokens,
        chunk_tokens=geometry.chunk_tokens,
        world_size=parallel.world_size,
        hash_algorithm=f"{cache.prefix_caching_hash_algo} {probe}",
    )


def hash_probe(vllm_config: Any) -> str:
    """The hash of a block of known tokens: equal in two processes exactly if all their hashes are."""
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core import kv_cache_utils

    hash_fn = get_hash_fn_by_name(vllm_config.cache_config.prefix_caching_hash_algo)
    seed = hash_fn(kv_cache_utils.resolve_none_hash_seed(hash_fn))
    return str(hash_fn((seed, (1, 2, 3, 4), None)).hex())


def _cpu() -> str:
    """What a backend looks at before it packs KV for the machine's instructions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next(
        (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features"))), []
    )
    relevant = sorted(
        flag for flag in flags if flag.startswith(("avx512", "amx", "avx2", "sve", "bf16", "asimd"))
    )
    return " ".join([platform.machine(), *relevant])


def _speculative(config: Any) -> str:
    """A draft model's layers are in the same blocks. What it drafts is verified, so its name is enough."""
    return "" if config is None else f"{config.method} {config.model} {config.num_speculative_tokens}"


def _fingerprint(settings: Settings, vllm_config: Any) -> str | None:
    """Of the config in force (overrides and RoPE included), the arguments and the weights; None if these can't be found."""
    model, load = vllm_config.model_config, vllm_config.load_config
    weights = settings.fingerprint or (
        f"dummy {model.seed}" if load.load_format == "dummy" else _weights(model, load.download_dir)
    )
    if weights is None:
        return None
    values = {name: value for name, value in model.hf_config.to_dict().items() if name != "_name_or_path"}
    told = json.dumps([values, _arguments(vllm_config)], sort_keys=True, default=str)
    return hashlib.sha256(f"{load.load_format}\0{told}\0{weights}".encode()).hexdigest()


def _arguments(vllm_config: Any) -> dict[str, Any]:
    """Those of the engine's that decide which KV tokens get.

    The longest prompt is one of them: from a length on some models turn their positions by other factors (LongRoPE) or scale their
    attention (Llama 4), for short prompts too.
    """
    model = vllm_config.model_config
    media = getattr(model, "multimodal_config", None)
    return {
        **{name: getattr(model, name, None) for name in _OF_THE_MODEL},
        "attention": vllm_config.attention_config,
        "media": None if media is None else {name: getattr(media, name, None) for name in _OF_MEDIA},
    }


def _weights(model: Any, download_dir: str | None) -> str | None:
    path = Path(model.model)
    if path.is_file():  # GGUF
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    directory = path if path.is_dir() else _downloaded(model, download_dir)
    try:
        return None if directory is None else fingerprint_model(directory)
    except ModelNotFound:
        return None


def _downloaded(model: Any, download_dir: str | None) -> Path | None:
    try:
        from huggingface_hub import snapshot_download

        found = snapshot_download(
            model.model, revision=model.revision, cache_dir=download_dir, local_files_only=True
        )
    except Exception as error:  # noqa: BLE001 - whatever its cache lacks
        _log.info("%s is not among the downloaded models: %s", model.model, error)
        return None
    return Path(found)
