"""The server: old clients get what Perspective would give them, everyone their own answer, and nothing is logged."""

import asyncio
import json
import logging
import re
import resource
import socket
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import requests
import uvicorn
from googleapiclient import discovery
from googleapiclient.errors import HttpError

from rectify.errors import InvalidArgumentError, ScoringError, UnavailableError, UnknownAttributeError
from rectify.scoring import serve_command
from rectify.scoring.batching import Batcher, Flow
from rectify.scoring.connections import patient_protocol
from rectify.scoring.perspective import PerspectiveScorer
from rectify.scoring.scores import Reason, Scores, check_attributes, reason_against
from rectify.scoring.server import MAX_BODY, make_app
from rectify.scoring.service import MAX_SPANS
from rectify.scoring.wire import ANALYZE_PATH, SUGGEST_PATH, analyze_body

KEY = "key-that-nobody-must-see"
SECRET = "words-that-nobody-must-see"


def value_of(text, attribute):
    return zlib.crc32(f"{attribute} {text}".encode()) % 1000 / 1000


class FakeScorer:
    """Scores by checksum; `[REASON]` in a text is the reason that it has none, `[crash]` breaks the whole batch."""

    name, revision, attributes = "fake", "1", ("TOXICITY", "INSULT", "THREAT")

    def __init__(self):
        self.batches = []
        self.gate = threading.Event()
        self.gate.set()

    def score(self, texts, attributes=("TOXICITY",)):
        asked = check_attributes(self, attributes)
        self.batches.append((len(texts), asked))
        assert self.gate.wait(10)
        if any("[crash]" in text for text in texts):
            raise ValueError(f"cannot read {texts!r}")
        reasons = []
        for text in texts:
            found = re.search(r"\[([A-Z_]+)\]", text)
            reasons.append(reason_against(text) or (Reason(found[1]) if found else None))
        rows = [
            [np.nan if reason else value_of(text, attribute) for attribute in asked]
            for text, reason in zip(texts, reasons, strict=True)
        ]
        return Scores(np.array(rows), asked, tuple(reasons))


class Running:
    """A server in a thread, for the time of a `with` block."""

    def __init__(self, app, **settings):
        self._socket = socket.create_server(("127.0.0.1", 0), backlog=256)
        config = uvicorn.Config(app, log_config=None, ws="none", **{"http": patient_protocol()} | settings)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self):
        self._thread.start()
        deadline = time.monotonic() + 10
        while not self._server.started and time.monotonic() < deadline:
            time.sleep(0.005)
        return self

    def __exit__(self, *_):
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()
        assert not self._thread.is_alive()

    def post(self, body, path=ANALYZE_PATH, **arguments):
        return requests.post(self.url + path, json=body, timeout=10, **arguments)

    def client(self, key=None):
        url = f"{self.url}/$discovery/rest?version=v1alpha1"
        return discovery.build(
            "commentanalyzer", "v1alpha1", developerKey=key, discoveryServiceUrl=url, static_discovery=False
        )


@pytest.fixture(scope="module")
def scorer():
    return FakeScorer()


@pytest.fixture(scope="module")
def server(scorer):
    with Running(make_app(scorer)) as running:
        yield running


@pytest.fixture(scope="module")
def guarded():
    """A server that wants a key, and logs all it can."""
    app = make_app(FakeScorer(), api_keys=["another", KEY])
    with Running(app, log_level="debug", access_log=True) as running:
        yield running


def error_of(response, code=400):
    assert response.status_code == code
    assert response.headers["Content-Type"] == "application/json; charset=UTF-8"
    error = response.json()["error"]
    assert error["code"] == code
    return error


def score(value):
    return {"value": value, "type": "PROBABILITY"}


# ---------------------------------------------------------------------------------------------------------------------
# Clients


def test_a_plain_post_gets_perspectives_answer(server):
    text = "What kind of idiot name is foo? 😀"
    body = analyze_body(text, ["TOXICITY", "INSULT"]) | {"clientToken": "c"}
    response = server.post(body)
    expected = {
        name: {
            "spanScores": [{"begin": 0, "end": 34, "score": score(value_of(text, name))}],
            "summaryScore": score(value_of(text, name)),
        }
        for name in ("TOXICITY", "INSULT")
    }
    assert response.json() == {
        "attributeScores": expected,
        "languages": ["en"],
        "detectedLanguages": ["en"],
        "clientToken": "c",
    }
    assert response.headers["Content-Type"] == "application/json; charset=UTF-8"


