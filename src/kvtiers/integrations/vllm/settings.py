"""What `kv_connector_extra_config` says."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import yaml

from kvtiers.config import CacheConfig
from kvtiers.model.errors import ConfigError
from kvtiers.node.address import default_socket

DEFAULT_PINNED_SHARE: Final = 0.25


@dataclass(frozen=True, slots=True)
class Settings:
    """One engine's side of the cache."""

    config: CacheConfig
    config_file: Path | None
    """What a service of our own is started with; None: `inline`."""
    inline: str
    """The configuration as it was given, in YAML; empty if it was a path."""
    socket: Path | None
    """Of a service that runs; None: the engine starts one as a child."""
    http: bool = False
    """Whether that child listens on observability.metrics_port."""
    fingerprint: str | None = None
    """Names the weights where they can't be found as files; whoever sets it changes it with them."""
    max_pinned_share: float = DEFAULT_PINNED_SHARE
    """Share of the engine's blocks that may be pinned while they are stored; what is beyond it is not stored."""

    @property
    def load_timeout_s(self) -> float:
        """How long a request waits for its KV to be staged, seconds."""
        return self.config.async_.load_timeout_ms / 1000

    @property
    def without_effect(self) -> list[str]:
        """What the configuration sets of the GPU tier, which is the engine's own."""
        return [f"storage.gpu.{name}" for name in sorted(self.config.storage.gpu.model_fields_set)]

    def socket_for(self, engine_id: str) -> Path:
        """Where the service listens, or is to listen: all processes of one engine agree."""
        if self.socket is not None:
            return self.socket
        engine = re.sub(r"_dp\d+$", "", engine_id)  # which vLLM adds for each data-parallel rank
        name = hashlib.sha256(engine.encode()).hexdigest()[:12]
        return default_socket().with_name(f"vllm-{name}.sock")


_KNOWN: Final = ("config", "socket", "http", "fingerprint", "max_pinned_share")


def read_settings(extra: Mapping[str, Any] | None) -> Settings:
    """From `kv_connector_extra_config`. Raises ConfigError with everything that is wrong with it."""
    extra = dict(extra or {})
    problems = [_unknown(key) for key in extra if key not in _KNOWN]
    given = extra.get("config", {})
    config = _config({} if given is None else given, problems)
    socket = extra.get("socket")
    if socket is not None and (not isinstance(socket, str) or not socket):
        problems.append(f"socket = {socket!r}: the path of a service's socket is needed")
    http = extra.get("http", False)
    if not isinstance(http, bool):
        problems.append(f"http = {http!r}: true or false")
    fingerprint = extra.get("fingerprint")
    if fingerprint is not None and (not isinstance(fingerprint, str) or not fingerprint):
        problems.append(f"fingerprint = {fingerprint!r}: a text that changes when the weights do")
    share = extra.get("max_pinned_share", DEFAULT_PINNED_SHARE)
    if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share <= 1:
        problems.append(f"max_pinned_share = {share!r}: a number above 0 and at most 1")
    if problems or config is None:
        raise ConfigError(problems, source="kv_connector_extra_config")
    return Settings(
        config=config,
        config_file=Path(given).absolute() if isinstance(given, str) else None,
        inline="" if isinstance(given, str) else yaml.safe_dump(dict(given or {}), sort_keys=True),
        socket=Path(socket).absolute() if socket else None,
        http=http,
        fingerprint=fingerprint,
        max_pinned_share=float(share),
    )


def _config(given: Any, problems: list[str]) -> CacheConfig | None:
    try:
        if isinstance(given, str):
            return CacheConfig.from_yaml(Path(given))
        if isinstance(given, Mapping):
            return CacheConfig.from_mapping(dict(given))
    except ConfigError as error:
        problems += [f"config: {problem}" for problem in error.problems]
        return None
    problems.append(f"config = {given!r}: a path of a YAML file, or the configuration itself")
    return None


def _unknown(key: str) -> str:
    near = difflib.get_close_matches(key, _KNOWN, n=1)
    meant = f"; did you mean {near[0]}?" if near else "."
    return f"{key}: there is no such setting{meant} Known: {', '.join(_KNOWN)}"
