"""Why a service cannot be reached, where trying again would not help: in words that name what is to be mended."""

from __future__ import annotations

import errno
import http.client
import re
import socket
import ssl
from collections.abc import Iterator

from requests import exceptions as failures
from urllib3 import exceptions as below

_NO_TLS = {"WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG"}
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EACCES, errno.EPERM}
_TUNNEL = re.compile(r"Tunnel connection failed: (\d{3})")


def why_unreachable(error: BaseException) -> str | None:
    """What stands in the way for good; `None` for what may pass, as a broken connection may.

    The messages of `requests` are not passed on, as they may hold whatever the request does.

    Args:
        error: as a call of `requests` raises it.
    """
    causes = list(_causes(error))
    proxied = any(isinstance(each, failures.ProxyError | below.ProxyError) for each in causes)
    it, its = ("the proxy", "the proxy's") if proxied else ("it", "its")
    for each in causes:
        if found := _TUNNEL.search(str(each)):
            status = int(found[1])
            return f"the proxy refuses, with {status}" if 400 <= status < 500 and status not in (408, 429) else None
    for each in causes:
        if isinstance(each, socket.gaierror | below.NameResolutionError):
            return f"{its} name does not resolve"
        if isinstance(each, ssl.SSLCertVerificationError):
            return f"{its} certificate is not trusted ({each.verify_message})"
        if isinstance(each, ssl.SSLError) and not isinstance(each, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            reason = getattr(each, "reason", None) or "no reason given"
            return f"{it} does not speak TLS: is it http://?" if reason in _NO_TLS else f"TLS fails ({reason})"
        if isinstance(each, http.client.BadStatusLine) and not isinstance(each, http.client.RemoteDisconnected):
            return f"{it} does not speak HTTP: is it https://?"
        if isinstance(each, ConnectionRefusedError):
            return f"{it} refuses connections: is it running?"
        if isinstance(each, OSError) and each.errno in _NO_WAY:
            return f"no way leads to {it if proxied else 'its address'} ({each.strerror})"
        if isinstance(each, failures.InvalidURL | failures.InvalidSchema | below.LocationParseError):
            return "its address, or that of a proxy in the environment, cannot be used"
    if isinstance(error, OSError) and not isinstance(error, failures.RequestException):
        return "the certificates that the environment names cannot be read"
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and those that it wraps in any of the ways that `requests` and urllib3 do."""
    waiting: list[object] = [error]
    seen: set[int] = set()
    while waiting:
        each = waiting.pop(0)
        if isinstance(each, BaseException) and id(each) not in seen:
            seen.add(id(each))
            yield each
            waiting += [*each.args, each.__cause__, each.__context__]
            waiting += [getattr(each, name, None) for name in ("reason", "original_error")]
