"""Scorers that need no service: word lists, text classifiers, detectors, detoxify, and how they are named."""

import sys
import types

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification

from rectify.detectors import ToxicityClassifier
from rectify.errors import CheckpointError, InvalidArgumentError, MissingExtraError, UnknownAttributeError
from rectify.scoring import Reason
from rectify.scoring.classifiers import DetectorScorer, HfScorer
from rectify.scoring.keywords import KeywordScorer
from rectify.scoring.labels import attribute_of, outputs_by_attribute
from rectify.scoring.load import load_scorer

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TEXTS = ["t5 t6 t2", "", "t7", "t8 t9 t4 t5 " * 6, " \n", "\ud800", "t5 t6"]
REASONS = (None, Reason.COMMENT_EMPTY, None, None, Reason.COMMENT_EMPTY, Reason.INVALID_UNICODE, None)
JIGSAW = ["toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate"]


# ---------------------------------------------------------------------------------------------------------------------
# Word lists


@pytest.fixture
def keywords(tmp_path):
    """`keywords(*terms)`: a scorer of these."""

    def make(*terms):
        (tmp_path / "words").write_text("\n".join(terms) + "\n\n", encoding="utf-8")
        return load_scorer(f"keywords:{tmp_path / 'words'}")

    return make


def test_terms_match_as_whole_words_in_any_case(keywords):
    scorer = keywords("ass", "Blast it", "@55", "a**", "straße", "as", "café", " ")
    hits = ["What an ASS!", "you ass's", "blast\n it", "(@55)", "a** of", "STRASSE", "cafe\u0301", "as"]
    misses = ["class", "assess", "blast, it", "x@55", "@555", "aa", "cafes", "_as", "ass1"]
    scores = scorer.score([*hits, *misses], ("PROFANITY", "TOXICITY"))
    assert scores["TOXICITY"].tolist() == scores["PROFANITY"].tolist() == [1.0] * len(hits) + [0.0] * len(misses)


def test_a_large_list_finds_what_a_search_for_each_term_finds(keywords):
    terms = [f"{a}{b}{c}" for a in "abc" for b in ("", "a", " b", "-") for c in ("c", "cc", "+")]
    scorer = keywords(*terms)
    texts = [f"{a}{b} {c}" for a in ("a", "bac", "x") for b in ("c", "cc", "-c", "+") for c in ("b", "c+", "bcc")]
    expected = [float(any(is_whole(term, text) for term in terms)) for text in texts]
    assert 0 < sum(expected) < len(expected)
    assert scorer.score(texts)["TOXICITY"].tolist() == expected


def is_whole(term, text):
    for start in range(len(text) - len(term) + 1):
        end = start + len(term)
        bounds = (start == 0 or not text[start - 1].isalnum()) and (end == len(text) or not text[end].isalnum())
        if text[start:end] == term and bounds:
            return True
    return False


def test_blank_and_broken_texts_have_a_reason_and_no_zero(keywords):
    scores = keywords("ass").score(TEXTS)
    assert scores.reasons == REASONS
    assert np.isnan(scores.values[:, 0]).tolist() == [reason is not None for reason in REASONS]


def test_only_toxicity_and_profanity_are_a_word_lists(keywords):
    with pytest.raises(UnknownAttributeError, match="'INSULT'"):
        keywords("ass").score(["a"], ("INSULT",))


def test_the_revision_is_of_the_terms(keywords):
    first = keywords("b", "A", "b").revision
    assert keywords("a", "B").revision == first
    assert keywords("a").revision != first


def test_terms_of_a_table_by_their_severity(tmp_path):
    path = tmp_path / "words.csv"
    path.write_text('text,severity_rating\n"mild, word",1\nharsh,2.5\n')
    texts = ["a mild, word", "a harsh one"]
    assert load_scorer(f"keywords:{path}").score(texts)["TOXICITY"].tolist() == [1.0, 1.0]
    severe = load_scorer(f"keywords:{path}", min_severity=2)
    assert severe.score(texts)["TOXICITY"].tolist() == [0.0, 1.0]
    assert severe.revision != KeywordScorer(path).revision
    path.write_text("text\nharsh\n")
    assert KeywordScorer(path).score(texts)["TOXICITY"].tolist() == [0.0, 1.0]
    with pytest.raises(InvalidArgumentError, match="line 2: severity is None"):
        KeywordScorer(path, min_severity=2)
    path.write_text("word\nharsh\n")
    with pytest.raises(InvalidArgumentError, match="no column 'text'"):
        KeywordScorer(path)


