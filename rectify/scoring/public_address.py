"""Where clients and browsers find the server: its own address in documents, and the origins of other sites' pages."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from rectify.errors import InvalidArgumentError

_PORTS = {"http": 80, "https": 443}


def check_public_url(url: str) -> str:
    """The URL with a slash at its end.

    Raises:
        InvalidArgumentError: it is no address of a server.
    """
    scheme, host, path = _parts(url, "public_url", "https://scores.example/perspective")
    return f"{scheme}://{host}{path.rstrip('/')}/"


def check_origin(origin: str) -> str:
    """An origin as browsers write it.

    Raises:
        InvalidArgumentError: it is none.
    """
    if origin in ("*", "null"):
        return origin
    scheme, host, path = _parts(origin, "cors", "https://app.example, or * for any")
    if path not in ("", "/"):
        raise InvalidArgumentError(f"cors is {origin!r}: give an origin, which has no path, as {scheme}://{host}")
    return f"{scheme}://{host}"


def _parts(url: str, argument: str, example: str) -> tuple[str, str, str]:
    """Scheme, host with port, and path."""
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname or ""
    except ValueError:
        parts, port, host = urlsplit(""), None, ""
    plain = re.fullmatch(r"[0-9a-z.:_-]+", host) and re.fullmatch(r"[!-~]*", url) and "@" not in url
    if parts.scheme not in _PORTS or not plain or "?" in url or "#" in url or url != url.strip():
        raise InvalidArgumentError(f"{argument} is {url!r}: give one as {example}")
    host = f"[{host}]" if ":" in host else host
    return parts.scheme, host if port in (None, _PORTS[parts.scheme]) else f"{host}:{port}", parts.path


def own_url(scope: Mapping[str, Any], host: str) -> str:
    """The address of the server as the client reached it, with a slash at the end.

    What a client says of it is taken only where it names the end of its own connection: whoever could put another
    name into what the server says would be sent other people's keys.

    Args:
        scope: of the request, in ASGI's form.
        host: the header `Host`.
    """
    scheme = scope["scheme"] if scope.get("scheme") in _PORTS else "http"
    name, port = scope.get("server") or ("localhost", None)
    if port is None:  # a Unix socket
        name = "localhost"
    try:
        address = ipaddress.ip_address(name)
        address = getattr(address, "ipv4_mapped", None) or address
        names = [f"[{address}]" if address.version == 6 else str(address)]
        names += ["localhost", "127.0.0.1", "[::1]"] if address.is_loopback else []
    except ValueError:
        names = [name]
    ends = [""] if port in (None, _PORTS[scheme]) else []
    ends += [f":{port}"] if port is not None else []
    known = [name + end for name in names for end in ends]
    return f"{scheme}://{host.lower() if host.lower() in known else known[0]}{scope.get('root_path', '')}/"