def test_sentences_are_scored_by_themselves_where_spans_are_asked_for(server):
    parts = ["😀 You are kind. ", "You are an idiot! ", "Bye"]
    text = "".join(parts)
    answer = server.post(analyze_body(text, ["TOXICITY"], span_annotations=True)).json()
    found = answer["attributeScores"]["TOXICITY"]
    assert found["summaryScore"] == score(value_of(text, "TOXICITY"))
    assert [span["score"]["value"] for span in found["spanScores"]] == [value_of(part, "TOXICITY") for part in parts]
    assert [(span["begin"], span["end"]) for span in found["spanScores"]] == [(0, 17), (17, 35), (35, 38)]


def test_a_sentence_that_can_have_no_score_has_no_span(server):
    text = "Fine. [COMMENT_EMPTY] here. Fine too."
    failing = analyze_body(text, ["TOXICITY"], span_annotations=True)
    assert error_of(server.post(failing))["details"][0]["errorType"] == "COMMENT_EMPTY"  # the whole has none either


def test_a_text_has_a_bounded_number_of_spans(server):
    answer = server.post(analyze_body("Ha! " * 5000, ["TOXICITY"], span_annotations=True)).json()
    spans = answer["attributeScores"]["TOXICITY"]["spanScores"]
    assert MAX_SPANS / 2 < len(spans) <= MAX_SPANS
    assert (spans[0]["begin"], spans[-1]["end"]) == (0, 20_000)


def test_scores_below_the_threshold_are_left_out(server):
    value = value_of("a text", "TOXICITY")
    for threshold, names in ((value, ["TOXICITY"]), (value + 0.001, None)):
        body = {"comment": {"text": "a text"}, "requestedAttributes": {"TOXICITY": {"scoreThreshold": threshold}}}
        found = server.post(body).json().get("attributeScores")
        assert (found and list(found)) == names


def test_googles_client_works_from_our_discovery_document(server):
    client = server.client()
    body = {"comment": {"text": "You idiot"}, "requestedAttributes": {"TOXICITY": {}}, "languages": ["en"]}
    answer = client.comments().analyze(body=body).execute()
    assert answer["attributeScores"]["TOXICITY"]["summaryScore"] == score(value_of("You idiot", "TOXICITY"))
    suggestion = {
        "comment": {"text": "You idiot"},
        "attributeScores": {"TOXICITY": {"summaryScore": {"value": 1}}},
        "clientToken": "c",
    }
    assert client.comments().suggestscore(body=suggestion).execute()["clientToken"] == "c"
    with pytest.raises(HttpError, match=r"Comment must be non-empty\."):
        client.comments().analyze(body=body | {"comment": {"text": ""}}).execute()


def test_googles_client_may_send_many_calls_in_one(guarded):
    client, found = guarded.client(KEY), {}
    batch = client.new_batch_http_request()
    texts = [*(f"text {number}, “{'é😀' * number}”" for number in range(20)), ""]
    for text in texts:  # as some clients do, with the text as the name of the call
        body = {"comment": {"text": text}, "requestedAttributes": {"TOXICITY": {}}}
        batch.add(client.comments().analyze(body=body), lambda *call: found.update({call[0]: call[1:]}), text + "!")
    batch.execute()
    assert list(found) == [text + "!" for text in texts]
    for text in texts[:-1]:
        answer, error = found[text + "!"]
        assert error is None
        assert answer["attributeScores"]["TOXICITY"]["summaryScore"]["value"] == value_of(text, "TOXICITY")
    assert "Comment must be non-empty." in str(found["!"][1])


def test_a_batch_that_is_none_is_refused(server):
    for kind, content in [("text/plain", b"a"), ("multipart/mixed; boundary=x", b"--x\r\n\r\nno request\r\n--x--")]:
        response = requests.post(server.url + "/batch", data=content, headers={"Content-Type": kind}, timeout=10)
        assert "Failed to parse batch request" in error_of(response)["message"]


