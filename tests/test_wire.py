"""The wire format: requests, answers and errors are Perspective's to the letter, and odd ones do no harm."""

import json
import time

import pytest

from rectify.errors import WireError
from rectify.scoring.sentences import sentence_spans
from rectify.scoring.wire import (
    AnalyzeRequest,
    AttributeScore,
    Span,
    Utf16,
    analyze_body,
    analyze_response,
    decode_body,
    key_error,
    parse_analyze_request,
    parse_analyze_response,
    parse_suggest_request,
    quota_error,
    suggest_response,
)

KNOWN = ("TOXICITY", "INSULT", "SEXUALLY_EXPLICIT")
ERROR_TYPE = "type.googleapis.com/google.commentanalyzer.v1alpha1.Error"


def request(text="Good day", attributes=("TOXICITY",), **changes):
    return analyze_body(text, attributes) | changes


def refusal(body, languages=("en",), parse=parse_analyze_request):
    with pytest.raises(WireError) as caught:
        parse(body, KNOWN, languages)
    return caught.value.body()["error"]


# ---------------------------------------------------------------------------------------------------------------------
# Errors


@pytest.mark.parametrize(
    ("body", "error_type", "message"),
    [
        (request(""), "COMMENT_EMPTY", "Comment must be non-empty."),
        (request(" \n"), "COMMENT_EMPTY", "Comment must be non-empty."),
        (request() | {"comment": {}}, "COMMENT_EMPTY", "Comment must be non-empty."),
        (
            request("a" * 23368),
            "COMMENT_TOO_LONG",
            "Comment text was too many bytes. Value (23368) exceeded limit (20480).",
        ),
        (
            request("é" * 10241),
            "COMMENT_TOO_LONG",
            "Comment text was too many bytes. Value (20482) exceeded limit (20480).",
        ),
        (request(attributes=()), "NO_REQUESTED_ATTRIBUTES", "Missing requested_attributes"),
        ({"comment": {"text": "a"}}, "NO_REQUESTED_ATTRIBUTES", "Missing requested_attributes"),
        (request(attributes=("FLIRTATION",)), "INVALID_REQUEST", "Unknown requested attribute: FLIRTATION"),
        (
            request(requestedAttributes={"INSULT": {"scoreType": "RAW"}}),
            "INVALID_REQUEST",
            "Requested score type RAW is not supported by attribute INSULT",
        ),
        (
            request(comment={"text": "a", "type": "HTML"}),
            "INVALID_REQUEST",
            "Currently, only 'PLAIN_TEXT' comments are supported",
        ),
        (request(comment={"text": "a", "type": "RTF"}), "INVALID_REQUEST", "Unknown text type"),
        (
            request(context={"entries": [{"text": "a"}], "articleAndParentComment": {"article": {"text": "b"}}}),
            "INVALID_REQUEST",
            "Context can have either entries or article_and_parent_comment, but both fields were populated.",
        ),
    ],
)
def test_what_perspective_refuses_is_refused_in_its_words(body, error_type, message):
    assert refusal(body) == {
        "code": 400,
        "message": message,
        "status": "INVALID_ARGUMENT",
        "details": [{"@type": ERROR_TYPE, "errorType": error_type}],
    }


def test_an_unknown_language_is_refused_with_the_body_of_the_reference():
    body = request(attributes=("SEXUALLY_EXPLICIT", "TOXICITY"), languages=["om"])
    assert refusal(body) == {
        "code": 400,
        "message": "Attribute SEXUALLY_EXPLICIT does not support request languages: om",
        "status": "INVALID_ARGUMENT",
        "details": [
            {
                "@type": ERROR_TYPE,
                "errorType": "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE",
                "languageNotSupportedByAttributeError": {"detectedLanguages": ["om"], "attribute": "SEXUALLY_EXPLICIT"},
            }
        ],
    }


