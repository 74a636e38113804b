"""The cache of scores: what it keeps and what not, broken files, and several processes and threads at once."""

import multiprocessing
import os
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np
import pytest

from rectify.errors import CacheError, InvalidArgumentError, RectifyError, UnknownAttributeError, WireError
from rectify.scoring import ATTRIBUTES, Reason, Scores
from rectify.scoring.cache import CachedScorer, ScoreCache
from rectify.scoring.scores import check_attributes
from rectify.scoring.stub import pseudo_score

TWO = ("TOXICITY", "INSULT")


class CountingScorer:
    """Notes what it is asked for; texts that name a reason have no score for it."""

    name, attributes = "counting", ATTRIBUTES

    def __init__(self, revision="1"):
        self.revision, self.calls = revision, []

    def score(self, texts, attributes=("TOXICITY",)):
        asked = check_attributes(self, attributes)
        self.calls.append(list(texts))
        reasons = tuple(next((reason for reason in Reason if f"<{reason}>" in text), None) for text in texts)
        values = [
            [np.nan if reason else pseudo_score(text, attribute) for attribute in asked]
            for text, reason in zip(texts, reasons, strict=True)
        ]
        return Scores(np.array(values).reshape(len(texts), len(asked)), asked, reasons)

    @property
    def asked(self):
        return [text for call in self.calls for text in call]


class StreamingCounter(CountingScorer):
    """Scores one text after another, from the last to the first."""

    def score_stream(self, texts, attributes=("TOXICITY",)):
        for index in reversed(range(len(texts))):
            scores = self.score([texts[index]], attributes)
            yield index, scores.values[0], scores.reasons[0]


@pytest.fixture
def cache(tmp_path):
    with ScoreCache(tmp_path / "sub" / "scores.sqlite") as cache:
        yield cache


@pytest.mark.parametrize("kind", [CountingScorer, StreamingCounter])
def test_a_text_is_scored_once_and_the_order_is_kept(cache, kind):
    texts = ["one", "two", "one", "", "three", "two"]
    scorer = kind()
    cached = CachedScorer(scorer, cache, chunk_size=2)
    expected = CountingScorer().score(texts, TWO)
    for known in (2, 8):  # at first the doubles, then all
        scores = cached.score(texts, TWO)
        assert np.array_equal(scores.values, expected.values, equal_nan=True)
        assert scores.reasons == expected.reasons
        assert scores.attributes == TWO
        assert cached.reused == known
    assert sorted(scorer.asked) == sorted(set(texts))
    assert CachedScorer(scorer, cache).score([], TWO).values.shape == (0, 2)


def test_the_cached_scorer_stands_for_its_scorer(cache):
    cached = CachedScorer(CountingScorer(), cache)
    assert (cached.name, cached.revision, cached.attributes) == ("counting", "1", ATTRIBUTES)
    with pytest.raises(UnknownAttributeError, match="SPAM"):
        cached.score(["a"], ("SPAM",))
    with pytest.raises(InvalidArgumentError, match="chunk_size is 0"):
        CachedScorer(CountingScorer(), cache, chunk_size=0)


def test_it_outlives_the_process_and_tells_revisions_and_attributes_apart(tmp_path):
    path = tmp_path / "scores ?#%.sqlite"
    for scorer, attributes, paid in (
        (CountingScorer(), ("TOXICITY",), 1),
        (CountingScorer(), ("TOXICITY",), 0),
        (CountingScorer(), ("INSULT",), 1),
        (CountingScorer(), TWO, 0),
        (CountingScorer(), (*TWO, "THREAT"), 1),
        (CountingScorer(revision="2"), ("TOXICITY",), 1),
    ):
        with ScoreCache(path) as cache:
            scores = CachedScorer(scorer, cache).score(["a text"], attributes)
            assert scores.values[0].tolist() == [pseudo_score("a text", attribute) for attribute in attributes]
        assert len(scorer.asked) == paid
    assert path.exists()


