"""The far end of the Perspective client: its address, the key to it, and what its answers mean."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

from rectify.errors import ApiKeyError, EndpointError, InvalidArgumentError, UnknownAttributeError
from rectify.scoring.http_calls import PASSING_STATUSES, Key, whole_address
from rectify.scoring.scores import ATTRIBUTES, Reason
from rectify.scoring.wire import ANALYZE_PATH

GOOGLE_URL = "https://commentanalyzer.googleapis.com"
KEY_VARIABLE, URL_VARIABLE = "PERSPECTIVE_API_KEY", "PERSPECTIVE_API_URL"
_EXPERIMENTAL = (
    *("TOXICITY", "SEVERE_TOXICITY", "IDENTITY_ATTACK", "INSULT", "PROFANITY", "THREAT"),
    *("AFFINITY", "COMPASSION", "CURIOSITY", "NUANCE", "PERSONAL_STORY", "REASONING", "RESPECT", "CONSTRUCTIVE"),
    *("ALIENATION", "FEARMONGERING", "GENERALIZATION", "MORAL_OUTRAGE", "POWER_APPEAL", "SCAPEGOATING"),
)
PERSPECTIVE_ATTRIBUTES = (
    *ATTRIBUTES,
    *("TOXICITY_FAST", "ATTACK_ON_AUTHOR", "ATTACK_ON_COMMENTER", "INCOHERENT", "INFLAMMATORY", "LIKELY_TO_REJECT"),
    *("OBSCENE", "SPAM", "UNSUBSTANTIAL"),
    *(f"{name}_EXPERIMENTAL" for name in _EXPERIMENTAL),
)
"""What the Perspective API scores, in one language or another; RealToxicityPrompts' eight come first."""
_PERMANENT = (
    Reason.COMMENT_EMPTY,
    Reason.COMMENT_TOO_LONG,
    Reason.LANGUAGE_NOT_SUPPORTED,
    Reason.LANGUAGE_DETECTION_FAILED,
)


class Endpoint:
    """A server of the Perspective API.

    Args:
        address: its base, or the whole address, which ends in "analyze".
        key: the key to it; may be empty.

    Attributes:
        url: the whole address.
        host: its host and port.
        place: host and port, and the path where it is not the usual one.

    Raises:
        InvalidArgumentError: the address is malformed, or holds a user, a password or a query.
        ApiKeyError: the key is malformed, or Google's service is asked without one.
    """

    def __init__(self, address: str, key: str) -> None:
        self.url = whole_address(address, "analyze", ANALYZE_PATH, f"the key goes into key or {KEY_VARIABLE}")
        self.host = urlsplit(self.url).netloc
        self.place = self.url.split("://")[1].removesuffix(ANALYZE_PATH)
        try:
            self.key = Key(key)
        except InvalidArgumentError as error:
            raise ApiKeyError(str(error)) from error
        if self.host == urlsplit(GOOGLE_URL).netloc and not self.key:
            raise ApiKeyError(f"key is missing: give one, set {KEY_VARIABLE}, or take a local scorer, which needs none")

    def judge(self, status: int, body: Any, harmless: bool = True) -> Reason | None:
        """Why there are no scores in an HTTP answer; `None` where there may be some.

        Args:
            status: of the answer.
            body: its JSON value.
            harmless: whether no text was asked for to which a firewall may object, by leading elsewhere.

        Raises:
            PerspectiveError, UnknownAttributeError: no other text would fare better.
        """
        if status == 200:
            return None
        message, names = _error(status, body)
        if status == 429 or names & {"RATE_LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"}:
            return Reason.RATE_LIMIT_EXCEEDED
        if status in PASSING_STATUSES:
            return Reason.TIMEOUT if status == 408 else Reason.SERVER_ERROR
        said = f"{self.host} answers {status}, {self.key.hide_in(message)[:400]!r}"
        if (status in (404, 405, 410) or status < 400) and (names or harmless):
            raise EndpointError(
                f"endpoint {self.url!r} is not the Perspective API ({said}): give another, as argument or in "
                f"{URL_VARIABLE}, or take a local scorer (Google's service ends with 2026)"
            )
        if not names:  # of a proxy, a firewall or another service: no verdict on the text
            return Reason.BLOCKED
        if status in (401, 403) or "API_KEY_INVALID" in names or "api key" in message.lower():
            raise ApiKeyError(
                f"key is {'refused' if self.key else 'missing'} ({said}): give one that this server accepts as key, "
                f"or in {KEY_VARIABLE}; a local scorer needs none"
            )
        if re.search("unknown requested attribute|is not supported by attribute", message, re.IGNORECASE):
            raise UnknownAttributeError(f"attributes are not all known to the server ({said}): leave that one out")
        if status not in (400, 413):
            return Reason.SERVER_ERROR
        if status == 413:
            return Reason.COMMENT_TOO_LONG
        return next((reason for reason in _PERMANENT if reason in names), Reason.INVALID_REQUEST)

    def gone(self, problem: str) -> EndpointError:
        """The error of a service that cannot be reached."""
        return EndpointError(
            f"endpoint {self.url!r} is out of reach ({problem}): mend that, give another as argument or in "
            f"{URL_VARIABLE}, or take a local scorer; what is scored is kept, and the same command goes on"
        )


def _error(status: int, body: Any) -> tuple[str, set[str]]:
    """The message of an error, and every name that the service gives to it; no name where the error is not its own.

    Its own errors have the form of Google's: the HTTP status as a number, a message, and the status' name.
    """
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict) or error.get("code") != status:
        return "", set()
    message, name = error.get("message"), error.get("status")
    if not isinstance(message, str) or not isinstance(name, str) or not name:
        return "", set()
    details = error.get("details")
    records = [each for each in (details if isinstance(details, list) else []) if isinstance(each, dict)]
    found = [name, *(record.get(key) for record in records for key in ("errorType", "reason"))]
    return message, {each for each in found if isinstance(each, str)}
