"""What an error of the client means to the cache. Pure functions.

The client has a class for a few errors and one for all others, and tells the rest in its text only: an HTTP status, the service's own
code in XML, or what happened on the way. Its text also has URLs, and for some services URLs hold signatures; so no message of ours
quotes it, and it is not chained.
"""

from __future__ import annotations

import re
from typing import Final

from kvtiers.model.errors import RecordMissing, StoreError, StoreFull, StoreTransient, StoreUnavailable

_STATUS: Final = re.compile(r"status code: (\d{3})")
_CODE: Final = re.compile(r"<Code>([A-Za-z0-9.]{1,64})</Code>")
_NO_BUCKET: Final = frozenset({"NoSuchBucket", "ContainerNotFound", "ContainerBeingDeleted"})
_NO_OBJECT: Final = frozenset({"NoSuchKey", "BlobNotFound"})
_FULL: Final = frozenset(
    {
        "InsufficientStorage",
        "QuotaExceeded",
        "ServiceQuotaExceededException",
        "XMinioStorageFull",
        "XMinioAdminBucketQuotaExceeded",
    }
)
_REFUSED: Final = frozenset({"PermissionDeniedError", "UnauthenticatedError"})
_KEY_IS_WRONG: Final = frozenset(
    {"SignatureDoesNotMatch", "InvalidAccessKeyId", "InvalidToken", "ExpiredToken", "TokenRefreshRequired"}
)


def is_client_error(error: Exception) -> bool:
    """Whether it is one of the client's, or of a wait for it."""
    return isinstance(error, OSError) or type(error).__module__.startswith("obstore")


def is_bare_missing(error: Exception) -> bool:
    """A 404 that no object store has explained: some other service answers there."""
    return isinstance(error, FileNotFoundError) and not _code_of(str(error))


def as_store_error(error: Exception, place: str, timeout_s: float) -> StoreError:
    """One sentence for one cause. `place`: bucket and service; FileNotFoundError is a miss, unless the bucket is what is missing."""
    text = str(error)
    code = _code_of(text)
    match = _STATUS.search(text)
    status = int(match[1]) if match else 0
    if code in _NO_BUCKET:
        return StoreUnavailable(f"{place}: there is no such bucket; make it, or mend storage.remote.endpoint")
    if isinstance(error, FileNotFoundError):
        return RecordMissing("no such record")
    if isinstance(error, TimeoutError) or "kind: Timeout" in text or "TimedOut" in text:
        return StoreTransient(f"{place} did not answer in {timeout_s:g} s")
    if code in _FULL or status == 507:
        return StoreFull(f"{place} is full ({code or status}); free space, or raise its quota")
    if type(error).__name__ in _REFUSED or status in (401, 403):
        return StoreUnavailable(f"{place} refuses us{_told(code)}: {_what_to_do(code)}")
    if status:
        return _of_status(status, code, place)
    return _on_the_way(text, place)


def _of_status(status: int, code: str, place: str) -> StoreError:
    if status >= 500 or status in (408, 409, 412, 429):
        return StoreTransient(f"{place} answered {status}{_told(code)}")
    if status < 400:
        return StoreUnavailable(
            f"{place} answered {status}{_told(code)}: the bucket may be in another region"
        )
    return StoreUnavailable(
        f"{place} answered {status}{_told(code)}; check storage.remote.endpoint, s3.endpoint_url and s3.region"
    )


def _on_the_way(text: str, place: str) -> StoreError:
    if "dns error" in text:
        return StoreUnavailable(
            f"{place} can't be reached: the host's name is not known; check storage.remote.s3.endpoint_url"
        )
    if "certificate" in text.lower() or "UnknownIssuer" in text:
        return StoreUnavailable(
            f"{place}: the server's certificate is not trusted; set storage.remote.s3.ca_file to its issuer's"
        )
    if "kind: Connect" in text:
        return StoreUnavailable(
            f"{place} can't be reached: no connection; check that the service runs, and storage.remote.s3.endpoint_url (http or https)"
        )
    return StoreTransient(f"the connection to {place} broke")


def _what_to_do(code: str) -> str:
    if code == "RequestTimeTooSkewed":
        return "set this machine's clock"
    if code in _KEY_IS_WRONG:
        return "the key is wrong or has expired; check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.remote.s3.credentials_file"
    return "check the credentials, and that they allow to get, put, delete and list in this bucket"


def _told(code: str) -> str:
    return f" ({code})" if code else ""


def _code_of(text: str) -> str:
    match = _CODE.search(text)
    return match[1] if match else ""