def test_permanent_reasons_are_kept_and_passing_ones_asked_again(cache):
    scorer = CountingScorer()
    texts = [f"<{reason}>" for reason in Reason]
    for _ in range(2):
        scores = CachedScorer(scorer, cache).score(texts)
        assert list(scores.reasons) == list(Reason)
    assert scorer.calls == [texts, [f"<{reason}>" for reason in Reason if reason.passing]]


def test_the_reason_of_a_request_is_not_blamed_on_each_of_its_attributes(cache):
    scorer = CountingScorer()
    cached = CachedScorer(scorer, cache)
    text = f"<{Reason.LANGUAGE_NOT_SUPPORTED}>"  # by one of the two, and nobody knows by which
    assert cached.score([text], TWO).reasons == cached.score([text], TWO[::-1]).reasons
    assert len(scorer.calls) == 1
    cached.score([text], ("TOXICITY",))
    assert len(scorer.calls) == 2


def test_a_known_score_stays_when_a_further_attribute_cannot_be_had(cache):
    scorer = CountingScorer()
    cache.put(scorer, TWO, [("<TIMEOUT>", np.array([0.25, np.nan]), Reason.SCORE_MISSING)])
    scores = CachedScorer(scorer, cache).score(["<TIMEOUT>"], TWO)
    assert scores.values[0, 0] == 0.25
    assert np.isnan(scores.values[0, 1])
    assert scores.reasons == (Reason.TIMEOUT,)
    assert CachedScorer(scorer, cache).score(["<TIMEOUT>"], TWO[:1]).reasons == (None,)


def test_what_was_handed_over_is_kept_already(cache, tmp_path):
    cached = CachedScorer(StreamingCounter(), cache)
    seen = [index for index, _, _ in islice(cached.score_stream([f"text {i}" for i in range(9)]), 4)]
    assert seen == [8, 7, 6, 5]
    with ScoreCache(cache.path) as other:
        assert len(other) == 4


def test_neither_texts_nor_passing_reasons_are_in_the_file(cache):
    CachedScorer(CountingScorer(), cache).score(
        ["a secret", "<TIMEOUT> secret", "<COMMENT_TOO_LONG> secret", "<INVALID_UNICODE>\ud800"]
    )
    cache.close()
    content = b"".join(file.read_bytes() for file in cache.path.parent.iterdir())
    assert b"COMMENT_TOO_LONG" in content
    assert b"secret" not in content
    assert b"TIMEOUT" not in content


# ---------------------------------------------------------------------------------------------------------------------
# Files that are none


def filled(path):
    with ScoreCache(path) as cache:
        CachedScorer(CountingScorer(), cache).score([f"text {i}" for i in range(2000)], TWO)
    return path.read_bytes()


def other_database(path):
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE users (name)")
    connection.close()
    return path.read_bytes()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda path: b'{"text": "no cache"}\n' * 99, "broken or no SQLite file"),
        (lambda path: filled(path)[:50_000], "broken"),
        (lambda path: (content := filled(path))[:20_000] + b"\x55" * 9000 + content[29_000:], "broken"),
        (other_database, "something else"),
    ],
)
def test_a_file_that_is_no_whole_cache_is_refused_and_left_as_it_is(tmp_path, make, says):
    path = tmp_path / "scores.sqlite"
    content = make(path)
    path.write_bytes(content)
    with pytest.raises(CacheError, match=says) as caught:
        ScoreCache(path)
    assert str(path) in str(caught.value)
    assert isinstance(caught.value, RectifyError)
    assert path.read_bytes() == content


def test_what_the_first_format_may_have_of_proxies_is_asked_again(tmp_path):
    path, scorer = tmp_path / "old.sqlite", CountingScorer()
    texts = [f"<{reason}>" for reason in (Reason.INVALID_REQUEST, Reason.COMMENT_TOO_LONG, Reason.UNPARSED)] + ["fine"]
    with ScoreCache(path) as cache:
        CachedScorer(scorer, cache).score(texts)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 1")
    connection.close()
    for known in ([False, False, True, True], [True] * 4):
        with ScoreCache(path) as cache:
            assert [each.complete for each in cache.get(scorer, texts, ["TOXICITY"])] == known
            CachedScorer(scorer, cache).score(texts)