def test_our_own_client_agrees_with_the_server(server):
    texts = ["one", "", "two. And three!", "[SERVER_ERROR]"]
    with PerspectiveScorer(endpoint=server.url, rate=1000, retries=1, backoff=0) as client:
        scores = client.score(texts, ("INSULT", "TOXICITY"))
    assert scores.reasons == (None, Reason.COMMENT_EMPTY, None, Reason.SERVER_ERROR)
    assert scores["TOXICITY"][[0, 2]].tolist() == [value_of(texts[0], "TOXICITY"), value_of(texts[2], "TOXICITY")]


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("body", "error_type"),
    [
        (analyze_body("", ["TOXICITY"]), "COMMENT_EMPTY"),
        (analyze_body("a" * 20_481, ["TOXICITY"]), "COMMENT_TOO_LONG"),
        (analyze_body("a", []), "NO_REQUESTED_ATTRIBUTES"),
        (analyze_body("a", ["TOXICITY"], languages=["it"]), "LANGUAGE_NOT_SUPPORTED_BY_ATTRIBUTE"),
        (analyze_body("[LANGUAGE_DETECTION_FAILED]", ["TOXICITY"]), "LANGUAGE_DETECTION_FAILED"),
        (analyze_body("[INVALID_REQUEST]", ["TOXICITY"]), "INVALID_REQUEST"),
        (analyze_body("a", ["FLIRTATION"]), "INVALID_REQUEST"),
        ([], "INVALID_REQUEST"),
    ],
)
def test_a_request_that_cannot_be_answered_gets_perspectives_error(server, body, error_type):
    error = error_of(server.post(body))
    assert error["status"] == "INVALID_ARGUMENT"
    assert error["details"][0]["errorType"] == error_type


@pytest.mark.parametrize(
    ("reason", "code", "status"),
    [
        ("RATE_LIMIT_EXCEEDED", 429, "RESOURCE_EXHAUSTED"),
        ("TIMEOUT", 504, "DEADLINE_EXCEEDED"),
        ("CONNECTION", 503, "UNAVAILABLE"),
        ("SCORE_MISSING", 503, "UNAVAILABLE"),
    ],
)
def test_what_a_scorer_may_give_later_is_an_error_to_try_again_after(server, reason, code, status):
    response = server.post(analyze_body(f"[{reason}]", ["TOXICITY"]))
    assert error_of(response, code)["status"] == status
    assert "attributeScores" not in response.json()


@pytest.mark.parametrize("data", [b"", b"{", b'{"comment": {"text": "\xff"}}', b"[" * 50_000])
def test_malformed_json_gets_googles_error(server, data):
    response = requests.post(server.url + ANALYZE_PATH, data=data, timeout=10)
    error = error_of(response)
    assert error["status"] == "INVALID_ARGUMENT"
    assert error["message"].startswith("Invalid JSON payload received.")


@pytest.mark.parametrize("stream", [False, True])
def test_a_body_above_the_limit_is_refused(server, stream):
    data = b" " * (MAX_BODY + 1)
    response = requests.post(server.url + ANALYZE_PATH, data=iter([data]) if stream else data, timeout=10)
    assert f"exceeds the limit: {MAX_BODY} bytes" in error_of(response, 413)["message"]


def test_the_longest_text_is_answered_even_with_every_character_escaped(server):
    data = json.dumps(analyze_body("é" * 10_240, ["TOXICITY"])).encode("ascii")
    assert requests.post(server.url + ANALYZE_PATH, data=data, timeout=10).status_code == 200


def test_other_paths_and_methods_are_refused_in_json(server):
    assert error_of(requests.get(server.url + "/v1/none", timeout=10), 404)["status"] == "NOT_FOUND"
    assert error_of(requests.get(server.url + "/healthz/", timeout=10), 404)["status"] == "NOT_FOUND"
    assert error_of(requests.get(server.url + "/$discovery/rest?version=v2", timeout=10), 404)
    response = requests.get(server.url + ANALYZE_PATH, timeout=10)
    assert error_of(response, 405)["status"] == "UNIMPLEMENTED"
    assert response.headers["Allow"] == "POST"


def test_keys_are_taken_from_the_query_and_from_the_header(guarded):
    body = analyze_body("a", ["TOXICITY"])
    assert guarded.post(body, params={"key": KEY}).status_code == 200
    assert guarded.post(body, headers={"X-Goog-Api-Key": "another"}).status_code == 200
    for wrong in ("wrong", KEY[:-1], KEY + "a", "é"):
        error = error_of(guarded.post(body, params={"key": wrong}))
        assert error["message"] == "API key not valid. Please pass a valid API key."
        assert error["details"][0]["reason"] == "API_KEY_INVALID"
    assert error_of(guarded.post(body), 403)["status"] == "PERMISSION_DENIED"
    assert error_of(guarded.post({}, SUGGEST_PATH), 403)["status"] == "PERMISSION_DENIED"
    for open_to_all in ("/healthz", "/", "/$discovery/rest?version=v1alpha1"):
        assert requests.get(guarded.url + open_to_all, timeout=10).status_code == 200


