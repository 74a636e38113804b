"""What people put in place of words: counted, smoothed, saved, and used to fill gaps."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from rectify.builders.masking import MASK, Span, mask_spans, masked_words
from rectify.cli import main
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.evaluation.fluency import continuation_nll
from rectify.hub import checkpoint_folder
from rectify.methods.base import Base
from rectify.rephrasing.causal_filler import CausalFiller
from rectify.rephrasing.load import check_filler
from rectify.rephrasing.sentences import Sentence
from rectify.rephrasing.substitutions import Change, Edit, Substitutions, SubstitutionsConfig
from rectify.rephrasing.words import split_words

SENTENCES = [
    Sentence("this bad one is here", ("this one is here", "this poor one is here")),
    Sentence("a bad one is not here !", ("a poor one is not here !",)),
    Sentence("what a bad", ("what a pity",)),
    Sentence("he had a bad", ("he had a pity",)),
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
    assert known.config.training == {"rewrites": 7, "aligned": 5, "edits": 5}


def test_a_last_mark_that_is_left_out_is_no_change():
    known = Substitutions.learn([Sentence("this thing there is just bad .", ("this thing there is just wrong",))])
    assert known.edits == {Edit("just", "bad", ".", "wrong"): 1}
    known = Substitutions.learn([Sentence("this thing there is just bad .", ("this thing there is just wrong !",))])
    assert known.edits == {Edit("just", "bad", ".", "wrong"): 1}
    known = Substitutions.learn([Sentence("that thing is just ****", ("that thing is just wrong",))])
    assert known.edits == {Edit("just", "****", "", "wrong"): 1}
    with pytest.raises(InvalidArgumentError, match="there is none"):
        Substitutions.learn([Sentence("that thing works !", ("that thing works",))])


def seen_from(edit):
    """All of what an edit says: before, removed, after, change."""
    words = [edit.before, *edit.removed.split(), edit.after]
    return [
        (words[start - 1], " ".join(words[start:end]), words[end],
         Change(edit.put, " ".join(words[1:start]), " ".join(words[end:-1])))
        for start in range(1, len(words) - 1)
        for end in range(start + 1, len(words))
    ]  # fmt: skip


def slow(edits, prior, change, removed, before, after):
    """The definition, by going through all edits."""
    rows = [(*row, count) for edit, count in edits.items() for row in seen_from(edit)]

    def count(left=None, word=None, right=None, what=None):
        wanted = (left, word, right, what)
        return sum(
            row[-1] for row in rows if all(each in (None, cell) for each, cell in zip(wanted, row, strict=False))
        )

    value = max(count(what=change) / count(), 1e-4)
    value = (count(word=removed, what=change) + prior * value) / (count(word=removed) + prior)
    seen = count(before, removed, what=change) + count(word=removed, right=after, what=change)
    return (seen + prior * value) / (count(before, removed) + count(word=removed, right=after) + prior)


def test_an_edit_is_known_from_each_of_its_words():
    known = Substitutions({Edit("she", "gives a damn", "about", "cares"): 3, Edit("a", "damn", "car", ""): 1})
    assert known.proposals("damn", "she gives a", "about me") == [Change("cares", "gives a"), Change("")]
    assert known.proposals("damn", "give a", "about me") == [Change("")]
    assert known.proposals("gives", "she", "a damn") == [Change("cares", "", "a damn")]
    assert known.proposals("gives a damn", "she", "about me") == [Change("cares")]
    assert known.proposals("gives a damn", "", "") == [Change("cares")]


words_of = st.lists(st.sampled_from(["a", "b"]), min_size=1, max_size=3).map(" ".join)
edge = st.sampled_from(["", "a", "b"])


@given(
    st.dictionaries(st.builds(Edit, edge, words_of, edge, edge), st.integers(1, 9), min_size=1),
    st.floats(0.1, 50),
    st.lists(st.sampled_from(["a", "b"]), min_size=3, max_size=3),
    st.builds(Change, st.sampled_from(["", "a", "b", "never"]), edge, edge),
)
def test_probabilities_are_those_of_the_definition(edits, prior, place, change):
    before, removed, after = place
    one = Substitutions(edits, SubstitutionsConfig(prior=prior))
    around = removed.upper(), f"b a {before} ", f" {after} a"
    (found,) = one.log_probability([change], *around)
    assert found == pytest.approx(math.log(slow(edits, prior, change, removed, before, after)))
    proposals = one.proposals(*around)
    assert set(proposals) == {
        change
        for edit in edits
        for _, word, _, change in seen_from(edit)
        if word == removed
        and f" b a {before}".endswith(f" {change.before}" if change.before else "")
        and f"{after} a ".startswith(f"{change.after} " if change.after else "")
    }
    values = one.log_probability(proposals, *around)
    assert values == sorted(values, reverse=True)
    assert one.proposals(*around, limit=1) == proposals[:1]


def test_of_unknown_words_the_last_counts_and_marks_alone_are_nothing(known):
    assert known.proposals("quite bad", "this ", " one") == known.proposals("bad", "quite", "one")
    assert known.proposals("awful bad", "that", "thing") == [Change("")]
    assert known.proposals("unheard", "a", "b") == []
    assert not known.knows("unheard")
    assert known.knows("quite BAD!")
    nothing, marks = known.log_probability([Change(""), Change.to(" !")], "bad", "a", "one")
    assert nothing == marks
    assert Change.to(' "Poor  THING," ') == Change("poor thing")
    for marked in ("bad!", "(bad)", "such a bad !"):
        assert known.proposals(marked, "a", "one") == known.proposals("bad", "a", "one")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("You f*ck!  Sh1t, ÄRGER.", ["you", "f*ck", "!", "sh1t", ",", "ärger", "."]),
        ("don’t re\u0301gler", ["don’t", "re\u0301gler"]),
        ("हिन्दी है", ["हिन्दी", "है"]),
        ("İstanbul", ["i\u0307stanbul"]),
        (" \n", []),
    ],
)
def test_words_stay_whole(text, words):
    assert split_words(text) == words
    assert split_words(" ".join(words)) == words


def test_saved_and_loaded_through_the_command(tmp_path, capsys):
    lines = ["toxic\tneutral1\tneutral2", *("\t".join([one.text, *one.references]) for one in SENTENCES)]
    (tmp_path / "pairs.tsv").write_text("\n".join(lines))
    files = ["--train_files", str(tmp_path / "pairs.tsv"), "--output_dir", str(tmp_path / "k")]
    assert main(["train", "substitutions", *files]) == 0
    assert "6 sentences; 5 of 7 rewrites keep enough of their words; 5 edits" in capsys.readouterr().err
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
    path.write_text(f"{whole}\n{json.dumps(row)}\n\n")  # by hand
    edited = Substitutions.from_pretrained(tmp_path)
    assert edited.edits == known.edits | {Edit(**{k: v for k, v in row.items() if k != "count"}): row["count"] + 1}
    changes = ({"count": 0}, {"count": 1.5}, {"removed": ""}, {"put": "BAD"}, {"before": None}, {"more": 1})
    for wrong in (whole[:-9], json.dumps({"count": 1}), "", *(json.dumps(row | change) for change in changes)):
        path.write_text(wrong)
        with pytest.raises(CheckpointError, match="rectify train substitutions"):
            Substitutions.from_pretrained(tmp_path)


def test_a_filler_is_named_with_them(tmp_path, known):
    known.save_pretrained(tmp_path)
    check_filler(f"causal:pocket,substitutions={tmp_path}", "rectify:pocket-q")
    with pytest.raises(CheckpointError, match="rectify train substitutions"):
        check_filler(f"causal:pocket,substitutions={tmp_path.parent}", "rectify:pocket-q")
    for wrong in ("causal:pocket,substitutions=", "causal:pocket,substitutions", "causal:,substitutions=a"):
        with pytest.raises(InvalidArgumentError, match="substitutions=FOLDER"):
            check_filler(wrong, "rectify:pocket-q")
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


@pytest.fixture(scope="module")
def fill_with(model, make_tokenizer):
    """`fill_with(edits, substitution_weight)`: a filler; `edits` may be `None`."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"
    decoder = Base().bind(model, tokenizer, {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0})

    def of(edits, weight=100.0):
        known = edits and Substitutions(edits | {Edit("", "other", "", "t5"): 1})
        more = {"substitutions": known, "substitution_weight": weight}
        return CausalFiller(model, tokenizer, decoder, lambda texts: [0.0] * len(texts), "tiny", draws=2, **more)

    return of


