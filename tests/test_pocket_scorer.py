"""The bundled scorer: its form, its recipe's parts, and how it is compared with Perspective."""

import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from rectify.errors import CheckpointError, InvalidArgumentError, UnknownAttributeError
from rectify.evaluation.agreement import agreement
from rectify.pocket import scorer as recipe
from rectify.pocket.texts import pieces
from rectify.scoring import ATTRIBUTES, Reason
from rectify.scoring.pocket import PocketScorer, ScorerConfig

TEXTS = ["You are an idiot", "have a nice day, all of you", "Nice!", "day " * 200]


@pytest.fixture(scope="module")
def make_scorer():
    def make(max_length=recipe.MAX_LENGTH, batch_size=256):
        torch.manual_seed(0)
        model = recipe.small_encoder()
        for parameter in model.parameters():
            parameter.data.mul_(3)
        tokenizer = recipe.train_tokenizer(TEXTS)
        return PocketScorer(ScorerConfig(list(ATTRIBUTES), max_length=max_length), model, tokenizer, batch_size)

    return make


def test_a_batch_is_scored_as_each_text_alone_in_its_order(make_scorer):
    scorer = make_scorer()
    together = scorer.score(TEXTS, ATTRIBUTES)
    assert together.reasons == (None,) * 4
    alone = np.concatenate([scorer.score([text], ATTRIBUTES).values for text in TEXTS])
    assert together.values == pytest.approx(alone, abs=1e-6)
    assert make_scorer(batch_size=2).score(TEXTS, ATTRIBUTES).values == pytest.approx(alone, abs=1e-6)
    assert together.values.std(axis=0).min() > 1e-4


def test_threads_may_score_at_once(make_scorer):
    scorer, batches = make_scorer(), [[text * count for text in TEXTS] for count in range(1, 9)]
    assert scorer.reentrant
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda texts: scorer.score(texts, ATTRIBUTES).values, batches))
    for texts, values in zip(batches, together, strict=True):
        assert np.array_equal(values, scorer.score(texts, ATTRIBUTES).values)


def test_a_text_without_a_word_has_a_reason_and_an_unknown_attribute_is_refused(make_scorer):
    scorer = make_scorer()
    scores = scorer.score(["", "fine", " \n", "\ud800"])
    assert scores.reasons == (Reason.COMMENT_EMPTY, None, Reason.COMMENT_EMPTY, Reason.INVALID_UNICODE)
    assert np.isnan(scores["TOXICITY"]).tolist() == [True, False, True, True]
    with pytest.raises(UnknownAttributeError, match="SPAM"):
        scorer.score(["fine"], ["SPAM"])
    assert scorer.score([]).values.shape == (0, 1)


def test_a_long_text_is_as_bad_as_its_worst_window(make_scorer):
    scorer = make_scorer(max_length=8)
    text = "you are an idiot and have a nice day, all of you, nice day"
    windows, owners = scorer._windows([text])
    assert len(windows) > 2
    assert set(owners) == {0}
    assert all(len(window) <= 8 for window in windows)
    with torch.no_grad():
        each = [scorer.model(input_ids=torch.tensor([window])).logits.sigmoid()[0] for window in windows]
    assert scorer.raw_scores([text])[0] == pytest.approx(torch.stack(each).amax(0).numpy(), abs=1e-6)


def test_saved_and_loaded_it_scores_alike_and_its_revision_follows_weights_and_calibration(make_scorer, tmp_path):
    scorer = make_scorer()
    scorer.model.to(torch.bfloat16).to(torch.float32)  # as it is saved
    scorer.save_pretrained(tmp_path / "a")
    loaded = PocketScorer.from_pretrained(tmp_path / "a")
    assert loaded.score(TEXTS, ATTRIBUTES).values == pytest.approx(scorer.score(TEXTS, ATTRIBUTES).values, abs=1e-6)
    scorer.config.calibration["TOXICITY"] = [[0.0, 1.0], [0.2, 0.4]]
    scorer.save_pretrained(tmp_path / "b")
    bent = PocketScorer.from_pretrained(tmp_path / "b")
    assert bent.revision != loaded.revision == PocketScorer.from_pretrained(tmp_path / "a").revision
    assert bent.score(TEXTS)["TOXICITY"] == pytest.approx(0.2 + 0.2 * loaded.score(TEXTS)["TOXICITY"], abs=1e-6)
    assert (bent.score(TEXTS, ["INSULT"]).values == loaded.score(TEXTS, ["INSULT"]).values).all()


def test_what_is_no_scorer_is_refused(make_scorer, tmp_path):
    with pytest.raises(CheckpointError, match="scorer_config"):
        PocketScorer.from_pretrained("pocket")
    make_scorer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "scorer_config.json").read_text())
    (tmp_path / "scorer_config.json").write_text(json.dumps(config | {"attributes": ["TOXICITY"]}))
    with pytest.raises(CheckpointError, match="outputs"):
        PocketScorer.from_pretrained(tmp_path)
    with pytest.raises(InvalidArgumentError, match="attributes"):
        ScorerConfig([])


# --- the recipe


def test_pieces_are_runs_of_words():
    text = " ".join(f"w{number}" for number in range(500))
    found = pieces([text], 22, 10, seed=1)
    assert len(found) == 10
    assert all(piece in text and 1 <= len(piece.split()) <= 22 for piece in found)
    assert found == pieces([text], 22, 10, seed=1)


def test_calibration_brings_scores_to_the_scale_of_the_reference(make_scorer):
    scorer = make_scorer()
    texts = [f"{word} {number}" for number in range(60) for word in ("day", "idiot", "nice all of")]
    raw = scorer.raw_scores(texts)
    truth = 1 / (1 + np.exp(1 - 0.5 * np.log(raw / (1 - raw))))  # a logistic map of each attribute
    truth[3, 1] = np.nan
    recipe.calibrate(scorer, list(zip(texts, truth.tolist(), strict=True)))
    found = scorer.score(texts, ATTRIBUTES).values
    known = ~np.isnan(truth)
    assert np.abs(found - truth)[known].max() < 0.02


# --- agreement


def test_agreement_with_a_reference():
    rng = np.random.default_rng(0)
    theirs = rng.random(1000)
    ours = np.clip(theirs + rng.normal(0, 0.05, 1000), 0, 1)
    ours[:3], theirs[5:7] = np.nan, np.nan
    both = ~np.isnan(ours) & ~np.isnan(theirs)
    figures = agreement(ours, theirs)
    assert figures["n"] == 995
    assert figures["unscored"] == 3
    assert figures["pearson"] == pytest.approx(np.corrcoef(ours[both], theirs[both])[0, 1])
    toxic = theirs[both] >= 0.5
    higher = (ours[both][toxic][:, None] > ours[both][~toxic]).mean()
    assert figures["auc"] == pytest.approx(higher, abs=1e-3)
    assert figures["share_reference"] == pytest.approx(toxic.mean())
    assert len(figures["tenths"]) == 10
    assert figures["tenths_error"] < 0.03


def test_agreement_where_nothing_is_known():
    assert agreement(np.full(3, np.nan), np.array([0.1, np.nan, 0.3])) == {"n": 0, "unscored": 2}
