"""Chat models: a tiny one here, one behind a fake endpoint with faults, and replies that are kept."""

import json
import logging
import re

import pytest
from test_perspective import FakeClock

from rectify.chat import CachedChat, ChatSampling, EndpointChat, LocalChat, ReplyCache, make_chat
from rectify.chat.stub import ChatStub
from rectify.errors import CacheError, ChatError, CheckpointError, InvalidArgumentError, ReplyError
from rectify.scoring.stub import Fault, FaultKind, StubAdapter, StubReply, StubServer, first_faults

ASKED = [{"role": "system", "content": "t5 t6"}, {"role": "user", "content": "t7 t8"}]
KEY = "sk-Secret/+1"
TEMPLATE = "{% for m in messages %}t9 {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}t10{% endif %}"


def make(service, **changes):
    return EndpointChat("http://stub/v1", "m", **{"adapter": StubAdapter(service), "clock": FakeClock(), **changes})


@pytest.fixture(scope="module")
def folder(make_model, make_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TEMPLATE
    make_model("llama").save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


# --- here


def test_a_local_model_replies_by_its_template_alike_for_equal_seeds(folder):
    chat = make_chat(f"local:{folder},max_new_tokens=6,top_p=1,device=cpu")
    replies = [chat.reply(ASKED, seed) for seed in (1, 2, 1)]
    assert replies[0] == replies[2] != replies[1]
    assert all(len(reply.split()) <= 6 for reply in replies)
    greedy = LocalChat(str(folder), sampling=ChatSampling(max_new_tokens=6, temperature=0), device="cpu")
    assert greedy.reply(ASKED, 1) == greedy.reply(ASKED, 2)
    prompt = chat._tokenizer("t9 t5 t6 t9 t7 t8 t10", return_tensors="pt")
    output = chat._model.generate(**prompt, max_new_tokens=6, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert greedy.reply(ASKED, 1) == chat._tokenizer.decode(output, skip_special_tokens=True)
    with pytest.raises(ReplyError, match="TOO_LONG"):
        chat.reply([{"role": "user", "content": "t5 " * 160}], 0)


def test_a_model_without_a_template_is_refused(run_place):
    with pytest.raises(CheckpointError, match="no chat template"):
        LocalChat(str(run_place / "model"))


# --- behind an endpoint


def test_a_request_is_what_servers_of_chat_completions_take():
    service = ChatStub(lambda messages: f" {len(messages)} ", key=KEY)
    chat = make(service, key=KEY, sampling=ChatSampling(max_new_tokens=9, temperature=0.5, top_p=0.25))
    assert chat.reply(ASKED, 3) == "2"
    assert service.requests == [
        {"model": "m", "messages": ASKED, "max_tokens": 9, "temperature": 0.5, "top_p": 0.25, "seed": 3}
    ]
    assert chat.name == "endpoint:http://stub/v1,model=m,max_new_tokens=9,temperature=0.5,top_p=0.25"


@pytest.mark.parametrize("kind", ["rate_limit", "server_error", "slow", "dropped", "truncated", "garbage"])
def test_what_may_pass_is_tried_again_within_bounds(kind):
    fault = Fault(FaultKind(kind), 300)
    service = ChatStub(faults=first_faults(fault, fault))
    assert make(service).reply(ASKED, 0).startswith("Reply 0.")
    assert service.calls == {"t7 t8": 3}
    service = ChatStub(faults=first_faults(fault, fault))
    with pytest.raises(ReplyError) as caught:
        make(service, retries=1).reply(ASKED, 0)
    assert caught.value.reason.passing
    assert service.calls == {"t7 t8": 2}


def test_a_retry_after_is_waited_for():
    clock = FakeClock()
    service = ChatStub(faults=first_faults(Fault(FaultKind.RATE_LIMIT, 7)))
    begin = clock.now()
    make(service, clock=clock).reply(ASKED, 0)
    assert clock.now() - begin == pytest.approx(7)


def test_the_rate_holds():
    clock = FakeClock()
    begin = clock.now()
    chat = make(ChatStub(), clock=clock, rate=2)
    for seed in range(5):
        chat.reply(ASKED, seed)
    assert clock.now() - begin == pytest.approx(2)


class Fixed:
    def __init__(self, status, body):
        self.reply = status, json.dumps(body).encode()

    def answer(self, target, headers, body):
        return StubReply(*self.reply, sent=len(self.reply[1]))


@pytest.mark.parametrize(
    ("status", "body", "error", "says"),
    [
        (401, {"error": {"message": f"bad {KEY}"}}, ChatError, "key is refused .*CHAT_API_KEY"),
        (404, {"error": {"message": "no model m"}}, ChatError, "no chat completions of the model 'm'.*no model m"),
        (302, {}, ChatError, "base address"),
        (400, {"error": "what?"}, ReplyError, "INVALID_REQUEST, stub answers 400, 'what\\?'"),
        (413, {"error": {"message": "long"}}, ReplyError, "TOO_LONG"),
        (413, [], ChatError, "out of reach .*answers 413"),
        (403, {"detail": "blocked by policy"}, ChatError, "out of reach .*answers 403.*a firewall"),
        (400, {"object": "error", "message": "no", "code": 40303}, ReplyError, "INVALID_REQUEST"),
        (402, {"error": {"message": "pay"}}, ChatError, "refuses .*pay"),
        (200, {"choices": [{"message": {"content": None}}]}, ReplyError, "INVALID_REQUEST"),
        (200, {"choices": []}, ReplyError, "BAD_RESPONSE"),
        (200, {"choices": [{"message": {"content": "hm \ud83d"}}]}, ReplyError, "BAD_RESPONSE"),
    ],
)
def test_what_a_server_refuses_is_said_without_the_key(status, body, error, says):
    with pytest.raises(error, match=says) as caught:
        make(Fixed(status, body), key=KEY).reply(ASKED, 0)
    assert "Secret" not in str(caught.value)


def test_the_key_comes_from_the_environment_and_is_in_no_log_or_error(monkeypatch, caplog):
    monkeypatch.setenv("CHAT_API_KEY", f"{KEY}\n")
    with (
        caplog.at_level(logging.DEBUG),
        StubServer(ChatStub(key=KEY)) as server,
        StubServer(ChatStub(key="x")) as other,
    ):
        chat = make_chat(f"endpoint:{server.url}/v1,model=m,rate=1000,backoff=0.001")
        assert chat.reply(ASKED, 0).startswith("Reply 0.")
        with pytest.raises(ChatError) as caught:
            make_chat(f"endpoint:{other.url},model=m").reply(ASKED, 0)
        make(ChatStub())  # of plain http over a network, which is warned of
    monkeypatch.setenv("CHAT_API_KEY", f"{KEY} x")
    with pytest.raises(InvalidArgumentError, match="key holds a blank") as refused:
        make(ChatStub())
    assert "stub unencrypted" in caplog.text
    for said in (caplog.text, str(caught.value), str(refused.value), repr(chat), chat.name):
        assert not re.search("Secret", said)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("gpt", "give one of local:ID or endpoint:URL,model=NAME"),
        ("local:", "give one of"),
        ("endpoint:http://h", "lacks the model"),
        ("endpoint:http://h?key=Secret,model=m", "endpoint is no plain address"),
        ("endpoint:http://h,model=m,key=Secret", "gives 'key', which it has not"),
        ("endpoint:http://h,key=Secret", "gives 'key', which it has not"),
        ("endpoint:http://Secret@h", "lacks the model"),
        ("http://h,key=Secret", "chat model is 'http': give one of"),
        ("endpoint:http://h,model=m,rate=0", "rate is 0"),
        ("endpoint:http://h,model=m,rat=1", "gives 'rat', which it has not"),
        ("endpoint:http://h,model=m,workers=x", "workers is 'x': give a whole number"),
        ("endpoint:http://h,model=m,top_p=0", "top_p is 0"),
        ("endpoint:http://h,model=m,temperature=-1", "temperature is -1"),
        ("local:x,max_new_tokens=0", "max_new_tokens is 0"),
    ],
)
def test_bad_specs_are_refused_by_name(spec, says):
    with pytest.raises(InvalidArgumentError, match=says) as caught:
        make_chat(spec)
    assert "Secret" not in str(caught.value)


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user"}], [{"role": "tool", "content": "x"}], [{"role": "assistant", "content": "x"}]]
)
def test_what_is_no_conversation_is_refused(messages):
    with pytest.raises(InvalidArgumentError, match="messages"):
        make(ChatStub()).reply(messages, 0)


# --- kept replies


def test_a_known_reply_is_not_asked_for_again(tmp_path):
    service = ChatStub()
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        first = CachedChat(make(service), cache).reply(ASKED, 0)
    with ReplyCache(tmp_path / "replies.sqlite") as cache:
        chat = CachedChat(make(service), cache)
        assert chat.reply(ASKED, 0) == first
        assert (chat.reused, len(service.requests), len(cache)) == (1, 1, 1)
        chat.reply(ASKED, 1)
        chat.reply(ASKED[1:], 0)
        CachedChat(make(service, sampling=ChatSampling(temperature=0)), cache).reply(ASKED, 0)
        assert (chat.reused, len(service.requests), len(cache)) == (1, 4, 4)
        with pytest.raises(ReplyError):
            CachedChat(make(Fixed(400, {"error": "no"})), cache).reply(ASKED, 5)
        assert len(cache) == 4


def test_scores_and_replies_are_kept_in_files_of_their_own(tmp_path):
    from rectify.scoring.cache import ScoreCache

    ScoreCache(tmp_path / "scores.sqlite").close()
    with pytest.raises(CacheError, match="something else"):
        ReplyCache(tmp_path / "scores.sqlite")
