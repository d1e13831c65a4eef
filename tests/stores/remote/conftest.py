"""A directory that several stores share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def share(tmp_path: Path) -> Path:
    path = tmp_path / "share"
    path.mkdir()
    return path
