"""What a test does without a server or tool that is no dependency of kvtiers: it is skipped with the reason; in CI it fails."""

from __future__ import annotations

import os
from typing import NoReturn


def missing(reason: str) -> NoReturn:
    """`reason`: what is not there and how to get it."""
    import pytest  # what runs these servers outside of tests has none

    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
