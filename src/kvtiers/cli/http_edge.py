"""The HTTP side of `kvtiers serve`: the node as `http` wants to see it, and a socket that is taken before the memory is."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from kvtiers.config import CacheConfig
from kvtiers.http.app import make_app
from kvtiers.http.operated import Eviction, TierNotOurs
from kvtiers.http.server import HttpServer, listen, read_token
from kvtiers.model.tiers import Tier
from kvtiers.node.service import Service


class HttpEdge:
    """Taken at the start, so that a port in use is an error at once; called with the service when that serves."""

    def __init__(self, config: CacheConfig) -> None:
        """Raises ConfigError: the port is taken, the token can't be read, or others reach the address and there is no token."""
        wanted = config.observability
        self._token = read_token(Path(wanted.token_file)) if wanted.token_file else None
        self._listening: socket.socket = listen(
            wanted.http_host, wanted.metrics_port, has_token=self._token is not None
        )

    def __call__(self, service: Service) -> AbstractContextManager[object]:
        return HttpServer(make_app(_ServedCache(service), token=self._token), self._listening)

    def close(self) -> None:
        """For a service that never served."""
        self._listening.close()


class _ServedCache:
    """`Operated` over a service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    def stats(self) -> Mapping[str, Any]:
        return self._service.server.stats()

    def evict(self, tier: Tier, target_usage: float) -> Eviction:
        if tier is Tier.GPU:
            raise TierNotOurs(
                "the GPU tier is the engines' own prefix cache: they evict from it by themselves"
            )
        node = self._service.node
        done = node.evict(tier, int(node.capacity(tier) * target_usage))
        return Eviction(done.chunks, done.nbytes, done.demoting)

    def serving(self) -> bool:
        return not self._service.node.closing