def test_each_key_has_its_own_quota_of_each_minute():
    now = [100.0]
    app = make_app(FakeScorer(), api_keys=["a", "b"], quota_per_minute=2, clock=lambda: now[0])
    body = analyze_body("text", ["TOXICITY"])
    with Running(app) as running:
        assert [running.post(body, params={"key": "a"}).status_code for _ in range(2)] == [200, 200]
        now[0] += 20.5
        response = running.post(body, params={"key": "a"})
        error = error_of(response, 429)
        assert response.headers["Retry-After"] == "40"
        assert error["status"] == "RESOURCE_EXHAUSTED"
        assert error["details"][0]["metadata"]["quota_limit_value"] == "2"
        assert running.post(body, params={"key": "b"}).status_code == 200
        now[0] += 39.5
        assert running.post(body, params={"key": "a"}).status_code == 200


def test_other_languages_are_answered_where_the_server_was_told_so():
    def languages_of(app, asked):
        with Running(app) as running:
            return running.post(analyze_body("ciao", ["TOXICITY"], languages=asked)).json().get("languages")

    assert languages_of(make_app(FakeScorer(), languages=("it", "en")), []) == ["it"]
    assert languages_of(make_app(FakeScorer(), languages=None), ["pt"]) == ["pt"]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"attributes": ["FLIRTATION"]}, UnknownAttributeError),
        ({"languages": "en"}, InvalidArgumentError),
        ({"languages": ()}, InvalidArgumentError),
        ({"api_keys": [""]}, InvalidArgumentError),
        ({"api_keys": "key"}, InvalidArgumentError),
        ({"quota_per_minute": 0}, InvalidArgumentError),
        ({"max_batch": 0}, InvalidArgumentError),
        ({"max_delay": -1}, InvalidArgumentError),
        ({"time_limit": 0}, InvalidArgumentError),
        ({"api_keys": ["key with blanks"]}, InvalidArgumentError),
        ({"cors": ["app.example"]}, InvalidArgumentError),
        ({"cors": ["https://app.example/path"]}, InvalidArgumentError),
        ({"cors": ["https://user@app.example"]}, InvalidArgumentError),
        ({"cors": ["https://app.example:port"]}, InvalidArgumentError),
        ({"public_url": "scores.example"}, InvalidArgumentError),
        ({"public_url": "https://scores.example/?a=b"}, InvalidArgumentError),
        ({"public_url": "ftp://scores.example"}, InvalidArgumentError),
    ],
)
def test_impossible_settings_are_refused(arguments, error):
    with pytest.raises(error):
        make_app(FakeScorer(), **arguments)


# ---------------------------------------------------------------------------------------------------------------------
# Secrets


def test_no_text_and_no_key_is_in_any_log_record_or_answer_to_another(guarded, caplog):
    caplog.set_level(logging.DEBUG)
    answers = []
    for text in (SECRET, f"{SECRET} [crash]", f"{SECRET} [SERVER_ERROR]", SECRET * 2000):
        answers.append(guarded.post(analyze_body(text, ["TOXICITY"]), params={"key": KEY}))
    answers.append(requests.post(guarded.url + f"{ANALYZE_PATH}?key={KEY}", data=SECRET, timeout=10))
    answers.append(requests.get(guarded.url + f"/none?key={KEY}", timeout=10))
    answers.append(requests.get(guarded.url + f"/healthz?key={KEY}", timeout=10))
    assert [answer.status_code for answer in answers] == [200, 500, 503, 400, 400, 404, 200]
    # urllib3 logs what this test itself sends
    lines = [caplog.handler.format(record) for record in caplog.records if record.name.partition(".")[0] != "urllib3"]
    assert any("ValueError" in line for line in lines), "the crash is in the log"
    assert any("POST /v1alpha1" in line for line in lines), "the access log is on"
    for said in [*lines, *(answer.text for answer in answers)]:
        assert KEY not in said
        assert SECRET not in said


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def test_every_one_of_many_clients_gets_the_answer_to_its_own_text(server, scorer):
    scorer.batches.clear()

    def call(number):
        names = [["TOXICITY"], ["INSULT", "TOXICITY"], ["TOXICITY", "INSULT"]][number % 3]
        spans = number % 5 == 0
        with requests.Session() as session:
            for turn in range(6):
                text = f"text {number}. And turn {turn}!"
                body = analyze_body(text, names, span_annotations=spans)
                found = session.post(server.url + ANALYZE_PATH, json=body, timeout=10).json()["attributeScores"]
                assert list(found) == names
                for name in names:
                    assert found[name]["summaryScore"]["value"] == value_of(text, name)
                    values = [span["score"]["value"] for span in found[name]["spanScores"]]
                    parts = [f"text {number}. ", f"And turn {turn}!"] if spans else [text]
                    assert values == [value_of(part, name) for part in parts]

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(call, range(24)))
    sizes = [size for size, _ in scorer.batches]
    assert sum(sizes) == 24 * 6 + 2 * 5 * 6
    assert max(sizes) > 3
    assert {asked for _, asked in scorer.batches} == {("TOXICITY",), ("INSULT", "TOXICITY")}