def test_a_list_as_people_bring_it(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffmild\rharsh\u2028word\r".encode())
    assert KeywordScorer(tmp_path / "a.txt").score(["so mild", "harsh", "harsh word"])["TOXICITY"].tolist() == [1, 0, 1]
    for name, content, said in (
        ("a.csv", "text\nnan\n", "line 2: 'nan' stands where a term should be"),
        ("b.csv", "text\nmild, word\n", "line 2: 2 cells, more than the 1"),
        ("c.txt", "mild\n" + "[" * 100_000, "line 2: a term of 100000 characters"),
        ("d.txt", "mild\na\0b", "line 2: a NUL"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(InvalidArgumentError, match=f"keywords '.*{name}', {said}"):
            KeywordScorer(tmp_path / name)


def test_a_list_without_terms_or_a_file_is_refused(tmp_path, keywords):
    with pytest.raises(InvalidArgumentError, match="holds no term"):
        keywords(" ", "")
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        KeywordScorer(tmp_path / "absent")
    (tmp_path / "words").write_bytes(b"\xff\n")
    with pytest.raises(InvalidArgumentError, match="UTF-8"):
        KeywordScorer(tmp_path / "words")


# ---------------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize(
    ("label", "attribute"),
    [
        ("toxic", "TOXICITY"),
        ("toxicity", "TOXICITY"),
        ("severe-toxic", "SEVERE_TOXICITY"),
        ("Severe Toxicity", "SEVERE_TOXICITY"),
        ("obscene", "PROFANITY"),
        ("identity_hate", "IDENTITY_ATTACK"),
        ("sexual_explicit", "SEXUALLY_EXPLICIT"),
        ("FLIRTATION", "FLIRTATION"),
        ("hate", None),
        ("neutral", None),
        ("LABEL_1", None),
    ],
)
def test_labels_by_perspectives_names(label, attribute):
    assert attribute_of(label) == attribute


@pytest.mark.parametrize(
    ("labels", "names", "says"),
    [
        (["nothate", "hate"], None, "labels are 'nothate', 'hate', and none is known"),
        (["LABEL_0", "LABEL_1"], {"LABEL_2": "TOXICITY"}, "LABEL_2=TOXICITY: give a label of the model"),
        (["LABEL_0", "LABEL_1"], {"LABEL_1": "HATE"}, "LABEL_1=HATE"),
        (["toxic", "toxicity"], None, "'toxic' and 'toxicity' both mean TOXICITY"),
    ],
)
def test_labels_that_say_nothing_are_refused_by_name(labels, names, says):
    with pytest.raises(InvalidArgumentError, match=says):
        outputs_by_attribute(labels, names)


# ---------------------------------------------------------------------------------------------------------------------
# Text classifiers


@pytest.fixture(scope="module")
def classifier(make_tokenizer, tmp_path_factory):
    """`classifier(labels, problem_type, seed)`: the folder of a random one."""

    def make(labels, problem_type=None, seed=0):
        folder = tmp_path_factory.mktemp("classifier")
        torch.manual_seed(seed)
        config = BertConfig(
            vocab_size=97, max_position_embeddings=16, initializer_range=0.5, id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)}, problem_type=problem_type, **SIZES,
        )  # fmt: skip
        BertForSequenceClassification(config).save_pretrained(folder)
        make_tokenizer().save_pretrained(folder)
        return str(folder)

    return make


def logits(folder, text):
    """As the model gives them for one text of `t5 t6 …`."""
    model = BertForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        return model(torch.tensor([[int(word[1:]) for word in text.split()][:16]])).logits[0].double()


@pytest.mark.parametrize(
    ("labels", "problem_type", "names", "function", "outputs"),
    [
        (JIGSAW, "multi_label_classification", None, torch.sigmoid, {"TOXICITY": 0, "PROFANITY": 2, "THREAT": 3}),
        ([*JIGSAW, "male", "female"], None, None, torch.sigmoid, {"IDENTITY_ATTACK": 5}),
        (["neutral", "toxic"], None, None, lambda logits: logits.softmax(-1), {"TOXICITY": 1}),
        (["LABEL_0", "LABEL_1"], None, {"LABEL_1": "INSULT"}, lambda logits: logits.softmax(-1), {"INSULT": 1}),
        (["toxic"], None, None, torch.sigmoid, {"TOXICITY": 0}),
    ],
)
def test_scores_are_the_models_own(classifier, labels, problem_type, names, function, outputs):
    folder = classifier(labels, problem_type)
    scorer = HfScorer(folder, device="cpu", batch_size=2, labels=names)
    scores = scorer.score(TEXTS, tuple(outputs))
    assert scores.reasons == REASONS
    for row, text in enumerate(TEXTS):
        if REASONS[row] is None:
            expected = function(logits(folder, text))[list(outputs.values())]
            assert scores.values[row] == pytest.approx(expected.tolist(), abs=1e-5)


def test_an_attribute_that_a_model_lacks_is_refused(classifier):
    scorer = load_scorer(f"hf:{classifier(['neutral', 'toxic'])}", device="cpu")
    assert scorer.attributes == ("TOXICITY",)
    with pytest.raises(UnknownAttributeError, match="FLIRTATION"):
        scorer.score(["t5"], ("FLIRTATION",))


def test_the_revision_of_a_local_model_is_of_its_weights(classifier):
    revisions = [HfScorer(classifier(JIGSAW, seed=seed), device="cpu").revision for seed in (0, 0, 1)]
    assert revisions[0] == revisions[1] != revisions[2]


