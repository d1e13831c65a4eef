"""The LMCache-compatible interface: these texts parse as they are, for good."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from kvtiers.config import CacheConfig

TEMPLATE = """\
# lmcache_config.yaml
storage:
  # GPU 层：使用 vLLM 的显存管理
  gpu:
    max_utilization: 0.80          # 最大显存利用率 80%
    eviction_threshold: 0.75       # 超过 75% 开始卸载

  # CPU 层：Pinned Memory 缓存
  cpu:
    enabled: true
    buffer_size: "200Gi"           # CPU 缓存 200GB
    numa_aware: true               # 启用 NUMA 亲和性
    eviction_policy: "lru"

  # 本地磁盘层
  disk:
    enabled: true
    path: "/var/cache/lmcache"     # 本地缓存路径
    max_size: "2Ti"                # 最大 2TB
    compression: "zstd"            # 压缩算法
    compression_level: 3           # 压缩级别

  # 远程存储层
  remote:
    enabled: true
    backend: "mooncake"            # 或 redis, infinistore
    endpoint: "mooncache.cluster.local:8080"
    connection_pool_size: 32
    timeout_ms: 5000

# 异步卸载配置
async:
  max_workers: 8                   # 异步线程数
  queue_size: 10000               # 任务队列大小
  retry_policy:
    max_retries: 3
    backoff_factor: 2

# 监控配置
observability:
  metrics_port: 8000
  health_check_interval: 30
"""

SNIPPETS = {
    "gpu": """\
gpu:
  max_utilization: 0.75          # 留出 25% 缓冲
  eviction_threshold: 0.70       # 70% 时开始预卸载
""",
    "cpu": """\
cpu:
  buffer_size: "100Gi"           # 必须配置上限
  eviction_policy: "lru"
  eviction_threshold: 0.90       # 90% 时触发淘汰
""",
    "disk": """\
disk:
  compression_level: 3           # 1-3 级即可，更高收益递减