def test_a_later_format_is_refused(tmp_path):
    filled(tmp_path / "scores.sqlite")
    with sqlite3.connect(tmp_path / "scores.sqlite") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(CacheError, match="format 99"):
        ScoreCache(tmp_path / "scores.sqlite")


def test_places_where_no_file_can_be_are_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="is a folder"):
        ScoreCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot be made"):
        ScoreCache(tmp_path / "file" / "scores.sqlite")


def test_a_file_that_stays_locked_is_an_error_and_nothing_is_waited_for_without_end(tmp_path, monkeypatch):
    monkeypatch.setattr("rectify.sqlite_file.BUSY_TIMEOUT_S", 0.05)
    with ScoreCache(tmp_path / "scores.sqlite") as cache:
        other = sqlite3.connect(cache.path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        with pytest.raises(CacheError, match="another process has locked it"):
            CachedScorer(CountingScorer(), cache).score(["a"])
        other.execute("ROLLBACK")
        other.close()
        assert CachedScorer(CountingScorer(), cache).score(["a"]).reasons == (None,)


# ---------------------------------------------------------------------------------------------------------------------
# Several at once


def fill(path, start):
    """Part of 300 texts, each of which two processes score."""
    with ScoreCache(path) as cache:
        cached = CachedScorer(StreamingCounter(), cache)
        cached.score([f"text {i % 300}" for i in range(start, start + 150)], TWO)


def leave_half_a_transaction(path):
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.execute("PRAGMA cache_size = 1")  # so that pages are written before the end
    connection.execute("BEGIN")
    connection.execute("CREATE TABLE half (text TEXT)")
    connection.executemany("INSERT INTO half VALUES (?)", [["x" * 1000]] * 200)
    os.kill(os.getpid(), signal.SIGKILL)


def test_what_a_killed_process_left_half_written_is_taken_back(tmp_path):
    path = tmp_path / "cache.sqlite"
    with ScoreCache(path) as cache:
        CachedScorer(CountingScorer(), cache).score(["one"])
    process = multiprocessing.get_context("spawn").Process(target=leave_half_a_transaction, args=(path,))
    process.start()
    process.join()
    assert path.with_name("cache.sqlite-journal").stat().st_size
    with ScoreCache(path) as cache:
        counting = CountingScorer()
        CachedScorer(counting, cache).score(["one", "two"])
    assert counting.asked == ["two"]
    with sqlite3.connect(path) as connection:
        assert not connection.execute("SELECT name FROM sqlite_master WHERE name = 'half'").fetchall()


def test_several_processes_fill_one_file(tmp_path):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rectify.scoring.cache", "rectify.scoring.stub"])
    path = tmp_path / "scores.sqlite"
    processes = [context.Process(target=fill, args=(path, start)) for start in (0, 75, 150, 225)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    scorer = CountingScorer()
    with ScoreCache(path) as cache:
        assert len(cache) == 600
        scores = CachedScorer(scorer, cache).score([f"text {i}" for i in range(300)], TWO)
    assert scorer.asked == []
    assert scores["INSULT"].tolist() == [pseudo_score(f"text {i}", "INSULT") for i in range(300)]


def test_several_threads_share_one_cache(cache):
    cached = CachedScorer(StreamingCounter(), cache)
    with ThreadPoolExecutor(8) as threads:
        found = list(
            threads.map(lambda i: cached.score([f"text {i % 5}", f"text {i}"])["TOXICITY"].tolist(), range(80))
        )
    assert found == [[pseudo_score(text, "TOXICITY") for text in (f"text {i % 5}", f"text {i}")] for i in range(80)]
    assert len(cache) == 80


def test_an_error_of_the_scorer_leaves_what_came_before(cache):
    class Refusing(StreamingCounter):
        def score_stream(self, texts, attributes=("TOXICITY",)):
            yield from islice(super().score_stream(texts, attributes), 3)
            raise WireError("API key not valid.")

    with pytest.raises(RectifyError, match="key"):
        CachedScorer(Refusing(), cache).score([f"text {i}" for i in range(9)])
    assert len(cache) == 3
