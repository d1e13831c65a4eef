"""The paths, as the LMCache-compatible interface names them.

No call waits for a store; handlers run on the framework's threads. Without a token only a browser-proof loopback is served: the
`Host` header must name it (against DNS rebinding), and what changes something must be sent as JSON (which a foreign page can't do
without asking first).
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping
from typing import Annotated, Any, Final, Literal

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, ProcessCollector, generate_latest
from pydantic import BaseModel, ConfigDict, Field

import kvtiers
from kvtiers.http.health import backends
from kvtiers.http.operated import Operated, TierNotOurs
from kvtiers.model.errors import CacheClosed, InvalidArgument
from kvtiers.model.tiers import Tier
from kvtiers.observe.metrics import registry_of

LOOPBACK_NAMES: Final = frozenset({"localhost", "127.0.0.1", "[::1]"})
OPEN_PATHS: Final = frozenset({"/healthz", "/readyz"})
"""For probes, which carry no token; they say nothing about what is cached."""

_MOST_BODY_BYTES: Final = 65536
_SLOTS_AT_ONCE: Final = 256

_LRU_FIELDS: Final = (
    "enabled",
    "entries",
    "usage_bytes",
    "usage_percent",
    "capacity_bytes",
    "ceiling_bytes",
    "low_watermark_bytes",
    "offloadable_bytes",
    "leased_chunks",
    "lookups",
    "hits",
    "evicted",
    "demoted",
    "promoted",
)


class EvictRequest(BaseModel):
    """Body of `POST /api/v1/cache/evict`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    tier: Literal["gpu", "cpu", "disk", "remote"]
    target_usage: Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class Evicted(BaseModel):
    """What it did. `demoting` chunks leave as soon as the next tier has them."""

    tier: str
    evicted_chunks: int
    evicted_bytes: int
    demoting_chunks: int
    usage_percent: float


class Problem(BaseModel):
    """Why a call was refused."""

    detail: str


