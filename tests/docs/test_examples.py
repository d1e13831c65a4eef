"""Every Python example of the documentation runs as it is printed, in a directory that has the files it names.

A comment before each block names it: `<!-- example: NAME -->`. With `, needs a model` it runs under the `model` marker; with
`, not run: REASON` it is skipped by its name. What a line prints stands behind `# →`.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from kvtiers.cli.app import run
from kvtiers.config import CacheConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMED = re.compile(r"<!-- example: ([a-z-]+)(?:, ([a-z ]+)(?:: (.*?))?)? -->\n```python\n(.*?)```", re.DOTALL)
SMALL = {  # what the pages ask for is meant for a server
    "KVTIERS_STORAGE__CPU__BUFFER_SIZE": "256Mi",
    "KVTIERS_STORAGE__DISK__MAX_SIZE": "512Mi",
    "KVTIERS_STORAGE__DISK__MIN_FREE_SPACE": "1Mi",
}


class Example(NamedTuple):
    name: str
    how: str
    """"", "needs a model" or "not run"."""
    why: str
    code: str

    def printed(self) -> list[str]:
        return re.findall(r"# → (.*)", self.code)


def examples() -> list[Example]:
    return [Example(*found) for page in PAGES for found in NAMED.findall(page.read_text())]


def cases(*ways: str) -> list[Any]:
    skip = pytest.mark.skip
    return [
        pytest.param(one, id=one.name, marks=skip(f"{one.name}: {one.why}") if one.how == "not run" else ())
        for one in examples()
        if one.how in ways
    ]


def yaml_of(page: str) -> str:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    return str(text)


def save_weights(directory: Path) -> None:
    """A model as far as a fingerprint looks at it: its config and a safetensors file."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))


def save_model(directory: Path) -> None:
    """A small random Llama whose tokenizer knows numbers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({"?": 0, **{str(n): n for n in range(1, 128)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?").save_pretrained(directory)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
    ).save_pretrained(directory)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A directory with what the examples name: a configuration, a document."""
    (tmp_path / "lmcache_config.yaml").write_text(placed(yaml_of("quickstart.md"), tmp_path))
    (tmp_path / "document.txt").write_text(" ".join(str(n % 127 + 1) for n in range(600)))
    return tmp_path


def placed(text: str, directory: Path) -> str:
    return text.replace("/var/cache/", f"{directory}/cache/")


def run_in(directory: Path, code: str) -> str:
    environ = {name: value for name, value in os.environ.items() if not name.startswith("KVTIERS_")}
    done = subprocess.run(
        [sys.executable, "-W", "error::ResourceWarning:kvtiers", "-c", placed(code, directory)],
        cwd=directory,
        env={**environ, **SMALL},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", cases("", "not run"))
def test_an_example_runs_and_prints_what_it_says(example: Example, workplace: Path) -> None:
    save_weights(workplace / "path" / "to" / "model")
    for _ in range(2):  # also with what the first run left behind
        printed = run_in(workplace, example.code)
        assert printed.splitlines() == example.printed()


@pytest.mark.model
@pytest.mark.parametrize("example", cases("needs a model"))
def test_the_second_run_of_a_model_example_reuses_what_the_first_left_on_disk(
    example: Example, workplace: Path
) -> None:
    save_model(workplace / "path" / "to" / "model")
    first, second = (run_in(workplace, example.code) for _ in range(2))
    assert " 0 () never_seen" in first
    assert " 512 (<Tier.DISK: 'disk'>, <Tier.DISK: 'disk'>) partial_chunk" in second
    assert second.split(" 512 ")[0] == first.split(" 0 ()")[0]  # the same answer


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_has_a_name_of_its_own(page: Path) -> None:
    assert len(NAMED.findall(page.read_text())) == page.read_text().count("```python")
    names = [one.name for one in examples()]
    assert len(set(names)) == len(names)
    assert {one.how for one in examples()} <= {"", "needs a model", "not run"}


def test_the_configuration_of_the_quick_start_is_one() -> None:
    config = CacheConfig.from_text(yaml_of("quickstart.md"), environ={})
    assert config.storage.disk.enabled


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_named_in_the_docs_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text()
    in_blocks = "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL))
    told = re.findall(r"`kvtiers ((?:[a-z]+(?:-[a-z]+)* ?)+)", text)
    told += re.findall(r"^kvtiers ((?:[a-z]+(?:-[a-z]+)* ?)+)", in_blocks, re.MULTILINE)
    for words in {tuple(words.split()[:2]) for words in told}:
        assert run([*words, "--help"]) == 0, f"kvtiers {' '.join(words)}: {capsys.readouterr().err}"
