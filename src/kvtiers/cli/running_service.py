"""A running service, as the commands for operators reach it: over its own Unix socket, or by URL."""

from __future__ import annotations

import os
import socket as socketlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import typer

from kvtiers.model.errors import ConfigError, KvtiersError

if TYPE_CHECKING:
    import httpx

DEFAULT_URL: Final = "http://127.0.0.1:8000"
_TIMEOUT_S: Final = 30.0

URL_OPTION: Final = typer.Option("--url", metavar="URL", help=f"Its HTTP address, such as {DEFAULT_URL}.")
SOCKET_OPTION: Final = typer.Option(
    "--socket",
    metavar="PATH",
    help="Its socket, as given to `kvtiers serve`. Default: where that listens by default.",
)
TOKEN_OPTION: Final = typer.Option(
    "--token-file", metavar="FILE", help="Its observability.token_file; needed with --url if it has one."
)


class NoService(KvtiersError):
    """No service answers there, or it refuses; the message says what to try."""


class RunningService:
    """One service. A context manager; every call raises NoService."""

    def __init__(self, client: httpx.Client, where: str) -> None:
        self._client = client
        self.where = where

    @classmethod
    def reach(cls, url: str | None, socket: Path | None, token_file: Path | None) -> Self:
        """By `url`; else over `socket`, or the default one if somebody listens there; else at the default URL."""
        try:
            import httpx
        except ImportError as error:
            raise NoService(f"a package is missing ({error}): pip install 'kvtiers[serve]'") from error
        from kvtiers.node.address import default_socket, operator_socket

        if url is not None and socket is not None:
            raise ConfigError(["give --url or --socket, not both"])
        path = operator_socket((socket or default_socket()).absolute())
        headers = {"Authorization": f"Bearer {_token(token_file)}"} if token_file is not None else {}
        if url is None and (socket is not None or (_is_ours(path) and _is_served(path))):
            transport = httpx.HTTPTransport(uds=str(path))
            client = httpx.Client(transport=transport, base_url="http://localhost", timeout=_TIMEOUT_S)
            return cls(client, str(path.with_suffix("")))
        where = (url or DEFAULT_URL).rstrip("/")
        if not where.startswith(("http://", "https://")):
            raise ConfigError([f"--url {where}: it begins with http:// or https://"])
        client = httpx.Client(
            base_url=where,
            headers=headers,
            timeout=_TIMEOUT_S,
            mounts=dict.fromkeys(("all://localhost", "all://127.0.0.1", "all://[::1]")),  # no proxy for these
        )
        return cls(client, where)

    def get(self, path: str) -> Any:
        """The JSON at a path."""
        return self._call("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """What it answers to a JSON body."""
        return self._call("POST", path, body)

    def ask(self, path: str) -> tuple[int, Any]:
        """Status and JSON of a path whose status is the answer."""
        answer = self._answer("GET", path, None)
        return answer.status_code, _json(answer)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        answer = self._answer(method, path, body)
        if answer.status_code in (401, 403):
            raise NoService(
                f"{self.where} refuses: {_detail(answer)}. Give --token-file, or --socket on its own machine"
            )
        if answer.is_error:
            raise NoService(f"{self.where} answers {answer.status_code}: {_detail(answer)}")
        return _json(answer)

    def _answer(self, method: str, path: str, body: dict[str, Any] | None) -> httpx.Response:
        import httpx

        try:
            return self._client.request(method, path, json=body)
        except httpx.TimeoutException:
            raise NoService(
                f"the service at {self.where} did not answer within {_TIMEOUT_S:.0f} s: is it stopped?"
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoService(
                f"no service answers at {self.where} ({error}): start `kvtiers serve`, or name its --socket or --url"
            ) from None


def _is_ours(path: Path) -> bool:
    """Whether a socket lies there that only this user can have put there: the temporary directory is open to all."""
    try:
        return path.exists() and path.parent.lstat().st_uid == os.getuid()
    except OSError:  # below another user's directory
        return False


def _is_served(path: Path) -> bool:
    """Whether it is more than what a service that was killed has left."""
    with socketlib.socket(socketlib.AF_UNIX, socketlib.SOCK_STREAM) as one:
        one.settimeout(1.0)
        try:
            one.connect(str(path))
        except TimeoutError:
            return True  # stopped, or busy: to be told by name
        except OSError:
            return False
    return True


def _token(file: Path) -> str:
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError([f"--token-file {file}: {error}"]) from None


def _json(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:
        raise NoService(
            f"{answer.url} answers {answer.status_code} and no JSON: is that a kvtiers service?"
        ) from None


def _detail(answer: httpx.Response) -> str:
    try:
        said = answer.json()["detail"]
    except (ValueError, KeyError, TypeError):
        return answer.reason_phrase
    if isinstance(said, list):  # a body that was not valid: one entry for each field
        return "; ".join(f"{'.'.join(map(str, one['loc'][1:]))}: {one['msg']}" for one in said)
    return str(said)
