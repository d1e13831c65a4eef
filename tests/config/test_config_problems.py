"""Bad input gives one error with every problem in it, each with key, value, place, what is allowed and what was meant."""

from __future__ import annotations

from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.config import CacheConfig, CpuConfig, StorageConfig
from kvtiers.model.errors import ConfigError


def problems(text: str, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        CacheConfig.from_text(text, name="f.yaml", environ=environ)
    return list(caught.value.problems)


def only(text: str, **environ: str) -> str:
    found = problems(text, **environ)
    assert len(found) == 1, found
    return found[0]


def test_all_problems_of_a_file_are_in_one_error_in_its_order() -> None:
    found = problems(
        """\
storage:
  cpu:
    bufer_size: 4Gi
    eviction_threshold: 80
    huge_pages: of
  disk:
    enabled: true
    max_size: 20Gx
  remote:
    enabled: true
    timeout_ms: true
async:
  max_workers: 0
observabilty: {}
""",
        KVTIERS_STORAGE__CPU__BUFER_SIZE="4Gi",
    )
    keys = [one.split(" ")[0] for one in found]
    assert sorted(keys) == sorted(
        [
            "storage.cpu.bufer_size",
            "storage.cpu.eviction_threshold",
            "storage.cpu.huge_pages",
            "storage.disk.max_size",
            "storage.disk.path",
            "storage.remote.timeout_ms",
            "storage.remote.backend",
            "async.max_workers",
            "observabilty",
            "env",
        ]
    )
    with_lines = [
        int(one.split("f.yaml:")[1].split(")")[0]) for one in found if " = " in one and "f.yaml" in one
    ]
    assert with_lines == sorted(with_lines)


def test_a_problem_names_key_value_line_and_what_is_allowed() -> None:
    assert only("async:\n  max_workers: 0\n") == (
        "async.max_workers = 0 (f.yaml:2): must be a whole number, at least 1 and at most 1024"
    )
    assert only("storage: {disk: {durability: sync}}") == (
        'storage.disk.durability = "sync" (f.yaml:1): must be rename or fsync'
    )


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("storage: {cpu: {bufer_size: 1Gi}}", "did you mean buffer_size?"),
        ("storage: {cpu: {buffer-size: 1Gi}}", "did you mean buffer_size?"),
        ("storage: {buffer_size: 1Gi}", "did you mean storage.cpu.buffer_size?"),
        ("cpu: {buffer_size: 1Gi}", "did you mean storage.cpu?"),
        ("storge: {}", "did you mean storage?"),
        (
            "storage: {eviction_threshold: 0.5}",
            "eviction_threshold in one of storage.cpu, storage.disk, storage.gpu",
        ),
        ("storage: {zzz: 1}", "valid here: chunk_tokens, gpu, cpu, disk, remote"),
    ],
)
def test_an_unknown_key_gets_the_nearest_valid_one(text: str, meant: str) -> None:
    assert meant in only(text)


@pytest.mark.parametrize(
    ("value", "hint"),
    [("80", "write 0.8 for 80 %"), ('"80%"', "write 0.8"), ('"0.5%"', "write 0.005"), ("7.5", "write 0.075")],
)
def test_a_percentage_for_a_share_gets_the_share(value: str, hint: str) -> None:
    assert hint in only(f"storage: {{cpu: {{eviction_threshold: {value}}}}}")


@pytest.mark.parametrize(
    "value", ["0", "-0.1", "1.5", "101", ".nan", ".inf", "true", "half", "[0.5]", "{}", "null"]
)
def test_what_is_no_share_is_refused(value: str) -> None:
    assert "storage.disk.eviction_threshold" in only(f"storage: {{disk: {{eviction_threshold: {value}}}}}")


@pytest.mark.parametrize(
    "setting",
    [
        "storage: {chunk_tokens: true}",
        "storage: {chunk_tokens: 0}",
        "storage: {chunk_tokens: 1.5}",
        "storage: {chunk_tokens: null}",
        f"storage: {{chunk_tokens: {'9' * 5000}}}",
        "storage: {gpu: {device: tpu}}",
        "storage: {gpu: {capacity: auto}}",
        "storage: {cpu: {eviction_threshold: 1}}",
        "storage: {cpu: {eviction_policy: lur}}",
        "storage: {cpu: {enabled: maybe}}",
        "storage: {cpu: {buffer_size: 200}}",
        "storage: {cpu: []}",
        "storage: 3",
        "storage: {disk: {path: 3}}",
        "storage: {disk: {path: ['']}}",
        "storage: {disk: {path: [/a, /a]}}",
        "storage: {disk: {path: [/a, /a/b]}}",
        "storage: {disk: {compression: gzip}}",
        "storage: {remote: {endpoint: 8080}}",
        "storage: {remote: {backend: ''}}",
        "async: {retry_policy: {backoff_factor: 0}}",
        "observability: {metrics_port: 65536}",
        "observability: {health_check_interval: 2024-99-99}",
    ],
)
def test_each_wrong_value_is_one_problem(setting: str) -> None:
    assert only(setting)