@pytest.mark.parametrize(
    ("asked", "refused"),
    [
        (["en"], None),
        (["en-US"], None),
        (["EN"], None),
        ([], None),
        (["en-Latn"], "en-Latn"),
        (["it", "en", "fr"], "it, fr"),
        (["english"], "english"),
        ([""], ""),
    ],
)
def test_regions_of_a_language_are_taken_and_other_languages_named(asked, refused):
    if refused is None:
        assert parse_analyze_request(request(languages=asked), KNOWN, ("en",)).languages == tuple(asked)
    else:
        message = f"Attribute TOXICITY does not support request languages: {refused}"
        assert refusal(request(languages=asked))["message"] == message
    assert parse_analyze_request(request(languages=asked), KNOWN, None).languages == tuple(asked)


def test_unsupported_attributes_are_dropped_where_the_client_asks_for_it():
    parsed = parse_analyze_request(request(languages=["it"], dropUnsupportedAttributes=True), KNOWN, ("en",))
    assert analyze_response(parsed, {}, "it") == {"languages": ["it"], "detectedLanguages": ["it"]}


def test_the_quota_error_is_that_of_the_reference():
    error = quota_error(60, "123", retry_after=7)
    metric = "Analysis requests (AnalyzeComment)"
    assert error.headers == {"Retry-After": "7"}
    assert error.body() == {
        "error": {
            "code": 429,
            "message": f"Quota exceeded for quota metric '{metric}' and limit '{metric} per minute' of service "
            "'commentanalyzer.googleapis.com' for consumer 'project_number:123'.",
            "status": "RESOURCE_EXHAUSTED",
            "details": [
                {
                    "@type": "type.googleapis.com/google.rpc.ErrorInfo",
                    "reason": "RATE_LIMIT_EXCEEDED",
                    "domain": "googleapis.com",
                    "metadata": {
                        "quota_limit": "AnalyzeRequestsPerMinutePerProject",
                        "quota_limit_value": "60",
                        "quota_metric": "CommentAnalyzerService/analyze_requests",
                        "consumer": "projects/123",
                        "service": "commentanalyzer.googleapis.com",
                        "quota_location": "global",
                    },
                },
                {
                    "@type": "type.googleapis.com/google.rpc.Help",
                    "links": [
                        {
                            "description": "Request a higher quota limit.",
                            "url": "https://cloud.google.com/docs/quota#requesting_higher_quota",
                        }
                    ],
                },
            ],
        }
    }


def test_the_error_of_a_bad_key_is_that_of_the_reference():
    error = key_error().body()["error"]
    assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")
    assert error["message"] == "API key not valid. Please pass a valid API key."
    assert error["details"][0]["reason"] == "API_KEY_INVALID"


# ---------------------------------------------------------------------------------------------------------------------
# Odd requests


@pytest.mark.parametrize(
    ("changes", "place"),
    [
        ({"comment": "a"}, "comment"),
        ({"comment": {"text": 3}}, "comment.text"),
        ({"comment": {"text": "\ud800"}}, "comment.text"),
        ({"requestedAttributes": ["TOXICITY"]}, "requested_attributes"),
        ({"requestedAttributes": {"TOXICITY": None}}, "requested_attributes[TOXICITY]"),
        ({"requestedAttributes": {"TOXICITY": {"scoreThreshold": "high"}}}, "score_threshold"),
        ({"requestedAttributes": {"TOXICITY": {"scoreThreshold": 10**400}}}, "score_threshold"),
        ({"requestedAttributes": {"TOXICITY": {"scoreThreshold": True}}}, "score_threshold"),
        ({"languages": "en"}, "languages"),
        ({"languages": [["en"]]}, "languages"),
        ({"spanAnnotations": "yes"}, "span_annotations"),
        ({"doNotStore": 1}, "do_not_store"),
        ({"clientToken": 5}, "client_token"),
        ({"spanAnotations": True}, "spanAnotations"),
    ],
)
def test_a_field_of_the_wrong_form_is_named(changes, place):
    error = refusal(request(**changes))
    assert (error["code"], error["status"]) == (400, "INVALID_ARGUMENT")
    assert place in error["message"]
    assert error["details"][0]["errorType"] == "INVALID_REQUEST"
    assert error["details"][1]["fieldViolations"][0]["description"] == error["message"]