@pytest.mark.parametrize(
    ("labels", "problem_type", "says"),
    [(["nothate", "hate"], None, "'nothate', 'hate'"), (["toxicity"], "regression", "is a regression")],
)
def test_models_of_something_else_are_refused(classifier, labels, problem_type, says):
    with pytest.raises(InvalidArgumentError, match=says):
        HfScorer(classifier(labels, problem_type), device="cpu")


def test_a_model_that_was_never_trained_to_classify_is_refused(tmp_path, make_tokenizer):
    config = BertConfig(
        vocab_size=97, id2label={0: "neutral", 1: "toxic"}, label2id={"neutral": 0, "toxic": 1}, **SIZES
    )
    BertForMaskedLM(config).save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="lacks the weights"):
        HfScorer(str(tmp_path), device="cpu")
    with pytest.raises(CheckpointError, match="absent"):
        load_scorer("hf:absent/model")


# ---------------------------------------------------------------------------------------------------------------------
# Detectors


def test_a_detector_is_a_scorer(tmp_path, make_model, make_tokenizer):
    make_model("llama").save_pretrained(tmp_path / "backbone")
    make_tokenizer().save_pretrained(tmp_path / "backbone")
    classifier = ToxicityClassifier.from_backbone(str(tmp_path / "backbone"), max_length=24)
    classifier.save_pretrained(tmp_path / "detector")
    scorer = load_scorer(f"detector:{tmp_path / 'detector'}", device="cpu")
    assert isinstance(scorer, DetectorScorer)
    assert (scorer.name, scorer.attributes) == (f"detector:{tmp_path / 'detector'}", ("TOXICITY",))
    scores = scorer.score(TEXTS)
    assert scores.reasons == REASONS
    usable = [text for text, reason in zip(TEXTS, REASONS, strict=True) if reason is None]
    expected = ToxicityClassifier.from_pretrained(tmp_path / "detector").probabilities(usable)
    assert scores["TOXICITY"][~np.isnan(scores["TOXICITY"])] == pytest.approx(expected, abs=1e-5)
    assert load_scorer(f"detector:{tmp_path / 'detector'}", device="cpu").revision == scorer.revision
    classifier.config.max_length = 3
    classifier.save_pretrained(tmp_path / "shorter")
    assert load_scorer(f"detector:{tmp_path / 'shorter'}", device="cpu").revision != scorer.revision


# ---------------------------------------------------------------------------------------------------------------------
# Detoxify, and the names of scorers


def test_detoxify_is_loaded_when_it_first_scores(monkeypatch):
    made = []

    class Detoxify:
        def __init__(self, model_type, device):
            made.append((model_type, device))

        def predict(self, texts):
            return {label: [len(text) / 100 for text in texts] for label in ("toxicity", "obscene", "sexual_explicit")}

    monkeypatch.setitem(sys.modules, "detoxify", types.SimpleNamespace(Detoxify=Detoxify))
    monkeypatch.setattr("rectify.scoring.detoxify_scorer.version", lambda name: "0.5.4")
    scorer = load_scorer("detoxify:unbiased")
    assert (scorer.name, scorer.revision, made) == ("detoxify:unbiased", "detoxify 0.5.4", [])
    scores = scorer.score(["a", "", "bcd"], ("SEXUALLY_EXPLICIT", "PROFANITY"))
    assert made == [("unbiased", "cpu")]
    assert scores.values[[0, 2]].tolist() == [[0.01, 0.01], [0.03, 0.03]]
    assert scores.reasons == (None, Reason.COMMENT_EMPTY, None)
    assert "SEXUALLY_EXPLICIT" not in load_scorer("detoxify:original").attributes
    with pytest.raises(InvalidArgumentError, match="'nonsense': give one of original"):
        load_scorer("detoxify:nonsense")


def test_detoxify_that_is_not_installed_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "detoxify", None)
    with pytest.raises(MissingExtraError, match=r"rectify-lm\[detoxify\]"):
        load_scorer("detoxify:original")


@pytest.mark.parametrize(
    ("spec", "options", "says"),
    [
        ("nonsense", {}, "scorer is 'nonsense': give one of pocket, detector:PATH"),
        ("", {}, "scorer is ''"),
        ("hf", {}, "give hf:ID"),
        ("keywords:", {}, "give keywords:FILE"),
        ("stub:x", {}, "give stub"),
        ("pocket:", {}, "give pocket"),
        ("stub", {"device": "cpu"}, "device is given"),
    ],
)
def test_names_of_no_scorer_are_refused(spec, options, says):
    with pytest.raises(InvalidArgumentError, match=says):
        load_scorer(spec, **options)


def test_options_reach_the_scorer():
    scorer = load_scorer("perspective", endpoint="http://127.0.0.1:1", workers=3)
    assert (scorer.name, scorer.workers) == ("perspective", 3)


def test_pocket_is_the_bundled_one(monkeypatch):
    class PocketScorer:
        @classmethod
        def from_pretrained(cls, name, device=None):
            return name, device

    monkeypatch.setitem(sys.modules, "rectify.scoring.pocket", types.SimpleNamespace(PocketScorer=PocketScorer))
    assert load_scorer("pocket", device="cpu") == ("pocket-scorer", "cpu")
    assert load_scorer("pocket:folder") == ("folder", None)
