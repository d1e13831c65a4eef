"""The HTTP side of `kvtiers serve`: the node as `http` wants to see it, and a socket that is taken before the memory is."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from kvtiers.config import CacheConfig
from kvtiers.http.app import make_app
from kvtiers.http.operated import Eviction, TierNotOurs
from kvtiers.http.server import STOP_S, HttpServer, listen, listen_unix, read_token, stop_all
from kvtiers.model.tiers import Tier
from kvtiers.node.service import Service


class HttpEdge:
    """Taken at the start, so that a port in use is an error at once; called with the service when that serves."""

    def __init__(self, config: CacheConfig, operator: Path, *, port: bool) -> None:
        """`operator`: the Unix socket on which this user's operators are answered, without a token. `port`: also the TCP port.

        Raises ConfigError: the port is taken, the token can't be read, or others reach the address and there is no token.
        """
        wanted = config.observability
        self._operator = operator
        self._token = read_token(Path(wanted.token_file)) if wanted.token_file else None
        self._listening: socket.socket | None = None
        if port:
            self._listening = listen(wanted.http_host, wanted.metrics_port, has_token=self._token is not None)

    @contextmanager
    def __call__(self, service: Service) -> Iterator[object]:
        cache = _ServedCache(service)
        with ExitStack() as undo:
            undo.callback(self._operator.unlink, missing_ok=True)
            servers = [HttpServer(make_app(cache), listen_unix(self._operator))]
            if self._listening is not None:
                servers.append(HttpServer(make_app(cache, token=self._token), self._listening))
            undo.callback(lambda: stop_all(servers, min(STOP_S, service.seconds_left)))
            for server in servers:
                server.start()
            yield self

    def close(self) -> None:
        """For a service that never served."""
        if self._listening is not None:
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
        done = self._service.node.evict_down_to(tier, target_usage)
        return Eviction(done.chunks, done.nbytes, done.demoting)

    def memory(self) -> Mapping[str, Any]:
        return self._service.server.memory()

    def serving(self) -> bool:
        return not self._service.node.closing