@pytest.mark.parametrize("body", [[], "text", 5, None, True])
def test_json_that_is_no_object_is_refused(body):
    assert refusal(body)["message"] == "Invalid JSON payload received. Expected an object."


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a": NaN}',
        b"\xff\xfe",
        b"[" * 100_000,
        b"{" + b"9" * 5000 + b"}",
        b'{"a": "' + b'\\"' * 200_000,
        b"{" + b"a" * 400_000,
    ],
)
def test_what_is_no_json_is_refused_in_little_time(data):
    began = time.perf_counter()
    with pytest.raises(WireError, match="Invalid JSON payload received"):
        decode_body(data)
    assert time.perf_counter() - began < 2


def test_members_may_be_named_as_in_the_quickstart_of_perspective():
    data = b'{comment: {text: "say: \\"languages: no\\""}, languages: ["en"], requestedAttributes: {TOXICITY:{}} }'
    parsed = parse_analyze_request(decode_body(data), KNOWN)
    assert parsed == AnalyzeRequest('say: "languages: no"', {"TOXICITY": 0.0}, ("en",))
    snake = {"comment": {"text": "a"}, "requested_attributes": {"INSULT": {"score_threshold": 0.5}}}
    assert parse_analyze_request(snake, KNOWN).thresholds == {"INSULT": 0.5}


# ---------------------------------------------------------------------------------------------------------------------
# Answers


def test_an_answer_has_the_form_of_the_reference():
    parsed = parse_analyze_request(request("😀 You idiot", clientToken="c"), KNOWN)
    answer = analyze_response(parsed, {"TOXICITY": AttributeScore(0.87)}, "en")
    score = {"value": 0.87, "type": "PROBABILITY"}
    spans = [{"begin": 0, "end": 12, "score": score}]
    assert answer == {
        "attributeScores": {"TOXICITY": {"spanScores": spans, "summaryScore": score}},
        "languages": ["en"],
        "detectedLanguages": ["en"],
        "clientToken": "c",
    }


def test_spans_go_over_the_wire_in_utf16_units_and_come_back_as_they_were():
    text = "😀 one. 😀 two."
    spans = tuple(Span(begin, end, 0.25) for begin, end in sentence_spans(text))
    parsed = parse_analyze_request(request(text), KNOWN)
    answer = analyze_response(parsed, {"TOXICITY": AttributeScore(0.5, spans)}, "en")
    sent = answer["attributeScores"]["TOXICITY"]["spanScores"]
    units = text.encode("utf-16-le")
    parts = [units[2 * span["begin"] : 2 * span["end"]].decode("utf-16-le") for span in sent]
    assert parts == ["😀 one. ", "😀 two."]
    assert parse_analyze_response(json.loads(json.dumps(answer)), text, KNOWN)["TOXICITY"].spans == spans


def test_attributes_below_their_threshold_are_absent_and_so_is_an_empty_list_of_them():
    parsed = AnalyzeRequest("a", {"TOXICITY": 0.5, "INSULT": 0.2})
    answer = analyze_response(parsed, {"TOXICITY": AttributeScore(0.4), "INSULT": AttributeScore(0.2)}, "en")
    assert list(answer["attributeScores"]) == ["INSULT"]
    answer = analyze_response(parsed, {"TOXICITY": AttributeScore(0.4), "INSULT": AttributeScore(0.1)}, "en")
    assert "attributeScores" not in answer


@pytest.mark.parametrize("value", [float("nan"), -0.1, 1.5])
def test_what_is_no_score_never_goes_over_the_wire(value):
    with pytest.raises(ValueError, match="none from 0 to 1"):
        analyze_response(AnalyzeRequest("a", {"TOXICITY": 0.0}), {"TOXICITY": AttributeScore(value)}, "en")