""",
}


def test_the_template_parses_verbatim() -> None:
    config = CacheConfig.from_text(TEMPLATE, environ={})
    storage = config.storage
    assert (storage.gpu.max_utilization, storage.gpu.eviction_threshold) == (0.80, 0.75)
    assert (storage.cpu.enabled, storage.cpu.buffer_size, storage.cpu.numa_aware) == (True, 200 << 30, True)
    assert storage.cpu.eviction_policy == "lru"
    assert (storage.disk.enabled, storage.disk.path, storage.disk.max_size) == (
        True,
        ("/var/cache/lmcache",),
        2 << 40,
    )
    assert (storage.disk.compression, storage.disk.compression_level) == ("zstd", 3)
    assert (storage.remote.enabled, storage.remote.backend) == (True, "mooncake")
    assert storage.remote.endpoint == "mooncache.cluster.local:8080"
    assert (storage.remote.connection_pool_size, storage.remote.timeout_ms) == (32, 5000)
    assert (config.async_.max_workers, config.async_.queue_size) == (8, 10000)
    assert (config.async_.retry_policy.max_retries, config.async_.retry_policy.backoff_factor) == (3, 2)
    assert (config.observability.metrics_port, config.observability.health_check_interval) == (8000, 30)


def test_the_template_parses_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "lmcache_config.yaml"
    file.write_text(TEMPLATE, encoding="utf-8")
    assert CacheConfig.from_yaml(file, environ={}) == CacheConfig.from_text(TEMPLATE, environ={})
    assert CacheConfig.from_yaml(str(file), environ={}).source_of("storage.cpu.buffer_size") == f"{file}:11"


@pytest.mark.parametrize("name", SNIPPETS)
def test_each_snippet_parses_below_storage(name: str) -> None:
    text = "storage:\n" + textwrap.indent(SNIPPETS[name], "  ")
    config = CacheConfig.from_text(text, environ={})
    values = {
        "gpu": (config.storage.gpu.max_utilization, config.storage.gpu.eviction_threshold),
        "cpu": (config.storage.cpu.buffer_size, config.storage.cpu.eviction_threshold),
        "disk": config.storage.disk.compression_level,
    }
    assert values[name] == {"gpu": (0.75, 0.70), "cpu": (100 << 30, 0.90), "disk": 3}[name]


def test_defaults_are_the_documented_ones() -> None:
    config = CacheConfig()
    shown = {one.setting.key: one.value for one in config.effective()}
    assert shown == {
        "storage.chunk_tokens": 256,
        "storage.gpu.capacity": None,
        "storage.gpu.device": "cuda",
        "storage.gpu.max_utilization": 0.80,
        "storage.gpu.eviction_threshold": 0.75,
        "storage.gpu.low_watermark": 0.70,
        "storage.gpu.idle_after_s": 300,
        "storage.cpu.enabled": True,
        "storage.cpu.buffer_size": "auto",
        "storage.cpu.numa_aware": True,
        "storage.cpu.eviction_policy": "lru",
        "storage.cpu.eviction_threshold": 0.90,
        "storage.cpu.low_watermark": 0.85,
        "storage.cpu.probation_share": 0.20,
        "storage.cpu.write_lease_share": 0.25,
        "storage.cpu.verify_on_hit": False,
        "storage.cpu.huge_pages": "advise",
        "storage.cpu.lock_memory": False,
        "storage.disk.enabled": False,
        "storage.disk.path": (),
        "storage.disk.max_size": "auto",
        "storage.disk.compression": "none",
        "storage.disk.compression_level": 3,
        "storage.disk.write_policy": "write_through",
        "storage.disk.durability": "rename",
        "storage.disk.eviction_policy": "lru",
        "storage.disk.eviction_threshold": 0.95,
        "storage.disk.low_watermark": 0.90,
        "storage.disk.min_free_space": 1 << 30,
        "storage.disk.admission": "always",
        "storage.disk.direct_io": "auto",
        "storage.disk.read_timeout_ms": 5000,
        "storage.disk.write_timeout_ms": 30000,
        "storage.disk.max_queue_bytes": 1 << 30,
        "storage.remote.enabled": False,
        "storage.remote.backend": None,
        "storage.remote.endpoint": None,
        "storage.remote.connection_pool_size": 32,
        "storage.remote.timeout_ms": 5000,
        "storage.remote.compression": "zstd",
        "storage.remote.compression_level": 3,
        "storage.remote.password_file": None,
        "storage.remote.write_policy": "write_through",
        "storage.remote.max_upload_bytes_per_s": None,
        "storage.remote.max_upload_wait_s": 60,
        "storage.remote.max_queue_bytes": 256 << 20,
        "storage.remote.known_for_s": 60,
        "storage.remote.absent_for_s": 2,
        "storage.remote.p2p": False,
        "storage.remote.segment_size": 4 << 30,
        "storage.remote.redis.ttl_s": None,
        "storage.remote.redis.tls_ca_file": None,
        "storage.remote.redis.tls_cert_file": None,
        "storage.remote.redis.tls_key_file": None,
        "storage.remote.redis.tls_check_hostname": True,
        "storage.remote.mooncake.local_host": None,
        "storage.remote.mooncake.protocol": "tcp",
        "storage.remote.mooncake.rdma_devices": None,
        "storage.remote.mooncake.metadata_server": "P2PHANDSHAKE",
        "storage.remote.mooncake.ssd_offload_path": None,
        "storage.remote.s3.endpoint_url": None,
        "storage.remote.s3.region": None,
        "storage.remote.s3.credentials_file": None,
        "storage.remote.s3.ca_file": None,
        "storage.remote.infinistore.rdma_device": None,
        "storage.remote.infinistore.rdma_port": 1,
        "storage.remote.infinistore.rdma_connections": 2,
        "storage.remote.fs.group_shared": False,
        "storage.remote.fs.durability": "rename",
        "storage.remote.fs.orphan_age_s": 3600,
        "async.max_workers": 4,
        "async.queue_size": 1000,
        "async.retry_policy.max_retries": 3,
        "async.retry_policy.backoff_factor": 2,
        "async.load_timeout_ms": 2000,
        "async.close_timeout_s": 30,
        "observability.http_host": "127.0.0.1",
        "observability.token_file": None,
        "observability.metrics_port": 8000,
        "observability.health_check_interval": 30,
    }


def test_every_setting_tells_its_effect_and_what_is_allowed() -> None:
    for one in CacheConfig().effective():
        assert one.setting.effect, one.setting.key
        assert one.setting.allowed, one.setting.key
        assert one.setting.default, one.setting.key


@pytest.mark.parametrize("cpu", ["true", "false"])
@pytest.mark.parametrize("disk", ["true", "false"])
@pytest.mark.parametrize("remote", ["true", "false"])
@pytest.mark.parametrize("gpu", ["", "capacity: 1Gi"])
def test_any_combination_of_tiers_parses(cpu: str, disk: str, remote: str, gpu: str) -> None:
    text = f"""
storage:
  gpu: {{{gpu}}}
  cpu: {{enabled: {cpu}}}
  disk: {{enabled: {disk}, path: /d}}
  remote: {{enabled: {remote}, backend: none-yet, endpoint: "h:1"}}
"""
    config = CacheConfig.from_text(text, environ={})
    assert config.storage.cpu.enabled is (cpu == "true")
    assert config.storage.disk.enabled is (disk == "true")


def test_a_watermark_left_out_follows_its_threshold() -> None:
    config = CacheConfig.from_text(
        "storage: {cpu: {eviction_threshold: 0.5}, gpu: {max_utilization: 0.6}}", environ={}
    )
    assert config.storage.cpu.low_watermark == 0.45
    assert (config.storage.gpu.eviction_threshold, config.storage.gpu.low_watermark) == (0.6, 0.55)
    tiny = CacheConfig.from_text("storage: {disk: {eviction_threshold: 0.04}}", environ={})
    assert 0 < tiny.storage.disk.low_watermark < 0.04


def test_bare_off_and_sections_with_nothing_in_them_mean_what_they_look_like() -> None:
    config = CacheConfig.from_text(
        "storage:\n  gpu:\n  cpu:\n    huge_pages: off\n  disk:\n    direct_io: off\nasync:\n", environ={}
    )
    assert config.storage.cpu.huge_pages == "off"
    assert config.storage.disk.direct_io == "off"
    assert config.async_ == CacheConfig().async_
