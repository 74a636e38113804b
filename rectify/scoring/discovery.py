"""The discovery document: what Google's own client libraries make their classes of."""

from __future__ import annotations

from typing import Any

VERSION = "v1alpha1"

_TEXT, _FLAG, _NUMBER = {"type": "string"}, {"type": "boolean"}, {"type": "number", "format": "float"}
_PLACE = {"type": "integer", "format": "int32"}
_SCORE_TYPE = {
    "type": "string",
    "enum": ["SCORE_TYPE_UNSPECIFIED", "PROBABILITY", "STD_DEV_SCORE", "PERCENTILE", "RAW"],
}
_PARAMETERS = {
    "key": "API key, where the server asks for one.",
    "alt": "Form of the answer: json.",
    "fields": "Taken, unused.",
    "quotaUser": "Taken, unused.",
    "access_token": "Taken, unused.",
    "oauth_token": "Taken, unused.",
    "callback": "Taken, unused.",
    "uploadType": "Taken, unused.",
    "upload_protocol": "Taken, unused.",
    "$.xgafv": "Taken, unused.",
}


def discovery_document(root_url: str) -> dict[str, Any]:
    """The document of version v1alpha1, as far as this server goes.

    Args:
        root_url: where the server is, with a slash at the end, as the client sees it.
    """
    parameters: dict[str, Any] = {
        name: {"type": "string", "location": "query", "description": what} for name, what in _PARAMETERS.items()
    }
    parameters["prettyPrint"] = {"type": "boolean", "location": "query", "description": "Taken, unused."}
    return {
        "kind": "discovery#restDescription",
        "discoveryVersion": "v1",
        "id": f"commentanalyzer:{VERSION}",
        "name": "commentanalyzer",
        "canonicalName": "Comment Analyzer",
        "version": VERSION,
        "title": "rectify: scores of texts in the Perspective API's format",
        "description": "Scores how toxic a text is, with a local model.",
        "protocol": "rest",
        "rootUrl": root_url,
        "servicePath": "",
        "baseUrl": root_url,
        "batchPath": "batch",
        "ownerName": "rectify",
        "parameters": parameters,
        "resources": {
            "comments": {
                "methods": {
                    "analyze": _method("analyze", "AnalyzeComment", "Scores a text."),
                    "suggestscore": _method("suggestscore", "SuggestCommentScore", "Takes a score, and forgets it."),
                }
            }
        },
        "schemas": {name: {"id": name, "type": "object", "properties": fields} for name, fields in _SCHEMAS.items()},
    }


def _method(name: str, schema: str, description: str) -> dict[str, Any]:
    path = f"{VERSION}/comments:{name}"
    return {
        "id": f"commentanalyzer.comments.{name}",
        "httpMethod": "POST",
        "path": path,
        "flatPath": path,
        "description": description,
        "parameters": {},
        "parameterOrder": [],
        "request": {"$ref": f"{schema}Request"},
        "response": {"$ref": f"{schema}Response"},
    }


def _list(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def _map(schema: str) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": {"$ref": schema}}


_REQUEST: dict[str, Any] = {
    "comment": {"$ref": "TextEntry"},
    "context": {"$ref": "Context"},
    "languages": _list(_TEXT),
    "clientToken": _TEXT,
    "sessionId": _TEXT,
    "communityId": _TEXT,
}
_SCHEMAS: dict[str, dict[str, Any]] = {
    "AnalyzeCommentRequest": _REQUEST
    | {
        "requestedAttributes": _map("AttributeParameters"),
        "doNotStore": _FLAG,
        "spanAnnotations": _FLAG,
        "dropUnsupportedAttributes": _FLAG,
    },
    "AnalyzeCommentResponse": {
        "attributeScores": _map("AttributeScores"),
        "languages": _list(_TEXT),
        "detectedLanguages": _list(_TEXT),
        "clientToken": _TEXT,
    },
    "SuggestCommentScoreRequest": _REQUEST | {"attributeScores": _map("AttributeScores")},
    "SuggestCommentScoreResponse": {
        "requestedLanguages": _list(_TEXT),
        "detectedLanguages": _list(_TEXT),
        "clientToken": _TEXT,
    },
    "TextEntry": {
        "text": _TEXT,
        "type": {"type": "string", "enum": ["TEXT_TYPE_UNSPECIFIED", "PLAIN_TEXT", "HTML"]},
    },
    "Context": {
        "entries": _list({"$ref": "TextEntry"}),
        "articleAndParentComment": {"$ref": "ArticleAndParentComment"},
    },
    "ArticleAndParentComment": {"article": {"$ref": "TextEntry"}, "parentComment": {"$ref": "TextEntry"}},
    "AttributeParameters": {"scoreType": _SCORE_TYPE, "scoreThreshold": _NUMBER},
    "AttributeScores": {"summaryScore": {"$ref": "Score"}, "spanScores": _list({"$ref": "SpanScore"})},
    "SpanScore": {"begin": _PLACE, "end": _PLACE, "score": {"$ref": "Score"}},
    "Score": {"value": _NUMBER, "type": _SCORE_TYPE},
}