@pytest.mark.parametrize(
    "span",
    [{"begin": 3, "end": 1}, {"begin": 0, "end": 9}, {"begin": -1, "end": 1}, {"begin": 0.0, "end": 1}, "span"],
)
def test_an_answer_with_impossible_spans_is_refused(span):
    if isinstance(span, dict):
        span["score"] = {"value": 0.5}
    answer = {"attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.5}, "spanScores": [span]}}}
    with pytest.raises(ValueError, match=r".+"):
        parse_analyze_response(answer, "text", ["TOXICITY"])


def test_spans_without_places_are_over_the_whole_text():
    answer = {
        "attributeScores": {"TOXICITY": {"summaryScore": {"value": 0.5}, "spanScores": [{"score": {"value": 1}}]}}
    }
    assert parse_analyze_response(answer, "😀 text", ["TOXICITY"])["TOXICITY"].spans == (Span(0, 6, 1.0),)


def test_a_place_inside_a_surrogate_pair_is_that_of_its_character():
    places = Utf16("a😀b")
    assert [places.index(unit) for unit in range(5)] == [0, 1, 1, 2, 3]
    assert [places.units(index) for index in range(4)] == [0, 1, 3, 4]


# ---------------------------------------------------------------------------------------------------------------------
# Suggestions


def suggestion(**changes):
    scores = {"TOXICITY": {"summaryScore": {"value": 0}, "spanScores": [{"begin": 0, "end": 1, "score": {"value": 1}}]}}
    return {"comment": {"text": "ab"}, "attributeScores": scores, "clientToken": "c"} | changes


def test_a_suggestion_is_answered_with_its_token_and_languages():
    parsed = parse_suggest_request(suggestion(languages=["en"]), KNOWN, ("en",))
    answer = {"clientToken": "c", "requestedLanguages": ["en"], "detectedLanguages": ["en"]}
    assert suggest_response(parsed, "en") == answer


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attributeScores": {}}, "Missing attribute_scores"),
        ({"attributeScores": {"FLIRTATION": {}}}, "Unknown requested attribute: FLIRTATION"),
        ({"attributeScores": {"TOXICITY": {}}}, "Missing scores of attribute TOXICITY"),
        ({"attributeScores": {"TOXICITY": {"summaryScore": {"value": 2}}}}, "score.value"),
        ({"attributeScores": {"TOXICITY": {"spanScores": [{"score": {"value": 1}}]}}}, "span_scores"),
        ({"comment": {"text": ""}}, "Comment must be non-empty."),
        ({"languages": ["om"]}, "Attribute TOXICITY does not support request languages: om"),
    ],
)
def test_a_malformed_suggestion_is_refused(changes, message):
    assert message in refusal(suggestion(**changes), parse=parse_suggest_request)["message"]


# ---------------------------------------------------------------------------------------------------------------------
# Sentences


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("no end", ["no end"]),
        ("You are dumb. go away!  Now", ["You are dumb. ", "go away!  ", "Now"]),
        ("Mr. J. K. Smith, e.g. at 3.5 km. He left.", ["Mr. J. K. Smith, e.g. at 3.5 km. ", "He left."]),
        ("well... maybe. Well... Maybe.", ["well... maybe. ", "Well... ", "Maybe."]),
        ("“Stop!” She ran.", ["“Stop!” ", "She ran."]),
        ("A heading\n\nA line\nthat goes on", ["A heading\n\n", "A line\nthat goes on"]),
        ("你好。再见！", ["你好。", "再见！"]),
        ("... ! Hi ! !", ["... ! Hi ! !"]),
        ("  ", ["  "]),
    ],
)
def test_sentences_end_where_a_reader_would_end_them(text, sentences):
    assert [text[begin:end] for begin, end in sentence_spans(text)] == sentences


@pytest.mark.parametrize(
    "text", ["." * 20_000 + "x", "a. " * 6000, "! " * 10_000, '?"' * 10_000 + "x", "\n \n" * 6000, "😀! " * 4000]
)
def test_sentences_cover_the_whole_text_in_little_time(text):
    began = time.perf_counter()
    for most in (None, 256):
        spans = sentence_spans(text, most)
        assert [begin for begin, _ in spans] == [0, *(end for _, end in spans[:-1])]
        assert spans[-1][1] == len(text)
        assert most is None or len(spans) <= most
    assert time.perf_counter() - began < 1
