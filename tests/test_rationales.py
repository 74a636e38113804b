"""Rationales of a teacher: what is kept, what is dropped and counted, and what is not asked for again."""

import json
import re

import pytest
from commands import run_command

from rectify.builders.rationales import ENGLISH, STRUCTURED, write_rationales
from rectify.chat import EndpointChat
from rectify.chat.stub import ChatStub
from rectify.cli import main
from rectify.detectors.templates import TEMPLATES
from rectify.errors import InvalidArgumentError
from rectify.scoring.stub import Fault, FaultKind, StubAdapter, StubServer, first_faults

TOXIC = TEMPLATES["toxic"]
ROWS = [(f"text {number}", ("non-toxic", "toxic")[number % 2]) for number in range(8)]


def teacher(messages):
    """Argues against the label of text 1, gives text 2 another one, forgets that of text 3, and mumbles of text 4."""
    asked = messages[-1]["content"]
    if "{" in asked:
        return "unfilled"
    if "argue for?" in asked:
        return next(
            said for word, said in (("nice", "non-toxic"), ("vile", "Toxic."), ("hm", "Who knows")) if word in asked
        )
    number, label = int(re.search(r"text (\d)", asked)[1]), re.search(r"it is '(.*?)'", asked)[1]
    word = "vile" if (label == "toxic") != (number == 1) else "nice"
    return {
        2: "Its words are nice. Label: toxic",
        3: "Its words are vile.",
        4: "Its words are hm. Label: non-toxic",
    }.get(number, f"Words {number} are {word}.\n\nLabel: {label}")


def chat(service, **changes):
    return EndpointChat("http://stub", "m", adapter=StubAdapter(service), backoff=0, **changes)


def test_what_argues_against_its_label_is_dropped_and_counted():
    found = write_rationales(ROWS, chat(ChatStub(teacher)), TOXIC, tries=1)
    assert [record["text"] for record in found.kept] == ["text 0", "text 5", "text 6", "text 7"]
    assert found.kept[1] == {"text": "text 5", "label": "toxic", "rationale": "Words 5 are vile."}
    assert found.reasons == {"argues against": 1, "other label": 1, "malformed": 1, "unclear": 1}
    assert str(found).startswith("4 of 8 kept; 1 dropped: argues against")
    unchecked = write_rationales(ROWS, chat(ChatStub(teacher)), TOXIC, tries=1, check=False)
    assert unchecked.reasons == {"other label": 1, "malformed": 1}


def test_another_seed_may_do_better():
    service = ChatStub(lambda messages: "no" if len(service.requests) % 2 else "vile. Label: toxic")
    found = write_rationales(ROWS[1:2], chat(service), TOXIC, check=False, seed=5)
    assert [request["seed"] for request in service.requests] == [5, 6]
    assert found.kept == [{"text": "text 1", "label": "toxic", "rationale": "vile."}]


def test_what_gets_no_reply_is_counted_by_reason():
    service = ChatStub(teacher, lambda asked, attempt: Fault(FaultKind.SERVER_ERROR) if "text 6" in asked else None)
    found = write_rationales(ROWS, chat(service, retries=1), TOXIC, tries=1)
    assert found.failures == {"SERVER_ERROR": 1}
    assert found.reasons["no reply"] == 1


def test_a_structured_explanation_must_be_whole():
    whole = TEMPLATES["explained"].write(
        "hate", {"explanation": "e", "affected_groups": "a, b", "harmful_words": "w", "reason": "r"}
    )
    for reply, kept in ((whole, 1), (whole[:-1].rstrip(), 0)):
        found = write_rationales([("x {label}", "hate")], chat(ChatStub(lambda _, reply=reply: reply)),
                                 TEMPLATES["explained"], STRUCTURED, tries=1, check=False)  # fmt: skip
        assert len(found.kept) == kept
    assert found.reasons == {"malformed": 1}


def test_bad_arguments_are_refused():
    with pytest.raises(InvalidArgumentError, match="tries is 0"):
        write_rationales(ROWS, chat(ChatStub()), TOXIC, tries=0)
    with pytest.raises(InvalidArgumentError, match=r"rows\[0\] has the label 'hate'"):
        write_rationales([("a", "hate")], chat(ChatStub()), TOXIC, ENGLISH)


def test_the_command_goes_on_after_a_failure_and_pays_for_no_reply_twice(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CHAT_API_KEY", "sk-Secret")
    texts = tmp_path / "texts.csv"
    texts.write_text("comment,class\n" + "".join(f"{text},{number % 2}\n" for number, (text, _) in enumerate(ROWS)))
    output = tmp_path / "rationales.jsonl"
    flags = [
        "--texts",
        texts,
        "--text_column",
        "comment",
        "--label_column",
        "class",
        "--output",
        output,
        "--tries",
        "1",
    ]
    whole = ChatStub(teacher)
    broken = ChatStub(teacher, lambda asked, attempt: Fault(FaultKind.RATE_LIMIT) if "text 7" in asked else None)
    with StubServer(broken) as server, StubServer(whole) as other:
        spec = f"endpoint:{server.url},model=m,retries=0"
        code, _, err = run_command(main, capsys, "build", "rationales", "--teacher", spec, *flags)
        assert code == 3
        assert "no reply: 1 RATE_LIMIT" in err
        assert len(output.read_text().splitlines()) == 3
        known = len(broken.requests) - 1
        broken.faults = first_faults()
        code, _, err = run_command(main, capsys, "build", "rationales", "--teacher", spec, *flags)
        assert code == 0
        assert f"cache: {known} replies were known" in err
        assert "rationales: 4 of 8 kept" in err
        assert len(broken.requests) == known + 3  # the failed one, the same again, and its check
        assert "Secret" not in err + output.read_text()
        same = [*flags[:-3], texts, *flags[-2:]]
        code, _, err = run_command(main, capsys, "build", "rationales", "--teacher", spec, *same)
        assert (code, texts.read_text().startswith("comment,class")) == (2, True)
        assert "is an input as well" in err
        fresh = tmp_path / "fresh.jsonl"
        flags[flags.index(output)] = fresh
        run_command(main, capsys, "build", "rationales", "--teacher", f"endpoint:{other.url},model=m", *flags)
    assert fresh.read_text() == output.read_text()
    dropped = [json.loads(line) for line in (tmp_path / "rationales.jsonl.dropped").read_text().splitlines()]
    assert [record["reason"] for record in dropped] == ["argues against", "other label", "malformed", "unclear"]