def test_calls_that_wait_are_scored_together_up_to_the_limit():
    async def main():
        scorer = FakeScorer()
        scorer.gate.clear()
        batcher = Batcher(scorer, max_batch=10, max_delay=0)
        calls = [asyncio.create_task(batcher.score([f"{number}", f"{number}b"], ["THREAT"])) for number in range(12)]
        await asyncio.sleep(0.05)
        scorer.gate.set()
        answers = await asyncio.gather(*calls)
        await batcher.close()
        for number, answer in enumerate(answers):
            assert answer["THREAT"].tolist() == [value_of(f"{number}", "THREAT"), value_of(f"{number}b", "THREAT")]
        return [size for size, _ in scorer.batches]

    assert asyncio.run(main()) == [10, 10, 4]


def test_a_call_above_the_limit_is_scored_alone():
    async def main():
        batcher = Batcher(scorer := FakeScorer(), max_batch=2)
        calls = [batcher.score([str(number)] * size, ["THREAT"]) for number, size in enumerate([1, 5, 1])]
        answers = await asyncio.gather(*calls)
        await batcher.close()
        return [size for size, _ in scorer.batches], [len(answer) for answer in answers]

    assert asyncio.run(main()) == ([1, 5, 1], [1, 5, 1])


def test_the_calls_of_one_flow_take_turns_with_those_of_others():
    async def main():
        scorer, order = FakeScorer(), []
        batcher = Batcher(scorer, max_batch=1, max_delay=0)
        flow = Flow()

        async def call(text, flow=None):
            await batcher.score([text], ["THREAT"], flow)
            order.append(text)

        calls = [asyncio.create_task(call(f"many {number}", flow)) for number in range(6)]
        await asyncio.sleep(0)
        calls += [asyncio.create_task(call("one")), asyncio.create_task(call("two"))]
        await asyncio.gather(*calls)
        await batcher.close()
        return order

    order = asyncio.run(main())
    assert {"one", "two"} < set(order[:4])
    assert [text for text in order if text.startswith("many")] == [f"many {number}" for number in range(6)]


@pytest.mark.parametrize("reentrant", [False, True])
def test_long_calls_are_scored_one_by_one_and_beside_short_ones_where_the_scorer_allows_it(reentrant):
    class Gated(FakeScorer):
        def score(self, texts, attributes=("TOXICITY",)):
            self.batches.append(len(texts))
            assert len(texts[0]) < 10_000 or self.gate.wait(10)
            return Scores(np.zeros((len(texts), 1)), ("THREAT",), (None,) * len(texts))

    async def main():
        scorer = Gated()
        scorer.reentrant = reentrant
        scorer.gate.clear()
        batcher = Batcher(scorer)
        long = [asyncio.create_task(batcher.score(["a" * 20_000], ["THREAT"])) for _ in range(3)]
        await asyncio.sleep(0.02)
        short = [asyncio.create_task(batcher.score([text], ["THREAT"])) for text in "ab"]
        done, _ = await asyncio.wait(short, timeout=5 if reentrant else 0.05)
        assert len(done) == (2 if reentrant else 0)
        scorer.gate.set()
        await asyncio.gather(*long, *short)
        await batcher.close()
        return sorted(scorer.batches)

    assert asyncio.run(main()) == [1, 1, 1, 2]


