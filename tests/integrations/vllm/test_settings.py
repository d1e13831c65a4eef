"""What `kv_connector_extra_config` may say, and which socket follows from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kvtiers.integrations.vllm.settings import DEFAULT_PINNED_SHARE, Settings, read_settings
from kvtiers.model.errors import ConfigError

STORAGE = {"storage": {"chunk_tokens": 128, "cpu": {"buffer_size": "64Mi"}}}


@pytest.fixture(autouse=True)
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return tmp_path


def problems_of(extra: dict[str, object]) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        read_settings(extra)
    assert caught.value.source == "kv_connector_extra_config"
    return caught.value.problems


def test_nothing_said_is_the_defaults() -> None:
    settings = read_settings(None)
    assert settings.socket is None
    assert settings.http is False
    assert settings.max_pinned_share == DEFAULT_PINNED_SHARE
    assert settings.load_timeout_s == settings.config.async_.load_timeout_ms / 1000
    assert read_settings({}) == settings


def test_configuration_by_path_and_inline_are_the_same(tmp_path: Path) -> None:
    file = tmp_path / "cache.yaml"
    file.write_text(json.dumps(STORAGE))
    by_path, inline = read_settings({"config": str(file)}), read_settings({"config": STORAGE})
    assert by_path.config == inline.config
    assert by_path.config.storage.chunk_tokens == 128
    assert (by_path.config_file, by_path.inline) == (file, "")
    assert (inline.config_file, yaml.safe_load(inline.inline)) == (None, STORAGE)


def test_inline_configuration_is_written_nowhere(runtime: Path) -> None:
    read_settings({"config": STORAGE})
    assert list(runtime.rglob("*")) == []


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"socket": ""}, "socket = ''"),
        ({"socket": 5}, "socket = 5"),
        ({"http": "yes"}, "http = 'yes': true or false"),
        ({"max_pinned_share": 0}, "max_pinned_share = 0"),
        ({"max_pinned_share": 1.1}, "max_pinned_share = 1.1"),
        ({"max_pinned_share": True}, "max_pinned_share = True"),
        ({"max_pinned_share": float("nan")}, "max_pinned_share = nan"),
        ({"config": 3}, "config = 3: a path of a YAML file"),
        ({"config": "/nowhere/cache.yaml"}, "config: "),
        ({"config": {"storage": {"chunk_tokens": -1}}}, "config: "),
        ({"soket": "/run/x.sock"}, "soket: there is no such setting; did you mean socket?"),
        (
            {"colour": 1},
            "colour: there is no such setting. Known: config, socket, http, fingerprint, max_pinned_share",
        ),
    ],
)
def test_each_mistake_is_told(extra: dict[str, object], told: str) -> None:
    problems = problems_of(extra)
    assert len(problems) == 1
    assert problems[0].startswith(told)


def test_all_mistakes_are_told_at_once() -> None:
    problems = problems_of(
        {"socket": 5, "htpp": True, "http": 1, "max_pinned_share": 2, "config": {"storage": {"chunk": 1}}}
    )
    assert len(problems) == 5


def test_weights_may_be_named() -> None:
    assert read_settings({"fingerprint": "2026-11-24"}).fingerprint == "2026-11-24"
    assert problems_of({"fingerprint": 5})[0].startswith("fingerprint = 5")


def test_what_the_configuration_says_of_the_engines_own_memory_has_no_effect() -> None:
    assert read_settings({"config": STORAGE}).without_effect == []
    gpu = {"max_utilization": 0.8, "capacity": "1Gi"}
    said = read_settings({"config": {"storage": {"gpu": gpu}}}).without_effect
    assert said == ["storage.gpu.capacity", "storage.gpu.max_utilization"]


def socket_of(engine_id: str, settings: Settings | None = None) -> Path:
    return (settings or read_settings(None)).socket_for(engine_id)


def test_data_parallel_ranks_of_one_engine_share_a_socket() -> None:
    assert {socket_of(f"abc{rank}") for rank in ("", "_dp0", "_dp1", "_dp12")} == {socket_of("abc")}


def test_other_engines_have_other_sockets() -> None:
    names = ["abc", "abd", "a_dpb", "a_dpc", "abc_dp0x"]
    assert len({socket_of(name) for name in names}) == len(names)


def test_socket_that_was_given_is_every_engines(runtime: Path) -> None:
    settings = read_settings({"socket": "somewhere.sock"})
    assert socket_of("a", settings) == socket_of("b", settings) == Path("somewhere.sock").absolute()
