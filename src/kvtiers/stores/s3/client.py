"""The client (`obstore`, which is Rust's object_store) as this store wants it: no retries of its own, every request bounded.

Credentials come from the environment or a file, and go to the client only. For a service that is not Amazon's the client never falls
back to asking the metadata service of the machine: that would send a role's key to whoever runs the endpoint.
"""

from __future__ import annotations

import configparser
import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from typing import Any, Final

from kvtiers.model.errors import StoreUnavailable
from kvtiers.stores.s3.settings import S3Settings

_CONNECT_S: Final = 2.0
_CREDENTIALS_AFRESH: Final = timedelta(minutes=5)
_NO_RETRIES: Final = {
    "max_retries": 0,
    "retry_timeout": timedelta(seconds=1),
    "backoff": {
        "init_backoff": timedelta(milliseconds=10),
        "max_backoff": timedelta(milliseconds=10),
        "base": 2,
    },
}
_WAYS_TO_SIGN: Final = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SKIP_SIGNATURE",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
"""Any of these in the environment tells the client how."""


def make_client(settings: S3Settings, environ: Mapping[str, str] = os.environ) -> Any:
    """An obstore store; connects to nothing yet. Raises StoreUnavailable, with a sentence that tells what to do."""
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url
    except ImportError as error:
        raise StoreUnavailable("the s3 backend needs obstore: pip install 'kvtiers[s3]'") from error
    config: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if settings.scheme == "s3":
        config = {"unsigned_payload": True, "disable_bulk_delete": True}
        if settings.endpoint_url is not None:
            config["endpoint"] = settings.endpoint_url
        if settings.region is not None:
            config["region"] = settings.region
        if settings.credentials_file is not None:
            options["credential_provider"] = _read_afresh(settings.credentials_file, environ)
        elif settings.endpoint_url is not None and not any(environ.get(name) for name in _WAYS_TO_SIGN):
            raise StoreUnavailable(
                f"no credentials for {settings.place}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or storage.remote.s3.credentials_file"
            )
    elif settings.credentials_file is not None:
        _refuse_if_others_may_read(settings.credentials_file, settings.credentials_file)
        config["service_account"] = settings.credentials_file
    make: Any = from_url  # its types want a call for each kind of service
    try:
        return make(
            settings.endpoint,
            config=config,
            client_options=_client_options(settings),
            retry_config=_NO_RETRIES,
            **options,
        )
    except (BaseError, ValueError, OSError) as error:
        reason = "it is not usable as it is configured"
        if "MissingAccount" in str(error):
            reason = "set AZURE_STORAGE_ACCOUNT_NAME"
        elif settings.credentials_file is not None:
            reason = f"{settings.credentials_file} may not be there, or not be a service account's JSON"
        raise StoreUnavailable(f"no client for {settings.place}: {reason} ({type(error).__name__})") from None


def _client_options(settings: S3Settings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "timeout": timedelta(seconds=settings.timeout_s),
        "connect_timeout": timedelta(seconds=min(settings.timeout_s, _CONNECT_S)),
        "pool_max_idle_per_host": str(settings.connection_pool_size),
    }
    if settings.endpoint_url is not None:
        options["allow_http"] = settings.endpoint_url.startswith("http://")
    if settings.ca_file is not None:
        try:
            with open(settings.ca_file, "rb") as file:
                options["root_certificate"] = file.read()
        except OSError as error:
            raise StoreUnavailable(
                f"storage.remote.s3.ca_file: {settings.ca_file} can't be read: {error.strerror or error}"
            ) from error
    return options


def _read_afresh(path: str, environ: Mapping[str, str]) -> Callable[[], dict[str, Any]]:
    """What the client calls when it has no credentials, or they are five minutes old. Tried once now, so that a wrong file is told."""
    profile = environ.get("AWS_PROFILE") or "default"

    def provide() -> dict[str, Any]:
        return {**_read_credentials(path, profile), "expires_at": datetime.now(UTC) + _CREDENTIALS_AFRESH}

    provide()
    return provide


def _read_credentials(path: str, profile: str) -> dict[str, Any]:
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        with open(path, encoding="utf-8") as file:
            _refuse_if_others_may_read(file.fileno(), path)
            parser.read_file(file)
        section = parser[profile]
        return {
            "access_key_id": section["aws_access_key_id"],
            "secret_access_key": section["aws_secret_access_key"],
            "token": section.get("aws_session_token"),
        }
    except OSError as error:
        raise StoreUnavailable(
            f"storage.remote.s3.credentials_file: {path} can't be read: {error.strerror or error}"
        ) from None
    except (configparser.Error, KeyError, UnicodeDecodeError):  # their messages quote the file
        raise StoreUnavailable(
            f"storage.remote.s3.credentials_file: {path} must have a section [{profile}] with aws_access_key_id and aws_secret_access_key"
        ) from None


def _refuse_if_others_may_read(file: str | int, path: str) -> None:
    try:
        mode = os.stat(file).st_mode
    except OSError as error:
        raise StoreUnavailable(
            f"storage.remote.s3.credentials_file: {path} can't be read: {error.strerror or error}"
        ) from None
    if mode & 0o077:
        raise StoreUnavailable(
            f"storage.remote.s3.credentials_file: others can read {path}: chmod 600 {path}"
        )