def test_a_failing_batch_reaches_its_own_calls_only(caplog):
    async def main():
        batcher = Batcher(FakeScorer(), max_batch=2, max_delay=0)
        texts = ["a", "b", "[crash]", "c", "d", "e"]
        answers = await asyncio.gather(*(batcher.score([text], ["THREAT"]) for text in texts), return_exceptions=True)
        assert len(await batcher.score(["later"], ["THREAT"])) == 1
        await batcher.close()
        return [isinstance(answer, ScoringError) for answer in answers]

    assert asyncio.run(main()) == [False, False, True, False, False, False]
    assert len(caplog.records) == 1


def test_a_scorer_that_gives_too_few_scores_gives_no_one_anothers():
    class Short(FakeScorer):
        def score(self, texts, attributes=("TOXICITY",)):
            return super().score(texts[1:], attributes)

    async def main():
        batcher = Batcher(Short())
        answers = await asyncio.gather(*(batcher.score([text], ["THREAT"]) for text in "ab"), return_exceptions=True)
        await batcher.close()
        return [type(answer) for answer in answers]

    assert asyncio.run(main()) == [ScoringError, ScoringError]


def test_closing_refuses_what_waits_and_what_comes():
    async def main():
        scorer = FakeScorer()
        scorer.gate.clear()
        batcher = Batcher(scorer, max_batch=1, max_delay=0)
        calls = [asyncio.create_task(batcher.score([text], ["THREAT"])) for text in "abc"]
        await asyncio.sleep(0.02)
        await batcher.close()
        answers = await asyncio.gather(*calls, batcher.score(["d"], ["THREAT"]), return_exceptions=True)
        scorer.gate.set()
        return [type(answer) for answer in answers], len(scorer.batches)

    assert asyncio.run(main()) == ([UnavailableError] * 4, 1)


def test_too_much_waiting_is_refused_and_a_gone_caller_is_not_scored():
    async def main():
        scorer = FakeScorer()
        scorer.gate.clear()
        batcher = Batcher(scorer, max_batch=1, max_delay=0, max_waiting=3)
        calls = [asyncio.create_task(batcher.score(["a"], ["THREAT"]))]
        await asyncio.sleep(0.02)  # it is being scored
        calls += [asyncio.create_task(batcher.score([text], ["THREAT"])) for text in "bcd"]
        await asyncio.sleep(0)
        with pytest.raises(UnavailableError, match="max_waiting"):
            await batcher.score(["e"], ["THREAT"])
        calls[1].cancel()
        scorer.gate.set()
        answers = await asyncio.gather(*calls, return_exceptions=True)
        await batcher.close()
        return [type(answer).__name__ for answer in answers], sum(size for size, _ in scorer.batches)

    assert asyncio.run(main()) == (["Scores", "CancelledError", "Scores", "Scores"], 3)


def test_a_call_that_takes_too_long_is_given_up():
    scorer = FakeScorer()
    scorer.gate.clear()
    with Running(make_app(scorer, time_limit=0.1)) as running:
        error = error_of(running.post(analyze_body("a", ["TOXICITY"])), 504)
        scorer.gate.set()
    assert error["status"] == "DEADLINE_EXCEEDED"


# ---------------------------------------------------------------------------------------------------------------------
# The rest


def test_the_discovery_document_leads_back_to_where_it_was_asked_for(server):
    port = server.url.rpartition(":")[2]
    own, foreign = (f"127.0.0.1:{port}", f"localhost:{port}"), ("scores.example", "localhost", "localhost:1", "a@b", "")
    for host in (*own, *foreign):  # clients send their key to where the document sends them
        url = f"{server.url}/$discovery/rest?version=v1alpha1"
        told = {"Host": host, "X-Forwarded-Host": "scores.example", "X-Forwarded-Proto": "https", "Forwarded": "host=a"}
        document = requests.get(url, headers=told, timeout=10).json()
        assert document["rootUrl"].replace("https:", "http:") == f"http://{host if host in own else own[0]}/"
        schemas = document["schemas"]
        for name in re.findall(r'"\$ref": "(\w+)"', json.dumps(document)):
            assert schemas[name]["id"] == name


def test_health_tells_what_scores(server):
    assert requests.get(server.url + "/healthz", timeout=10).json() == {
        "status": "ok",
        "scorer": {"name": "fake", "revision": "1"},
        "attributes": ["TOXICITY", "INSULT", "THREAT"],
    }