def test_a_forgotten_unit_is_suspected() -> None:
    assert "was a unit forgotten?" in only("storage: {cpu: {buffer_size: 200}}")


def test_contradictions_name_both_sides() -> None:
    assert only("storage:\n  cpu:\n    low_watermark: 0.95\n") == (
        "storage.cpu.low_watermark = 0.95 (f.yaml:3): must be below eviction_threshold, which is 0.9"
    )
    assert "max_utilization, which is 0.5" in only(
        "storage: {gpu: {max_utilization: 0.5, eviction_threshold: 0.6}}"
    )
    assert (
        len(
            problems(
                "storage: {gpu: {max_utilization: 0.5, eviction_threshold: 0.6}, cpu: {low_watermark: 1}}"
            )
        )
        == 2
    )


def test_a_contradiction_hidden_behind_another_problem_is_found_too() -> None:
    found = problems("storage: {cpu: {typo_xyz: 1, low_watermark: 0.95}, disk: {enabled: true, max_size: x}}")
    assert [one.split(" ")[0] for one in found] == [
        "storage.cpu.typo_xyz",
        "storage.cpu.low_watermark",
        "storage.disk.max_size",
        "storage.disk.path",
    ]


def test_a_wrong_value_is_not_blamed_twice() -> None:
    assert only("storage: {cpu: {low_watermark: 0.5, eviction_threshold: 90}}")
    assert only("storage: {disk: {enabled: true, path: 3}}")


def test_enabled_tiers_say_what_they_need() -> None:
    assert "storage.disk.path (f.yaml:1): is needed" in only("storage: {disk: {enabled: true}}")
    assert "and so is endpoint" in only("storage: {remote: {enabled: true}}")
    assert "storage.remote.endpoint" in only("storage: {remote: {enabled: true, backend: redis}}")


def test_a_password_is_not_shown() -> None:
    assert "secret" not in only('storage: {remote: {enabled: true, endpoint: "redis://me:secret@host:1"}}')
    assert "secret" not in only("storage: {cpu: {lock_memory: 'redis://me:secret@host:1'}}")


def test_a_long_value_is_cut_and_a_key_can_not_forge_lines() -> None:
    assert len(only(f"storage: {{cpu: {{huge_pages: {'x' * 5000}}}}}")) < 200
    assert "\n" not in only('"a\\nb": 1')


def test_constructing_in_a_program_reports_the_same_way() -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig(storage={"cpu": {"buffer_size": "4GX", "low_watermark": 0.99}}, zzz=1)  # type: ignore[call-arg]
    assert [one.split(" ")[0] for one in caught.value.problems] == [
        "storage.cpu.buffer_size",
        "zzz",
        "storage.cpu.low_watermark",
    ]
    with pytest.raises(ConfigError, match="buffer_size"):
        CacheConfig(storage=StorageConfig(cpu=CpuConfig(buffer_size="4GX")))
    with pytest.raises(ConfigError, match="mapping"):
        CacheConfig.from_mapping([1], environ={})  # type: ignore[arg-type]


def test_an_installed_policy_is_accepted_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "thirdparty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[kvtiers.policies]\nmine = thirdparty:Policy\n")
    text = "storage: {cpu: {eviction_policy: mine}}"
    assert "must be one of lru, lfu, fifo (" in only(text)
    monkeypatch.syspath_prepend(tmp_path)
    assert CacheConfig.from_text(text, environ={}).storage.cpu.eviction_policy == "mine"


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
keys = st.sampled_from(
    [
        *(one.setting.path for one in CacheConfig().effective()),
        ("storage",),
        ("storage", "cpu"),
        ("async",),
        ("x",),
    ]
)


@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.too_slow], deadline=None)  # a busy machine
@given(st.dictionaries(keys, json_like, max_size=6))
def test_any_mapping_is_a_configuration_or_one_config_error(settings: dict[tuple[str, ...], object]) -> None:
    tree: dict[str, object] = {}
    for path, value in settings.items():
        here = tree
        for step in path[:-1]:
            below = here.setdefault(step, {})
            if not isinstance(below, dict):
                break
            here = below
        else:
            here[path[-1]] = value
    try:
        config = CacheConfig.from_mapping(tree, environ={})
    except ConfigError as error:
        for one in error.problems:
            assert "\n" not in one.split(" = ")[0]
    else:
        assert config == CacheConfig.from_mapping(tree, environ={})