def make_app(cache: Operated, *, token: str | None = None) -> FastAPI:
    """The application. With `token` every path but the probes' wants `Authorization: Bearer <token>`."""
    app = FastAPI(
        title="kvtiers",
        version=kvtiers.__version__,
        docs_url=None,  # its page loads scripts from another host
        redoc_url=None,
        description="Metrics, health and operation of one kvtiers cache.",
    )
    registry = registry_of(cache.stats)
    ProcessCollector(registry=registry)
    guard = _TokenGuard(token) if token else _LoopbackGuard()
    mapping = threading.Lock()
    problem: dict[int | str, dict[str, Any]] = {
        503: {"model": Problem, "description": "The cache is closing."}
    }

    @app.middleware("http")
    async def admit(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        refusal = guard.refusal(request) or _too_long(request)
        return refusal if refusal is not None else await call_next(request)

    @app.exception_handler(CacheClosed)
    def closed(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, 503)

    @app.exception_handler(InvalidArgument)
    @app.exception_handler(TierNotOurs)
    def not_ours(_: Request, error: Exception) -> Response:
        return JSONResponse({"detail": str(error)}, 409)

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: Exception) -> Response:
        """Without what was sent: it may be what JSON can't say (NaN, half a surrogate pair)."""
        assert isinstance(error, RequestValidationError)
        problems = [{name: one[name] for name in ("type", "loc", "msg")} for one in error.errors()]
        return Response(json.dumps({"detail": problems}), 422, media_type="application/json")

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}, **problem})
    def metrics() -> Response:
        """Everything, in Prometheus' text format."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    @app.get("/healthz")
    async def healthz() -> dict[str, str]:
        """200 as long as the process answers. Not on a thread: those may all be taken."""
        return {"status": "ok"}

    @app.get("/readyz", responses={503: {"description": "Starting, or closing."}})
    def readyz() -> JSONResponse:
        """200 while engines are served. A backend that is down is shown, but costs hits, not service: see `/probe`."""
        serving = cache.serving()
        return JSONResponse(
            {"ready": serving, "backends": backends(cache.stats()) if serving else {}},
            200 if serving else 503,
        )

    @app.get(
        "/probe",
        response_class=Response,
        responses={
            200: {"content": {"text/plain": {}}},
            503: {"description": "An enabled backend is unreachable."},
        },
    )
    def probe() -> Response:
        """For the scrape job `lmcache-backend`, whose `up` is what the alert looks at: 503 while an enabled backend is down."""
        serving = cache.serving()
        up = {name: one["status"] == "up" for name, one in backends(cache.stats()).items()} if serving else {}
        lines = [f'lmcache_backend_up{{backend="{name}"}} {int(works)}\n' for name, works in up.items()]
        ok = serving and all(up.values())
        return Response("".join(lines), 200 if ok else 503, media_type=CONTENT_TYPE_LATEST)

    @app.get("/api/v1/cache/stats", responses=problem)
    def cache_stats() -> dict[str, Any]:
        """All counters; `lru_stats` has what concerns eviction, for each tier."""
        stats = cache.stats()
        return {"lru_stats": _lru_stats(stats), **stats}

    @app.get("/api/v1/async/status", responses=problem)
    def async_status() -> dict[str, Any]:
        """The background work: `queue_size` waits, `pending_tasks` waits or runs."""
        status: dict[str, Any] = cache.stats()["async"]
        return status

    @app.get(
        "/api/v1/memory",
        response_class=Response,
        responses={
            200: {"content": {"application/json": {}}},
            429: {"model": Problem, "description": "Another one is being made."},
            **problem,
        },
    )
    def memory() -> Response:
        """Every slot in use: where, whose, since when; sums by tier and namespace. As large as 400 bytes for each slot."""
        if not mapping.acquire(blocking=False):
            return JSONResponse(
                {"detail": "a map of the memory is being made: ask again when it is done"}, 429
            )
        try:
            pieces = list(_in_pieces(cache.memory()))
        finally:
            mapping.release()
        return StreamingResponse(iter(pieces), media_type="application/json")

    @app.post(
        "/api/v1/cache/evict",
        responses={
            400: {"model": Problem, "description": "The body is not JSON."},
            413: {"model": Problem},
            409: {"model": Problem, "description": "Not ours to evict."},
            415: {"model": Problem},
            **problem,
        },
    )
    def evict(request: EvictRequest) -> Evicted:
        """Evict a tier down to `target_usage`, a share of its capacity; what no slower tier has is demoted first."""
        tier = Tier(request.tier)
        done = cache.evict(tier, request.target_usage)
        usage = cache.stats()["tiers"].get(tier, {}).get("usage_percent", 0.0)
        return Evicted(
            tier=tier,
            evicted_chunks=done.chunks,
            evicted_bytes=done.nbytes,
            demoting_chunks=done.demoting,
            usage_percent=usage,
        )

    return app


def _in_pieces(memory: Mapping[str, Any]) -> Iterator[bytes]:
    """As JSON. `dumps` of all of it at once would keep every other thread waiting: 0.2 s for 100,000 slots."""
    slots = memory["slots"]
    yield json.dumps({name: value for name, value in memory.items() if name != "slots"})[:-1].encode()
    yield b', "slots": ['
    for begin in range(0, len(slots), _SLOTS_AT_ONCE):
        piece = json.dumps(slots[begin : begin + _SLOTS_AT_ONCE])[1:-1]
        yield (", " + piece if begin else piece).encode()
    yield b"]}"


def _too_long(request: Request) -> Response | None:
    """A body is read as a whole before it's parsed, so its length is told first and bounded."""
    length = request.headers.get("content-length", "0")
    if "transfer-encoding" not in request.headers and length.isdecimal() and int(length) <= _MOST_BODY_BYTES:
        return None
    return JSONResponse({"detail": f"a body of at most {_MOST_BODY_BYTES} bytes, with its length"}, 413)


class _TokenGuard:
    def __init__(self, token: str) -> None:
        self._expected = f"Bearer {token}".encode()

    def refusal(self, request: Request) -> Response | None:
        given = request.headers.get("authorization", "").encode()
        if request.url.path in OPEN_PATHS or secrets.compare_digest(given, self._expected):
            return None
        return JSONResponse(
            {"detail": "a bearer token is needed: see observability.token_file"},
            401,
            headers={"WWW-Authenticate": "Bearer"},
        )


class _LoopbackGuard:
    def refusal(self, request: Request) -> Response | None:
        host = request.headers.get("host", "").lower()
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name not in LOOPBACK_NAMES:
            return JSONResponse(
                {
                    "detail": f"host {host!r} is not the loopback; set observability.token_file to serve other names"
                },
                403,
            )
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if request.method == "POST" and kind != "application/json":
            return JSONResponse({"detail": f"content type {kind!r}: send application/json"}, 415)
        return None


def _lru_stats(stats: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        tier: {field: values[field] for field in _LRU_FIELDS if field in values}
        for tier, values in stats["tiers"].items()
    }
