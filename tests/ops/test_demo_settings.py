"""The demo's cache: the reader's configuration where there is one, and sizes that hold a prompt where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvtiers.config import CacheConfig, fit
from kvtiers.model.errors import DoesNotFit
from kvtiers.model.tiers import Tier
from kvtiers.ops.demo.options import BadOption
from kvtiers.ops.demo.settings import demo_settings, explicit_settings, tiers_to_show

MIB = 1 << 20
KV = 40 * MIB


def config_of(text: str, disk: Path, *, kv_bytes: int = KV, **environ: str) -> CacheConfig:
    said = explicit_settings(CacheConfig.from_text(text, environ=environ))
    settings: dict[str, Any] = demo_settings(
        said, kv_bytes=kv_bytes, chunk_tokens=256, device="cpu", disk_path=disk
    )
    return CacheConfig.from_mapping(settings, environ={})


@pytest.mark.parametrize("kv_bytes", [1, 100_000, KV, 200 * MIB])
def test_own_sizes_hold_one_prompt_in_every_tier_and_its_load_from_disk(
    tmp_path: Path, kv_bytes: int
) -> None:
    config = config_of("storage: {}", tmp_path / "disk", kv_bytes=kv_bytes)
    assert tiers_to_show(config, kv_bytes) == (Tier.GPU, Tier.CPU, Tier.DISK)
    fitted = fit(config)
    assert fitted.cpu.capacity * config.storage.cpu.write_lease_share >= kv_bytes
    assert config.storage.gpu.device == "cpu"
    assert config.storage.disk.path == (str(tmp_path / "disk"),)
    assert not (tmp_path / "disk").exists()


def test_what_the_reader_says_goes_first(tmp_path: Path) -> None:
    text = (
        "storage:\n  cpu: {buffer_size: 600Mi}\n  gpu: {capacity: 300Mi, device: cpu}\n"
        "  disk: {compression: zstd}\nasync: {max_workers: 2}\n"
    )
    config = config_of(text, tmp_path / "disk", KVTIERS_STORAGE__CPU__VERIFY_ON_HIT="true")
    storage = config.storage
    assert (storage.cpu.buffer_size, storage.gpu.capacity) == (600 * MIB, 300 * MIB)
    assert (
        storage.cpu.eviction_threshold == 0.9
    )  # the default: only our own size comes with our own threshold
    assert storage.cpu.verify_on_hit
    assert (storage.disk.enabled, storage.disk.compression) == (True, "zstd")
    assert config.async_.max_workers == 2


def test_disk_the_reader_names_is_used(tmp_path: Path) -> None:
    config = config_of(f"storage: {{disk: {{path: {tmp_path}/mine}}}}", tmp_path / "disk")
    assert config.storage.disk.path == (f"{tmp_path}/mine",)
    assert config.storage.disk.enabled


@pytest.mark.parametrize(
    ("text", "tiers"),
    [
        ("storage: {disk: {enabled: false}}", (Tier.GPU, Tier.CPU)),
        ("storage: {cpu: {enabled: false}}", (Tier.GPU, Tier.DISK)),
        ("storage: {gpu: {capacity: null}}", (Tier.CPU, Tier.DISK)),
    ],
)
def test_tier_that_is_switched_off_is_left_out(tmp_path: Path, text: str, tiers: tuple[Tier, ...]) -> None:
    assert tiers_to_show(config_of(text, tmp_path / "disk"), KV) == tiers


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("storage: {gpu: {capacity: 8Mi, device: cpu}}", "storage.gpu.capacity"),
        ("storage: {cpu: {buffer_size: 16Mi}}", "storage.cpu.buffer_size"),
        ("storage: {cpu: {buffer_size: 80Mi}}", "staged in 8 MiB"),
        ("storage: {disk: {enabled: true, path: PATH, max_size: 8Mi}}", "storage.disk.max_size"),
    ],
)
def test_tier_too_small_for_one_prompt_is_refused_with_the_numbers(
    tmp_path: Path, text: str, message: str
) -> None:
    config = config_of(text.replace("PATH", str(tmp_path / "mine")), tmp_path / "disk")
    with pytest.raises(BadOption, match=message) as caught:
        tiers_to_show(config, KV)
    assert "40 MiB" in str(caught.value)


def test_more_than_the_machine_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match="200Ti"):
        tiers_to_show(config_of("storage: {cpu: {buffer_size: 200Ti}}", tmp_path / "disk"), KV)
