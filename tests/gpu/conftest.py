"""Where the acceptance tests run: KVTIERS_TEST_DEVICE, "cpu" unless `make test-gpu` sets "cuda"."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A device that is not there fails the run: an acceptance that skips itself accepts nothing."""
    wanted = torch.device(os.environ.get("KVTIERS_TEST_DEVICE", "cpu"))
    if wanted.type == "cuda" and not torch.cuda.is_available():
        pytest.fail(
            f"torch {torch.__version__} sees no CUDA device: install a CUDA build of torch, check nvidia-smi"
        )
    return wanted