def test_the_page_needs_nothing_from_elsewhere(server, guarded):
    response = requests.get(server.url, timeout=10)
    assert response.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    assert not re.search(r"(?:https?:)?//\w", response.text)
    assert '<html lang="en">' in response.text
    assert 'id="key"' not in response.text
    assert 'id="key"' in requests.get(guarded.url, timeout=10).text


def test_the_command_serves_until_it_is_stopped(monkeypatch, capsys):
    seen = {}

    def serve(server, sockets):
        seen["config"], seen["port"] = server.config, sockets[0].getsockname()[1]

    monkeypatch.setattr(uvicorn.Server, "run", serve)
    monkeypatch.setattr(serve_command, "load_scorer", lambda spec: FakeScorer())
    monkeypatch.setenv(serve_command.KEYS_VARIABLE, "a, b")
    assert serve_command.main(["--port", "0", "--quota", "5"]) == 0
    assert f"http://127.0.0.1:{seen['port']}/" in capsys.readouterr().err
    assert not seen["config"].access_log
    assert serve_command.main(["--host", "0.0.0.0", "--port", "0"]) == 0
    said = capsys.readouterr().err
    assert "anyone" not in said
    assert "--public_url" in said
    assert serve_command.main(["--host", "0.0.0.0", "--port", "0", "--public_url", "http://rectify:8000"]) == 0
    assert "--public_url" not in capsys.readouterr().err
    monkeypatch.delenv(serve_command.KEYS_VARIABLE)
    assert serve_command.main(["--host", "0.0.0.0", "--port", "0"]) == 0
    assert "anyone who reaches 0.0.0.0 may call it" in capsys.readouterr().err


def test_the_command_names_what_it_cannot_use(monkeypatch, capsys):
    monkeypatch.setattr(serve_command, "load_scorer", lambda spec: FakeScorer())
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for arguments, said in (
            (["--port", port], port),
            (["--port", "70000"], "70000"),
            (["--attributes", "FLIRTATION", "--port", "0"], "FLIRTATION"),
            (["--quota", "0", "--port", "0"], "quota_per_minute is 0"),
            (["--host", "", "--port", "0"], "host is ''"),
            (["--host", "no such host", "--port", "0"], "no such host"),
            (["--host", "a" * 70, "--port", "0"], "cannot be listened at"),
            (["--cors", "app.example", "--port", "0"], "app.example"),
            (["--api_key", " ", "--port", "0"], "api_keys"),
        ):
            assert serve_command.main(arguments) == 2
            assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("files", "most", "places", "raised"),
    [
        (256, 10**6, (1024, 1024), 2304),
        (256, resource.RLIM_INFINITY, (1024, 1024), 2304),
        (4096, 4096, (1024, 1024), 4096),
        (resource.RLIM_INFINITY, resource.RLIM_INFINITY, (1024, 1024), resource.RLIM_INFINITY),
        (256, 1024, (384, 384), 1024),
        (100, 100, (8, 8), 100),
    ],
)
def test_there_are_as_many_connections_as_files_may_be_open(files, most, places, raised, monkeypatch):
    limits = [(files, most)]
    monkeypatch.setattr(resource, "getrlimit", lambda what: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda what, given: limits.append(given))
    assert serve_command._places() == places
    assert limits[-1] == (raised, most)


@pytest.mark.parametrize("value", ["", " ", ",", " , "])
def test_a_variable_without_a_key_does_not_open_the_server_to_all(value, monkeypatch, capsys):
    monkeypatch.setattr(serve_command, "load_scorer", lambda spec: FakeScorer())
    monkeypatch.setenv(serve_command.KEYS_VARIABLE, value)
    assert serve_command.main(["--port", "0"]) == 2
    assert f"{serve_command.KEYS_VARIABLE} is set and holds no key" in capsys.readouterr().err


@pytest.mark.parametrize("lacking", ["starlette", "uvicorn"])
def test_the_command_names_the_extra_that_is_lacking(lacking, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, lacking, None)
    for name in ("rectify.scoring.server",) if lacking == "starlette" else ():
        monkeypatch.delitem(__import__("sys").modules, name)
        monkeypatch.setitem(__import__("sys").modules, "starlette.applications", None)
    assert serve_command.main(["--port", "0"]) == 2
    assert "pip install 'rectify-lm[serve]'" in capsys.readouterr().err