def test_a_filler_puts_what_people_put(fill_with):
    masked, original = f"t40 t41 {MASK} t42 t43", "t40 t41 T90 t42 t43"
    one, nothing = (fill_with({Edit("t41", "t90", "t42", put): 50}) for put in ("t66 t67", ""))
    assert one.fill([masked], 0, [original]) == ["t40 t41 T66 t67 t42 t43"]
    assert one.fill([masked] * 2, 0, [original.lower()] * 2) == ["t40 t41 t66 t67 t42 t43"] * 2
    (text,) = nothing.fill([masked], 0, [original])
    assert text.split() == ["t40", "t41", "t42", "t43"]
    # what is not known changes nothing
    plain = fill_with(None)
    unseen = original.replace("T90", "t89")
    assert one.fill([masked], 0) == plain.fill([masked], 0, [original]) == one.fill([masked], 0, [unseen])
    assert len({one.name, plain.name, nothing.name}) == 3


@pytest.mark.parametrize(
    ("removed", "put", "masked", "expected"),
    [
        ("t41 t90", "t66", f"t40 T41 {MASK} t42", "t40 T66 t42"),
        ("t40 t41 t90", "", f"t40 t41 {MASK} t42", "t42"),
        ("t90 t42", "t66", f"t41 {MASK} t42 t43", "t41 t66 t43"),
        ("t90 t42", "t66", f"t41 {MASK} t42", "t41 t66"),
        ("t90 t42", "", f"{MASK} t42 t43", "t43"),
        ("t41 t90 t42", "", f"t40 t41 {MASK} t42 t43 {MASK} t44", "t40 t43 t44"),
        ("t90 t42", "", f"t40 t41 {MASK} t42 {MASK} t43", "t40 t41 t43"),
    ],
)
def test_a_change_may_take_the_words_beside_a_gap(fill_with, removed, put, masked, expected):
    one = fill_with({Edit("", removed, "", put): 50})
    (text,) = one.fill([masked], 0, [masked.replace(MASK, "t90")])
    assert text.split() == expected.split()
    both = one.fill([f"t1 {MASK} t2 t3", masked], 0, ["t1 t91 t2 t3", masked.replace(MASK, "t90")])
    assert both[1] == text


