"""Perspective's errors, as they stand on the wire: HTTP status, message, and details."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rectify.errors import WireError

_RPC = "type.googleapis.com/google.rpc."
SERVICE = "commentanalyzer.googleapis.com"


# ---------------------------------------------------------------------------------------------------------------------
# Of a text and what is asked of it


def empty_error() -> WireError:
    """There is nothing to score."""
    return WireError("Comment must be non-empty.", "COMMENT_EMPTY")


def length_error(size: int, limit: int) -> WireError:
    """The text has more bytes than the limit."""
    return WireError(f"Comment text was too many bytes. Value ({size}) exceeded limit ({limit}).", "COMMENT_TOO_LONG")


def language_error(attribute: str, languages: Sequence[str]) -> WireError:
    """The attribute is not scored in these languages."""
    fields = {"detectedLanguages": list(languages), "attribute": attribute}
    return WireError(
        f"Attribute {attribute} does not support request languages: {', '.join(languages)}",
        "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE",
        fields={"languageNotSupportedByAttributeError": fields},
    )


def detection_error() -> WireError:
    """The text is in no language that is known."""
    return WireError("Unable to detect language", "LANGUAGE_DETECTION_FAILED")


def missing_attributes_error() -> WireError:
    """No attribute is asked for."""
    return WireError("Missing requested_attributes", "NO_REQUESTED_ATTRIBUTES")


def unknown_attribute_error(attribute: str) -> WireError:
    """The server does not score the attribute."""
    return WireError(f"Unknown requested attribute: {attribute}", "INVALID_REQUEST")


def score_type_error(score_type: str, attribute: str) -> WireError:
    """Probabilities are all that is given."""
    return WireError(f"Requested score type {score_type} is not supported by attribute {attribute}", "INVALID_REQUEST")


def text_type_error(text_type: str) -> WireError:
    """Plain text is all that is taken."""
    known = text_type == "HTML"
    message = "Currently, only 'PLAIN_TEXT' comments are supported" if known else "Unknown text type"
    return WireError(message, "INVALID_REQUEST")


def context_error() -> WireError:
    """The context comes in both of its forms."""
    return WireError(
        "Context can have either entries or article_and_parent_comment, but both fields were populated.",
        "INVALID_REQUEST",
    )


# ---------------------------------------------------------------------------------------------------------------------
# Of the JSON


def payload_error(message: str) -> WireError:
    """The body is no JSON object."""
    return _bad_request(f"Invalid JSON payload received. {message}", None)


def unknown_field_error(name: str, place: str = "") -> WireError:
    """The object at `place` has a field that the API has not."""
    at = f" at '{place}'" if place else ""
    return _bad_request(f'Invalid JSON payload received. Unknown name "{name}"{at}: Cannot find field.', place)


def field_error(place: str, kind: str) -> WireError:
    """The field at `place` is not of the kind, as `"TYPE_STRING"`."""
    return _bad_request(f"Invalid value at '{place}' ({kind})", place)


def _bad_request(message: str, field: str | None) -> WireError:
    violation = ({"field": field} if field else {}) | {"description": message}
    return WireError(
        message, "INVALID_REQUEST", details=[{"@type": f"{_RPC}BadRequest", "fieldViolations": [violation]}]
    )


# ---------------------------------------------------------------------------------------------------------------------
# Of who asks, and how often


def key_error() -> WireError:
    """What Perspective answers to a bad key, with HTTP 400."""
    return WireError(
        "API key not valid. Please pass a valid API key.",
        details=[_error_info("API_KEY_INVALID", {"service": SERVICE})],
    )


def missing_key_error() -> WireError:
    """What Perspective answers where there is no key, with HTTP 403."""
    return WireError(
        "Method doesn't allow unregistered callers (callers without established identity). Please use API Key or "
        "other form of API consumer identity to call this API.",
        None,
        403,
        "PERMISSION_DENIED",
    )


def quota_error(limit_per_minute: int, project: str = "rectify", retry_after: int | None = None) -> WireError:
    """What Perspective answers above the quota, with HTTP 429.

    Args:
        limit_per_minute: the quota.
        project: whose quota it is.
        retry_after: seconds until there is quota again, for a header of that name.
    """
    metric = "Analysis requests (AnalyzeComment)"
    message = (
        f"Quota exceeded for quota metric '{metric}' and limit '{metric} per minute' of service "
        f"'{SERVICE}' for consumer 'project_number:{project}'."
    )
    metadata = {
        "consumer": f"projects/{project}",
        "quota_limit": "AnalyzeRequestsPerMinutePerProject",
        "quota_limit_value": str(limit_per_minute),
        "quota_location": "global",
        "quota_metric": "CommentAnalyzerService/analyze_requests",
        "service": SERVICE,
    }
    link = {
        "description": "Request a higher quota limit.",
        "url": "https://cloud.google.com/docs/quota#requesting_higher_quota",
    }
    return WireError(
        message,
        None,
        429,
        "RESOURCE_EXHAUSTED",
        [_error_info("RATE_LIMIT_EXCEEDED", metadata), {"@type": f"{_RPC}Help", "links": [link]}],
        headers=None if retry_after is None else {"Retry-After": str(retry_after)},
    )


def _error_info(reason: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    return {
        "@type": f"{_RPC}ErrorInfo",
        "reason": reason,
        "domain": "googleapis.com",
        "metadata": dict(metadata),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Of HTTP


def path_error(path: str) -> WireError:
    """There is nothing at this path."""
    return WireError(f"The requested URL {path} was not found on this server.", None, 404, "NOT_FOUND")


def method_error(method: str, allowed: str) -> WireError:
    """The path takes other methods."""
    return WireError(
        f"Request method {method} is not supported here: use {allowed}.",
        None,
        405,
        "UNIMPLEMENTED",
        headers={"Allow": allowed},
    )


def encoding_error(encoding: str) -> WireError:
    """The body is compressed."""
    return WireError(f"Content-Encoding {encoding} is not supported: send the body as it is.", None, 415)


def internal_error() -> WireError:
    """The server itself failed."""
    return WireError("Internal error encountered.", None, 500, "INTERNAL")


def unavailable_error(message: str = "The service is currently unavailable.") -> WireError:
    """There is no answer now, and may be one in a second."""
    return WireError(message, None, 503, "UNAVAILABLE", headers={"Retry-After": "1"})


def broken_error() -> WireError:
    """The request ended too soon, or came too slowly."""
    return WireError("The request did not come whole.", None, 408, "DEADLINE_EXCEEDED")


def malformed_error() -> WireError:
    """What came is no HTTP."""
    return WireError("Invalid HTTP request received.")


def two_lengths_error() -> WireError:
    """A request says twice, and in two ways, where its body ends."""
    message = "Content-Length and Transfer-Encoding exclude each other: send one."
    return WireError(message, headers={"Connection": "close"})


def size_error(limit: int) -> WireError:
    """The body has more bytes than the limit."""
    return WireError(f"Request payload size exceeds the limit: {limit} bytes.", None, 413)
