"""Overrides of the environment, and where each value came from."""

from __future__ import annotations

import pickle

import pytest

from kvtiers.config import CacheConfig, CpuConfig, StorageConfig
from kvtiers.config.keys import settings_of
from kvtiers.model.errors import ConfigError

FILE = "storage:\n  cpu:\n    buffer_size: 8Gi\n  disk:\n    enabled: true\n    path: /d\n"


def read(environ: dict[str, str], text: str = FILE) -> CacheConfig:
    return CacheConfig.from_text(text, name="f.yaml", environ=environ)


def test_the_environment_wins_over_the_file_and_the_file_over_the_default() -> None:
    config = read({"KVTIERS_STORAGE__CPU__BUFFER_SIZE": "4Gi", "UNRELATED": "x"})
    assert config.storage.cpu.buffer_size == 4 << 30
    assert config.source_of("storage.cpu.buffer_size") == "env KVTIERS_STORAGE__CPU__BUFFER_SIZE"
    assert config.source_of("storage.disk.path") == "f.yaml:6"
    assert config.source_of("storage.chunk_tokens") == "default"
    with pytest.raises(KeyError):
        config.source_of("storage.nope")


def test_every_kind_of_value_can_come_from_the_environment() -> None:
    config = read(
        {
            "KVTIERS_STORAGE__CHUNK_TOKENS": "128",
            "KVTIERS_STORAGE__CPU__EVICTION_THRESHOLD": "0.5",
            "KVTIERS_STORAGE__CPU__VERIFY_ON_HIT": "yes",
            "KVTIERS_STORAGE__CPU__HUGE_PAGES": "off",
            "KVTIERS_STORAGE__DISK__PATH": "[/a, /b]",
            "KVTIERS_STORAGE__DISK__MAX_SIZE": "auto",
            "KVTIERS_STORAGE__REMOTE__ENDPOINT": "8080",
            "KVTIERS_STORAGE__GPU__CAPACITY": "null",
            "KVTIERS_ASYNC__RETRY_POLICY__MAX_RETRIES": "0",
            "KVTIERS_OBSERVABILITY__METRICS_PORT": "9000",
        },
        FILE + "  gpu: {capacity: 1Gi}\n",
    )
    storage = config.storage
    assert (storage.chunk_tokens, storage.cpu.eviction_threshold, storage.cpu.low_watermark) == (
        128,
        0.5,
        0.45,
    )
    assert (storage.cpu.verify_on_hit, storage.cpu.huge_pages) == (True, "off")
    assert (storage.disk.path, storage.disk.max_size) == (("/a", "/b"), "auto")
    assert (storage.remote.endpoint, storage.gpu.capacity) == ("8080", None)
    assert (config.async_.retry_policy.max_retries, config.observability.metrics_port) == (0, 9000)


def test_an_override_may_stand_where_the_file_says_nothing() -> None:
    assert read({"KVTIERS_ASYNC__MAX_WORKERS": "7"}, "storage:\nasync:\n").async_.max_workers == 7


def test_an_override_can_mend_a_wrong_value_of_the_file() -> None:
    assert (
        read(
            {"KVTIERS_STORAGE__CPU__BUFFER_SIZE": "1Gi"}, "storage: {cpu: {buffer_size: x}}"
        ).storage.cpu.buffer_size
        == 1 << 30
    )


def test_an_empty_variable_counts_as_not_set() -> None:
    assert (
        read({"KVTIERS_STORAGE__CPU__BUFFER_SIZE": " ", "KVTIERS_STORAGE__NOPE": ""}).storage.cpu.buffer_size
        == 8 << 30
    )


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("KVTIERS_STORAGE__CPU__BUFER_SIZE", "did you mean KVTIERS_STORAGE__CPU__BUFFER_SIZE?"),
        ("KVTIERS_STORAGE_CPU_BUFFER_SIZE", "did you mean KVTIERS_STORAGE__CPU__BUFFER_SIZE? (levels"),
        ("KVTIERS_STORGE__CPU__BUFFER_SIZE", "did you mean KVTIERS_STORAGE__CPU__BUFFER_SIZE?"),
        ("KVTIERS_STORAGE__CPU", "no such setting"),
        ("KVTIERS_ZZZ__YYY", "config reference"),
    ],
)
def test_a_name_that_overrides_nothing_is_a_problem(name: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read({name: "4Gi"})
    assert len(caught.value.problems) == 1
    assert says in caught.value.problems[0]
    assert name in caught.value.problems[0]


def test_other_variables_with_our_prefix_are_left_alone() -> None:
    assert read({"KVTIERS_CACHE_DIR": "/x", "KVTIERS_LOG": "debug"}) == read({})


def test_a_wrong_override_names_its_variable() -> None:
    with pytest.raises(ConfigError) as caught:
        read({"KVTIERS_ASYNC__MAX_WORKERS": "many"})
    assert caught.value.problems == (
        'async.max_workers = "many" (env KVTIERS_ASYNC__MAX_WORKERS): must be a whole number, at least 1 and at most 1024',
    )


def test_the_process_environment_is_used_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVTIERS_STORAGE__CHUNK_TOKENS", "32")
    assert CacheConfig.from_mapping({}).storage.chunk_tokens == 32
    assert CacheConfig.from_mapping({}, environ={}).storage.chunk_tokens == 256
    assert CacheConfig().storage.chunk_tokens == 256  # a program's own arguments are not overridden


def test_values_given_in_a_program_say_so() -> None:
    config = CacheConfig(storage=StorageConfig(cpu=CpuConfig(buffer_size="1Gi")), async_={"max_workers": 2})
    assert config.source_of("storage.cpu.buffer_size") == "argument"
    assert config.source_of("async.max_workers") == "argument"
    assert config.source_of("async.queue_size") == "default"


def test_equal_values_are_equal_wherever_they_came_from() -> None:
    one, two = (
        read({}),
        CacheConfig.from_mapping(
            {"storage": {"cpu": {"buffer_size": 8 << 30}, "disk": {"enabled": 1, "path": ["/d"]}}}, environ={}
        ),
    )
    assert one == two
    assert hash(one) == hash(two)
    assert one != read({"KVTIERS_STORAGE__CHUNK_TOKENS": "1"})


def test_a_configuration_is_frozen_and_survives_pickling() -> None:
    config = read({})
    with pytest.raises(ValueError, match="frozen"):
        config.storage.cpu.buffer_size = 1  # type: ignore[misc]
    copy = pickle.loads(pickle.dumps(config))
    assert copy == config
    assert copy.source_of("storage.cpu.buffer_size") == "f.yaml:3"


def test_every_setting_has_a_variable_of_its_own() -> None:
    names = [one.env for one in settings_of(CacheConfig)]
    assert len(set(names)) == len(names)
    assert "KVTIERS_ASYNC__RETRY_POLICY__BACKOFF_FACTOR" in names


def test_from_mapping_does_not_touch_its_argument() -> None:
    values = {"storage": {"cpu": None}}
    CacheConfig.from_mapping(values, environ={"KVTIERS_STORAGE__CHUNK_TOKENS": "1"})
    assert values == {"storage": {"cpu": None}}