def test_likelihoods_of_changes_are_those_of_whole_texts(fill_with, model):
    """Of each candidate, from what all of them leave of the beginning, to the same place."""
    one = fill_with({Edit("t40", "t41 t90 t42", "t43", "t66"): 1, Edit("t41", "t90", "t42", "t67"): 1}, 0.0)
    seen, measured = [], one._log_likelihood
    one._log_likelihood = lambda *given: seen.append((given[1], measured(*given))) or seen[-1][1]
    one.fill([f"t39 t40 t41 {MASK} t42 t43 t44"], 0, ["t39 t40 t41 t90 t42 t43 t44"])
    ((fillings,), (values,)) = seen[0]
    assert {(filling.words.strip(), filling.before > 0) for filling in fillings} >= {("t66", True), ("t67", False)}
    for filling, value in zip(fillings, values, strict=True):
        words = filling.words if filling.before else f"t41 {filling.words} t42"
        tail = one.tokenizer.encode(f"{words} t43 t44")
        nll = continuation_nll(model, [one.tokenizer.encode("t39 t40")], [tail]).nll
        assert value == pytest.approx(-nll.item(), rel=1e-5)


@pytest.fixture(scope="module")
def of_pieces(make_model):
    """A filler whose tokenizer takes words apart, of a tiny model."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder("pocket"), padding_side="left")
    model = make_model("llama", vocab_size=8192, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    decoder = Base().bind(model, tokenizer, {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0})
    edits = {Edit("", "quite damn", "unwise", "considerably"): 1, Edit("", "damn unwise", "of", ""): 1}
    edits |= {Edit("istanbul".replace("i", "i̇", 1), "damn", "", "i̇stanbul"): 1}
    more = {"substitutions": Substitutions(edits), "substitution_weight": 0.0}
    return CausalFiller(model, tokenizer, decoder, lambda texts: [0.0] * len(texts), "tiny", draws=2, **more)


TAIL = " unwise of you all to go there on that day, or so they said; nobody knows, and nobody ever asked about it"


@pytest.mark.parametrize(
    ("head", "after"), [("", []), ('"', ['"']), ("that was ", ["that was"]), ("that was quite ", ["that was"])]
)
def test_texts_of_all_candidates_end_at_the_same_place(of_pieces, head, after):
    seen, measured = [], of_pieces._log_likelihood
    of_pieces._log_likelihood = lambda *given: seen.append((*given, measured(*given))) or seen[-1][2]
    try:
        of_pieces.fill([head + MASK + TAIL], 0, [head + "damn" + TAIL])
    finally:
        del of_pieces._log_likelihood
    (((gap,), (fillings,), (values,)),) = seen
    ids = of_pieces._ids
    begin = ids(after[0]) if after else [of_pieces._begin]
    end = " ".join(TAIL.split()[:12])
    assert len({filling.after for filling in fillings}) == 2
    for filling, value in zip(fillings, values, strict=True):
        text = gap.filled(filling)
        text = text[len(after[0]) if after else 0 : text.index(end.rsplit("day,")[1]) + len(end.rsplit("day,")[1])]
        assert text.endswith(end[-12:])
        nll = continuation_nll(of_pieces.model, [begin], [ids(text)]).nll
        assert value == pytest.approx(-nll.item(), rel=1e-5)


def test_letters_that_change_their_length_are_found(of_pieces):
    (text,) = of_pieces.fill([f"İstanbul {MASK} yesterday"], 0, ["İstanbul damn yesterday"])
    assert text.startswith("İstanbul")
    assert text.endswith("yesterday")
