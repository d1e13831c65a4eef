"""An endpoint that is one server: `host:port`, IPv6 in brackets, with the name of its backend as a scheme or without."""

from __future__ import annotations


def host_and_port(endpoint: str, scheme: str, default_port: int) -> tuple[str, int]:
    """`host`, `host:port`, `scheme://host:port`. Raises ValueError if it is none of these."""
    authority = endpoint.removeprefix(f"{scheme}://")
    if authority != endpoint:
        authority = authority.removesuffix("/")
    host, colon, port = authority.rpartition(":")
    if not colon:
        host, port = authority, str(default_port)
    if not host or "/" in host or not (port.isdecimal() and 0 < int(port) < 65_536):
        raise ValueError(endpoint)
    return host.strip("[]"), int(port)
