"""The stub: made-up scores that never change, faults at will, and the same answers in process and over HTTP."""

import json
import logging

import numpy as np
import pytest
import requests

from rectify.errors import UnknownAttributeError
from rectify.scoring import ATTRIBUTES, Reason
from rectify.scoring.stub import (
    Fault,
    FaultKind,
    StubAdapter,
    StubScorer,
    StubServer,
    StubService,
    first_faults,
    pseudo_score,
    random_faults,
)
from rectify.scoring.wire import ANALYZE_PATH, analyze_body, parse_analyze_response


def post(base, text="A text", adapter=None, attributes=ATTRIBUTES, timeout=5, **settings):
    with requests.Session() as session:
        session.trust_env = False
        if adapter is not None:
            session.mount("http://", adapter)
        return session.post(base + ANALYZE_PATH, json=analyze_body(text, attributes), timeout=timeout, **settings)


@pytest.fixture(params=["in process", "over HTTP"])
def serve(request):
    """`serve(service)`: a function that posts to it, by the one transport and by the other."""
    servers = []

    def start(service):
        if request.param == "in process":
            return lambda *texts, **settings: post("http://stub", *texts, adapter=StubAdapter(service), **settings)
        servers.append(StubServer(service).__enter__())
        return lambda *texts, **settings: post(servers[-1].url, *texts, **settings)

    yield start
    for server in servers:
        server.__exit__()


def test_the_scorer_warns_that_its_numbers_mean_nothing(caplog):
    with caplog.at_level(logging.WARNING):
        StubScorer()
    assert "MEAN NOTHING" in caplog.text


def test_scores_depend_on_text_and_attribute_alone():
    scorer = StubScorer()
    texts = [f"text {i}" for i in range(1000)]
    scores = scorer.score([*texts, " ", "\ud800"], ATTRIBUTES)
    assert scores.reasons == (*[None] * 1000, Reason.COMMENT_EMPTY, Reason.INVALID_UNICODE)
    assert np.isnan(scores.values[1000:]).all()
    np.testing.assert_array_equal(StubScorer().score(texts[::-1], ATTRIBUTES).values, scores.values[999::-1])
    assert abs(scores.values[:1000].mean(0) - 0.5).max() < 0.05
    assert abs(np.corrcoef(scores.values[:1000].T) - np.eye(8)).max() < 0.15
    assert scores["THREAT"][3] == pseudo_score("text 3", "THREAT") == pytest.approx(0.337535950342307)
    assert scorer.score([]).values.shape == (0, 1)
    with pytest.raises(UnknownAttributeError, match="SPAM"):
        scorer.score(texts, ["SPAM"])


def test_it_answers_in_the_wire_format(serve):
    ask = serve(StubService())
    text = "Ein 😀 Satz. Noch einer!"
    response = ask(text)
    assert response.status_code == 200
    scores = parse_analyze_response(response.json(), text, ATTRIBUTES)
    assert {name: score.value for name, score in scores.items()} == {
        name: pseudo_score(text, name) for name in ATTRIBUTES
    }
    refused = ask(" ")
    assert (refused.status_code, refused.json()["error"]["details"][0]["errorType"]) == (400, "COMMENT_EMPTY")
    assert ask("x", attributes=["SPAM"]).json()["error"]["message"] == "Unknown requested attribute: SPAM"


def test_spans_are_of_sentences_in_utf16_units():
    text = "Ein 😀 Satz. Noch einer!"
    body = analyze_body(text, ["INSULT"], span_annotations=True)
    reply = StubService().answer(ANALYZE_PATH, {}, json.dumps(body).encode())
    spans = json.loads(reply.body)["attributeScores"]["INSULT"]["spanScores"]
    assert [(span["begin"], span["end"]) for span in spans] == [(0, 13), (13, 24)]
    assert spans[1]["score"]["value"] == pseudo_score("Noch einer!", "INSULT")


def test_it_takes_the_key_as_header_or_parameter(serve):
    ask = serve(StubService(key="secret"))
    assert ask(headers={"x-goog-api-key": "secret"}).status_code == 200
    assert ask(params={"key": "secret"}).status_code == 200
    refused = ask(headers={"X-Goog-Api-Key": "other"})
    assert (refused.status_code, refused.json()["error"]["status"]) == (400, "INVALID_ARGUMENT")


def test_every_fault_is_what_it_says(serve):
    service = StubService(lambda text, attempt: Fault(FaultKind(text), 0.05) if text in list(FaultKind) else None)
    ask = serve(service)
    limited = ask(FaultKind.RATE_LIMIT)
    assert (limited.status_code, limited.headers["Retry-After"]) == (429, "0.05")
    assert limited.json()["error"]["status"] == "RESOURCE_EXHAUSTED"
    assert ask(FaultKind.SERVER_ERROR).status_code == 500
    assert ask(FaultKind.SLOW).status_code == 200
    with pytest.raises(requests.ConnectionError):
        ask(FaultKind.DROPPED)
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        ask(FaultKind.TRUNCATED)
    with pytest.raises(requests.JSONDecodeError):
        ask(FaultKind.GARBAGE).json()
    assert list(ask(FaultKind.MISSING_ATTRIBUTE).json()["attributeScores"]) == list(ATTRIBUTES[1:])
    assert "attributeScores" not in ask(FaultKind.MISSING_SCORES).json()
    assert len(ask("no fault").json()["attributeScores"]) == 8
    assert service.calls == {**dict.fromkeys(FaultKind, 1), "no fault": 1}


def test_a_slow_answer_is_a_timeout_for_the_impatient(serve):
    ask = serve(StubService(first_faults(Fault(FaultKind.SLOW, 60))))
    with pytest.raises(requests.ReadTimeout):
        ask("text", timeout=0.1)
    assert ask("text").status_code == 200


def test_faults_follow_their_script():
    drop, error = Fault(FaultKind.DROPPED), Fault(FaultKind.SERVER_ERROR)
    script = first_faults(drop, error)
    assert [script("text", attempt) for attempt in range(4)] == [drop, error, None, None]
    script = random_faults(0.3, [drop, error])
    drawn = [script(f"text {i}", attempt) for i in range(1000) for attempt in range(2)]
    assert drawn == [
        random_faults(0.3, [drop, error])(f"text {i}", attempt) for i in range(1000) for attempt in range(2)
    ]
    assert [drawn.count(fault) / 2000 for fault in (drop, error, None)] == pytest.approx([0.15, 0.15, 0.7], abs=0.03)
    assert not any(random_faults(0, [drop])(f"text {i}", 0) for i in range(100))
