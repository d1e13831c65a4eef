"""A file that is no configuration at all is told so, plainly."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtiers.config import CacheConfig
from kvtiers.model.errors import ConfigError


def refusal(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        CacheConfig.from_text(text, name="f.yaml", environ={})
    assert len(caught.value.problems) == 1, caught.value.problems
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("---\n", "is a single value"),
        ("- a\n- b\n", "is a list"),
        ("just words", "is a single value"),
        ("storage: {cpu: [", "line 1, column"),
        ("storage:\n\tcpu: 1\n", "spaces, not tabs"),
        ("a: b: c", "line 1"),
        ("storage: {}\n---\nstorage: {}\n", "single document"),
        ("storage: !!python/object:os.system {}", "the tag"),
        ("storage: !mine 3", "constructor"),
        ("storage: !mine [3]", "the tag !mine"),
        ("storage: *nowhere", "undefined alias"),
        ("storage: &a\n  cpu: *a\n", "contains itself"),
        ("storage: \x00", "character that is not allowed"),
        ("[" * 30_000, "nested too deeply"),
    ],
)
def test_what_is_no_mapping_is_refused(text: str, says: str) -> None:
    message = refusal(text)
    assert says in message
    assert message.startswith("f.yaml: 1 problem")


def test_a_bomb_of_aliases_is_refused() -> None:
    lines = ["l0: &l0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"l{n}: &l{n} [{', '.join([f'*l{n - 1}'] * 10)}]" for n in range(1, 9)]
    assert "entries" in refusal("\n".join(lines))


def test_a_key_given_twice_is_a_problem_with_both_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        CacheConfig.from_text(
            "storage:\n  chunk_tokens: 1\n  chunk_tokens: 2\nstorage: {}\n", name="f", environ={}
        )
    assert caught.value.problems == (
        "storage (f:4): given twice, first on line 1; keep one",
        "storage.chunk_tokens (f:3): given twice, first on line 2; keep one",
    )


def test_anchors_and_merges_work_and_their_own_keys_win() -> None:
    text = "async: &base\n  max_workers: 3\n  queue_size: 5\n"
    with pytest.raises(ConfigError, match="unknown key"):
        CacheConfig.from_text(text + "x: *base\n", environ={})
    merged = "storage:\n  cpu: &tier {eviction_threshold: 0.6}\n  disk: {<<: *tier, low_watermark: 0.1}\n"
    config = CacheConfig.from_text(merged, environ={})
    assert (config.storage.disk.eviction_threshold, config.storage.disk.low_watermark) == (0.6, 0.1)


def test_files_that_can_not_be_read_are_config_errors(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        CacheConfig.from_yaml(tmp_path / "missing.yaml")
    with pytest.raises(ConfigError, match="directory"):
        CacheConfig.from_yaml(tmp_path)
    with pytest.raises(ConfigError, match="can't be read"):
        CacheConfig.from_yaml(tmp_path / ("x" * 300))
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"storage:\n  \xff\xfe: 1\n")
    with pytest.raises(ConfigError, match="line 2 is not UTF-8"):
        CacheConfig.from_yaml(binary)
    with pytest.raises(ConfigError, match="larger than"):
        CacheConfig.from_yaml("/dev/zero")
    if os.geteuid():
        binary.chmod(0)
        with pytest.raises(ConfigError, match="can't be read"):
            CacheConfig.from_yaml(binary)


def test_a_file_with_a_byte_order_mark_is_read(tmp_path: Path) -> None:
    file = tmp_path / "bom.yaml"
    file.write_bytes(b"\xef\xbb\xbfstorage: {chunk_tokens: 64}\r\n")
    assert CacheConfig.from_yaml(file, environ={}).storage.chunk_tokens == 64


@given(st.text(st.sampled_from("ab: -[]{}&*!|>'\"\n\t#%,?<\\\x85é0"), max_size=40))
def test_any_text_is_a_configuration_or_one_config_error(text: str) -> None:
    try:
        CacheConfig.from_text(text, environ={})
    except ConfigError as error:
        assert error.problems  # noqa: PT017 - either outcome is right
