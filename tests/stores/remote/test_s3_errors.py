"""What the errors of an object store's client mean, and which settings make no sense. No service."""

from __future__ import annotations

import pytest

from kvtiers.model.errors import (
    ConfigError,
    RecordMissing,
    StoreFull,
    StoreTransient,
    StoreUnavailable,
)
from kvtiers.records.codecs.registry import codec_for
from kvtiers.stores.s3 import S3Settings
from kvtiers.stores.s3.failures import as_store_error
from kvtiers.stores.s3.store import S3Store

# --- what errors mean -------------------------------------------------------------------------------------------------


def told(status: int, code: str) -> Exception:
    from obstore.exceptions import GenericError

    return GenericError(
        f"Generic S3 error: Error performing PUT https://h/b?sig=kvtiers-test-secret in 1ms - Server returned non-2xx "
        f"status code: {status} Whatever: <Error><Code>{code}</Code></Error>\n\nDebug source: …"
    )


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (507, "InsufficientStorage", StoreFull),
        (507, "XMinioStorageFull", StoreFull),
        (400, "QuotaExceeded", StoreFull),
        (503, "SlowDown", StoreTransient),
        (500, "InternalError", StoreTransient),
        (429, "TooManyRequests", StoreTransient),
        (400, "AuthorizationHeaderMalformed", StoreUnavailable),
        (301, "PermanentRedirect", StoreUnavailable),
        (403, "RequestTimeTooSkewed", StoreUnavailable),
        (404, "NoSuchBucket", StoreUnavailable),
    ],
)
def test_answers_that_no_test_can_provoke(status: int, code: str, kind: type[Exception]) -> None:
    """Made up, in the client's words: a service that is full, throttles, or lies in another region."""
    error = as_store_error(told(status, code), "s3://b", 5.0)
    assert type(error) is kind
    assert "\n" not in str(error)
    assert "kvtiers-test" not in str(error)


def test_a_missing_object_is_a_miss() -> None:
    error = FileNotFoundError("… status code: 404 Not Found: <Error><Code>NoSuchKey</Code></Error>")
    assert isinstance(as_store_error(error, "s3://b", 5.0), RecordMissing)


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"endpoint": "bucket"},
        {"endpoint": "http://bucket/x"},
        {"endpoint": "s3:///prefix"},
        {"endpoint": "s3://bucket/a//b"},
        {"endpoint": "s3://bucket/../b"},
        {"endpoint": "s3://key:secret@bucket/x"},
        {"endpoint": "s3://bucket", "endpoint_url": "127.0.0.1:8333"},
        {"endpoint": "s3://bucket", "endpoint_url": "http://key:secret@host"},
        {"endpoint": "s3://bucket", "endpoint_url": "http://host/path"},
        {"endpoint": "gs://bucket", "endpoint_url": "http://host"},
        {"endpoint": "az://container", "credentials_file": "/x"},
        {"endpoint": "s3://bucket", "timeout_s": 0},
        {"endpoint": "s3://bucket", "connection_pool_size": 0},
    ],
)
def test_settings_that_make_no_sense_are_refused_without_their_secrets(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as error:
        S3Settings(**settings)  # type: ignore[arg-type]
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("endpoint", ["gs://bucket/prefix", "az://container/prefix"])
def test_other_clouds_get_a_client(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than that: their services can't be had here."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    store = S3Store(S3Settings(endpoint), codec_for("none"))
    store.open()
    store.close()
    with pytest.raises(StoreUnavailable, match="is closed"):
        store.probe()
