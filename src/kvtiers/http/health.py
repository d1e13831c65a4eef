"""The backends' health as the probes tell it: to anybody who reaches the port, so without paths, addresses and credentials."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Final

_MOST_CHARACTERS: Final = 200
_SECRET: Final = re.compile(
    r"""(?:[a-z][\w+.-]{0,30}://\S+)            # a URL: user, password, query
      | '[^']*/[^']*' | "[^"]*/[^"]*"           # a path in quotes, spaces and all
      | (?<![\w/])~?/[^\s:,;'")\]]+             # a path
      | \b(?:password|passwd|token|secret|key)\s*[=:]\s*\S+
      | \b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b    # an address
      | \[[0-9a-f:.%]*:[0-9a-z:.%]*\](?::\d+)?   # of the other kind
      | (?<![\w:.])(?=[0-9a-f:]*::|(?:[0-9a-f]{1,4}:){5})(?:[0-9a-f]{1,4})?(?::[0-9a-f]{0,4}){1,6}:[0-9a-f]{1,4}(?:%\w+)?(?!\w)
      | (?<!\w)[a-z0-9][\w.-]{0,253}:\d{2,5}\b  # a host and its port
    """,
    re.VERBOSE | re.IGNORECASE,
)


def backends(stats: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Each enabled store: whether it is up, seconds since it was last checked, what is wrong."""
    return {
        tier: {
            "status": "up" if values["health"]["up"] else "down",
            "checked_s_ago": round(values["health"]["checked_s_ago"], 1),
            "error": redacted(values["health"]["error"]),
        }
        for tier, values in stats["tiers"].items()
        if "health" in values
    }


def redacted(error: str | None) -> str | None:
    """One line of bounded length; what may be a path, a URL, an address or a credential is left out."""
    if error is None:
        return None
    return _SECRET.sub("<hidden>", " ".join(error.split()))[:_MOST_CHARACTERS]
