"""What people put in place of words: counted, smoothed, saved, and used to fill gaps."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rectify.builders.masking import MASK, Span, mask_spans, masked_words
from rectify.cli import main
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.methods.base import Base
from rectify.rephrasing.causal_filler import CausalFiller
from rectify.rephrasing.load import check_filler
from rectify.rephrasing.sentences import Sentence
from rectify.rephrasing.substitutions import Edit, Substitutions, SubstitutionsConfig, split_words

SENTENCES = [
    Sentence("this bad one is here", ("this one is here", "this poor one is here")),
    Sentence("a bad one is not here !", ("a poor one is not here !",)),
    Sentence("what a bad", ("what a pity",)),
    Sentence("that awful bad thing works now", ("that thing works now",)),
    Sentence("one two three", ("quite another text",)),
]


@pytest.fixture(scope="module")
def known():
    return Substitutions.learn(SENTENCES)


def test_edits_are_those_of_aligned_words(known):
    assert known.edits == {
        Edit("a", "bad", "", "pity"): 1,
        Edit("a", "bad", "one", "poor"): 1,
        Edit("that", "awful bad", "thing", ""): 1,
        Edit("this", "bad", "one", ""): 1,
        Edit("this", "bad", "one", "poor"): 1,
    }
    assert known.config.training == {"rewrites": 6, "aligned": 5, "edits": 5}


def slow(edits, prior, put, removed, before, after):
    """The definition, by going through all edits."""

    def count(**wanted):
        return sum(n for edit, n in edits.items() if all(getattr(edit, name) == word for name, word in wanted.items()))

    value = max(count(put=put) / count(), 1e-4)
    value = (count(removed=removed, put=put) + prior * value) / (count(removed=removed) + prior)
    left, right = {"before": before, "removed": removed}, {"removed": removed, "after": after}
    seen = count(**left, put=put) + count(**right, put=put)
    return (seen + prior * value) / (count(**left) + count(**right) + prior)


@given(
    st.dictionaries(st.builds(Edit, *[st.sampled_from(["", "a", "b"])] * 4), st.integers(1, 9), min_size=1),
    st.floats(0.1, 50),
    st.lists(st.sampled_from(["a", "b"]), min_size=3, max_size=3),
    st.sampled_from(["", "a", "b", "never"]),
)
def test_probabilities_are_those_of_the_definition(edits, prior, place, put):
    before, removed, after = place
    one = Substitutions(edits, SubstitutionsConfig(prior=prior))
    (found,) = one.log_probability([put.upper()], removed.upper(), f"b a {before} ", f" {after} a")
    assert found == pytest.approx(math.log(slow(edits, prior, put, removed, before, after)))
    proposals = one.proposals(removed, before, after)
    assert set(proposals) == {edit.put for edit in edits if edit.removed == removed}
    values = one.log_probability(proposals, removed, before, after)
    assert values == sorted(values, reverse=True)
    assert one.proposals(removed, before, after, limit=1) == proposals[:1]


def test_of_unknown_words_the_last_counts_and_marks_alone_are_nothing(known):
    assert known.proposals("quite bad", "this ", " one") == known.proposals("bad", "quite", "one")
    assert known.proposals("awful bad", "that", "thing") == [""]
    assert known.proposals("unheard", "a", "b") == []
    assert known.log_probability([" !", ""], "bad", "a", "one")[0] == known.log_probability([""], "bad", "a", "one")[0]
    assert split_words("You f*ck!  Sh1t, ÄRGER.") == ["you", "f*ck", "!", "sh1t", ",", "ärger", "."]


def test_saved_and_loaded_through_the_command(tmp_path, capsys):
    lines = ["toxic\tneutral1\tneutral2", *("\t".join([one.text, *one.references]) for one in SENTENCES)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    files = ["--train_files", str(tmp_path / "pairs.tsv"), "--output_dir", str(tmp_path / "k")]
    assert main(["train", "substitutions", *files]) == 0
    assert "5 sentences; 5 of 6 rewrites keep enough of their words; 5 edits" in capsys.readouterr().err
    loaded = Substitutions.from_pretrained(tmp_path / "k")
    expected = Substitutions.learn(SENTENCES)
    assert loaded.edits == expected.edits
    assert loaded.digest == expected.digest
    assert loaded.digest != Substitutions(expected.edits, SubstitutionsConfig(prior=1.0)).digest
    assert list(loaded.config.training["files"]) == [str(tmp_path / "pairs.tsv")]


def test_what_cannot_be_used_is_refused(tmp_path, known):
    with pytest.raises(InvalidArgumentError, match="there is none"):
        Substitutions.learn(SENTENCES[-1:])
    for bad in ({"prior": 0}, {"min_ratio": 2}, {"max_words": 0}, {"format_version": 99}):
        with pytest.raises(InvalidArgumentError, match=next(iter(bad))):
            SubstitutionsConfig(**bad)
    with pytest.raises(CheckpointError, match="rectify train substitutions"):
        Substitutions.from_pretrained(tmp_path)
    known.save_pretrained(tmp_path)
    path = tmp_path / "substitutions.jsonl"
    whole = path.read_text()
    row = json.loads(whole.splitlines()[0])
    for wrong in (whole[:-9], json.dumps(row | {"count": 0}), json.dumps({"count": 1}), ""):
        path.write_text(wrong)
        with pytest.raises((CheckpointError, InvalidArgumentError)):
            Substitutions.from_pretrained(tmp_path)


def test_a_filler_is_named_with_them():
    check_filler("causal:pocket,substitutions=folder", "rectify:pocket-q")
    with pytest.raises(InvalidArgumentError, match="gives 'words', which it has not: its parameters are substitutions"):
        check_filler("causal:pocket,words=folder", "rectify:pocket-q")


# --- what was masked


@given(st.text("ab <", max_size=20), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 20)), max_size=3))
def test_masked_words_put_back_give_the_text(text, pairs):
    spans = [Span(min(pair), max(pair), 1.0) for pair in pairs if max(pair) <= len(text)]
    masked = mask_spans(text, spans)
    words = masked_words(text, masked)
    assert len(words) == masked.count(MASK)
    for each in words:
        masked = masked.replace(MASK, each, 1)
    assert masked == text


def test_masked_words_of_another_text_are_refused():
    assert masked_words("a b a b", f"{MASK} b a {MASK}") == ["a", "b"]
    assert masked_words("as is", "as is") == []
    for masked in (f"x {MASK}", f"a {MASK} x", f"a b{MASK}", "b", f"a {MASK} b {MASK}"):
        with pytest.raises(InvalidArgumentError, match="masked is"):
            masked_words("a b", masked)


# --- in a filler


def test_a_filler_puts_what_people_put(model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    decoder = Base().bind(model, tokenizer, {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0})

    def filler(put, **changes):
        edits = {Edit("t41", "t90", "t42", put): 50, Edit("", "other", "", "t5"): 1}
        return CausalFiller(
            model, tokenizer, decoder, lambda texts: [0.0] * len(texts), "tiny", draws=2,
            substitutions=Substitutions(edits), **changes,
        )  # fmt: skip

    masked, original = f"t40 t41 {MASK} t42 t43", "t40 t41 T90 t42 t43"
    one = filler("t66 t67", substitution_weight=100.0)
    assert one.fill([masked], 0, [original]) == ["t40 t41 T66 t67 t42 t43"]
    assert one.fill([masked] * 2, 0, [original.lower()] * 2) == ["t40 t41 t66 t67 t42 t43"] * 2
    (text,) = filler("", substitution_weight=100.0).fill([masked], 0, [original])
    assert text.split() == ["t40", "t41", "t42", "t43"]
    # what is not known, or without weight, changes nothing
    plain = CausalFiller(model, tokenizer, decoder, lambda texts: [0.0] * len(texts), "tiny", draws=2)
    assert one.fill([masked], 0) == plain.fill([masked], 0, [original])
    assert one.name != plain.name != filler("").name != one.name
