from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_test_named_in_the_docs_exists() -> None:
    there = {
        name
        for path in [*(ROOT / "tests").rglob("test_*.py"), *(ROOT / "src/kvtiers/testing").glob("*_kit.py")]
        for name in re.findall(r"^\s*def (test_\w+)", path.read_text(), flags=re.MULTILINE)
    }
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    named = {
        (page.name, name) for page in pages for name in re.findall(r"`(test_[a-z0-9_]+)`", page.read_text())
    }
    assert len(named) > 30, "the pattern finds nothing"
    assert sorted((page, name) for page, name in named if name not in there) == []
