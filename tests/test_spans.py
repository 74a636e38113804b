"""The span detector: places in real text, windows, heads, saving; training is in test_train_spans.py."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from span_models import KINDS, TOKENIZERS, save_backbone
from transformers import T5Config, T5ForConditionalGeneration

from rectify.detectors.span_decoding import Span, encode_windows, spans_of, token_labels, word_scores
from rectify.detectors.span_heads import SegmentHead, TokenHead
from rectify.detectors.spans import SpanConfig, SpanDetector
from rectify.errors import CheckpointError, InvalidArgumentError

HEADS = ["token", "segment"]
EMOJI = "🤦🏽\u200d♀️"
ACCENT = "fe\u0301e"
TEXT = f"  You BAD\tone {EMOJI} {ACCENT},  naïve\u00a0— 你好 worst!!\n"
TEXTS = [TEXT, "", "bad", " \n", "a bad, worse one. " * 12, "fine", "the end"]


@pytest.fixture(scope="session")
def backbones(tmp_path_factory):
    folders = {kind: str(tmp_path_factory.mktemp(kind)) for kind in KINDS}
    for kind, folder in folders.items():
        save_backbone(kind, folder)
    return folders


@pytest.fixture(scope="session")
def make_detector(backbones):
    """`make_detector(kind, **settings)`: a detector whose adapter and head do something."""

    def make(kind="encoder", **settings):
        torch.manual_seed(1)
        detector = SpanDetector.from_backbone(backbones[kind], **{"max_length": 24, "overlap": 8, **settings})
        with torch.no_grad():
            for name, parameter in detector.named_parameters():
                if "head" in name or "lora" in name:
                    parameter.add_(0.3 * torch.randn_like(parameter))
        return detector.eval()

    return make


def scores_of(detector, texts, **settings):
    return detector.token_scores(detector.encode(texts), **settings)


# --- places


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_are_places_in_the_text_as_it_is(kind):
    [offsets] = encode_windows(TOKENIZERS[kind](), [TEXT], 100, 0).offsets
    pieces = [TEXT[start:end] for start, end in offsets]
    assert all(piece == piece.strip() for piece in pieces)
    covered = {place for start, end in offsets for place in range(start, end)}
    assert covered == {place for place, character in enumerate(TEXT) if not character.isspace()}
    everything = spans_of(TEXT, offsets, np.ones(len(offsets)), 0.5)
    assert everything == [Span(2, len(TEXT) - 1, 1.0)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("piece", ["BAD", EMOJI, ACCENT, "naïve", "worst", "好"])
def test_a_piece_of_text_is_found_whole(kind, piece):
    [offsets] = encode_windows(TOKENIZERS[kind](), [TEXT], 100, 0).offsets
    start = TEXT.index(piece)
    inside = token_labels(offsets, [(start, start + len(piece))])
    found = spans_of(TEXT, offsets, word_scores(TEXT, offsets, inside.astype(float)), 0.5)
    assert [(span.start, span.end) for span in found] == [(start, start + len(piece))]


def test_spans_are_joined_across_blanks_alone():
    text = "aa bb, cc\t dd"
    offsets = np.array([[0, 2], [3, 5], [5, 6], [7, 9], [11, 13]])
    found = spans_of(text, offsets, np.array([0.9, 0.8, 0.1, 0.5, 0.7]), 0.5)
    assert found == [Span(0, 5, 0.9), Span(7, 13, 0.7)]
    assert spans_of(text, offsets, np.array([0.9, 0.8, 0.1, 0.5, 0.7]), 0.85) == [Span(0, 2, 0.9)]
    # a token without characters, as of a blank alone, makes no span and parts none
    offsets[1] = 2, 2
    assert spans_of(text, offsets[:3], np.ones(3), 0.5)[0] == Span(0, 2, 1.0)


def test_words_are_judged_as_a_whole():
    text = "ab cd-ef 你好"
    offsets = np.array([[0, 1], [1, 2], [3, 4], [4, 5], [5, 6], [6, 8], [9, 10], [10, 11]])
    found = word_scores(text, offsets, np.array([0, 1, 1, 1, 0, 0.25, 0, 1]))
    assert found.tolist() == [0.5, 0.5, 1, 1, 0, 0.25, 0, 1]
    assert word_scores("", np.zeros((0, 2), int), np.zeros(0)).tolist() == []


def test_a_token_is_toxic_from_half_of_its_characters_on():
    offsets = np.array([[0, 2], [2, 2], [3, 7], [8, 12]])
    assert token_labels(offsets, [(0, 2), (5, 9)]).tolist() == [True, False, True, False]
    assert token_labels(offsets, []).tolist() == [False] * 4
    assert token_labels(np.zeros((0, 2), int), [(0, 2)]).tolist() == []


# --- windows


@pytest.mark.parametrize("kind", KINDS)
def test_windows_hold_all_tokens_of_a_long_text(kind):
    tokenizer, long = TOKENIZERS[kind](), TEXT * 6
    whole, cut = (encode_windows(tokenizer, ["bad", long, ""], length, 5) for length in (1000, 20))
    assert len(whole.windows) == 2
    assert len(cut.windows) > 4
    for together, apart in zip(whole.offsets, cut.offsets, strict=True):
        assert np.array_equal(together, apart)
    # as each window says of the tokens that it holds, they are those of the whole text
    ids = np.array(whole.windows[1].input_ids)[whole.windows[1].own]
    for window in cut.windows[1:]:
        held = np.array(window.input_ids)[window.own]
        assert np.array_equal(held, ids[window.first : window.first + window.count])
        assert len(window.input_ids) <= 20


def test_where_windows_overlap_the_one_with_more_context_counts():
    encoded = encode_windows(TOKENIZERS["gpt2"](), ["x" * 10], 6, 4)
    assert [(window.first, window.count) for window in encoded.windows] == [(0, 6), (2, 6), (4, 6)]
    [merged] = encoded.merged([np.full(6, float(number)) for number in range(3)])
    assert merged.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2, 2]


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_windows_change_nothing_where_the_text_fits(make_detector, kind, head):
    narrow, wide = (make_detector(kind, head=head, max_length=length) for length in (24, 150))
    text = TEXT[:12]
    assert scores_of(narrow, [text])[0] == pytest.approx(scores_of(wide, [text])[0], abs=1e-6)
    assert narrow.find([text], 0.3) == wide.find([text], 0.3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gives_the_spans_of_its_texts_in_their_order(make_detector, kind, head):
    detector = make_detector(kind, head=head)
    together = scores_of(detector, TEXTS)
    for text, scores in zip(TEXTS, together, strict=True):
        assert scores_of(detector, [text])[0] == pytest.approx(scores, abs=1e-5)
        assert scores.dtype == np.float32
    for scores, others in zip(together[::-1], scores_of(detector, TEXTS[::-1], batch_size=2), strict=True):
        assert scores == pytest.approx(others, abs=1e-5)
    threshold = float(np.median(np.concatenate(together))) + 1e-3
    found = detector.find(TEXTS, threshold)
    assert found[1] == found[3] == []
    assert found[4]
    for text, spans in zip(TEXTS, found, strict=True):
        places = [place for span in spans for place in span[:2]]
        assert places == sorted(set(places))
        assert all(0 <= span.score <= 1 and text[span.start : span.end].strip() for span in spans)
    assert detector.find(TEXTS) == detector.find(TEXTS, detector.config.threshold)
    assert detector.find([]) == []


def test_dropout_is_off_while_spans_are_found(make_detector):
    detector = make_detector(lora_r=4, lora_dropout=0.5).train()
    assert detector.find(["bad one"], 0.0) == detector.find(["bad one"], 0.0)
    assert detector.training


def test_a_causal_trunk_sees_nothing_of_what_follows(make_detector):
    for head, seen in (("token", 0), ("segment", 1)):
        detector = make_detector("gpt2", head=head)
        one, other = (scores_of(detector, [text])[0] for text in ("abcdefgh", "abcdzzzz"))
        assert one[: 4 - seen] == pytest.approx(other[: 4 - seen], abs=1e-6)
        assert one[4 - seen :] != pytest.approx(other[4 - seen :], abs=1e-3)


def test_bad_arguments_are_refused(make_detector):
    detector = make_detector()
    for bad in (None, 3, "\ud800"):
        with pytest.raises(InvalidArgumentError, match=r"texts\[1\]"):
            detector.find(["bad", bad])
    with pytest.raises(InvalidArgumentError, match="batch_size"):
        detector.find(["bad"], batch_size=0)
    with pytest.raises(InvalidArgumentError, match=r"threshold is 1\.5"):
        detector.find(["bad"], 1.5)


# --- heads


def test_segments_are_of_a_texts_own_tokens_alone():
    torch.manual_seed(0)
    head = SegmentHead(8)
    hidden, own = torch.randn(2, 6, 8), torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1]]).bool()
    head.requires_grad_(False)
    logits = head(hidden, own)
    changed = torch.where(own[..., None], hidden, 7.0)
    assert torch.equal(head(changed, own), logits)
    # a text of the same tokens, without what is around them
    assert torch.allclose(head(hidden[:1, 1:4], own[:1, 1:4])[0], logits[0, 1:5], atol=1e-6)
    weight, bias = head.filter.weight.double(), head.filter.bias.double()
    pair = (weight[..., 0] @ hidden[0, 1].double() + weight[..., 1] @ hidden[0, 2].double() + bias).tanh()
    expected = head.score.weight.double() @ pair + head.score.bias.double()
    assert logits[0, 2].item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_token_is_toxic_where_all_its_segments_are():
    # the published system masks both tokens of a toxic segment, and so a toxic token's neighbours
    head = SegmentHead(4)
    for row, expected in {
        (0, 0, 1, 0): (0, 0, 1, 0),
        (1, 0, 0, 1): (1, 0, 0, 1),
        (0, 1, 1, 0): (0, 1, 1, 0),
        (0, 1, 0, 1): (0, 1, 1, 1),  # between two toxic ones, it cannot be told from them
    }.items():
        labels = torch.tensor([row]).bool()
        targets, counted = head.targets(labels, torch.ones_like(labels))
        assert counted.all()
        assert head.token_logits(targets.float())[0].tolist() == list(expected)
    single, own = torch.tensor([[0, 1, 0]]).bool(), torch.tensor([[0, 1, 0]]).bool()
    targets, counted = head.targets(single, own)
    assert targets.tolist() == counted.tolist() == [[False, True, True, False]]


def test_a_token_head_is_a_linear_map():
    head = TokenHead(4)
    hidden, labels = torch.randn(1, 3, 4), torch.tensor([[True, False, True]])
    assert torch.allclose(head(hidden, labels), hidden @ head.score.weight[0] + head.score.bias)
    assert head.targets(labels, ~labels)[0] is labels


# --- saving and loading


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("lora_r", [0, 4])
def test_what_is_loaded_equals_what_was_saved(make_detector, tmp_path, lora_r, head):
    for kind in KINDS if lora_r else KINDS[:2]:
        detector = make_detector(kind, head=head, lora_r=lora_r)
        detector.config.threshold = 0.3
        first, second = tmp_path / kind, tmp_path / f"{kind}2"
        detector.save_pretrained(first)
        loaded = SpanDetector.from_pretrained(first)
        assert loaded.config == detector.config
        assert not loaded.training
        assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]
        for scores, others in zip(scores_of(loaded, TEXTS), scores_of(detector, TEXTS), strict=True):
            assert scores == pytest.approx(others, abs=1e-4)
        loaded.save_pretrained(second)
        for path in first.rglob("*.*"):
            assert path.read_bytes() == (second / path.relative_to(first)).read_bytes(), path.name
        assert (first / "trunk").exists() != bool(lora_r)
        half = SpanDetector.from_pretrained(first, dtype=torch.bfloat16)
        assert scores_of(half, TEXTS[:1])[0] == pytest.approx(scores_of(loaded, TEXTS[:1])[0], abs=0.2)


def with_config(**changes):
    def change(folder):
        path = folder / "span_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def without_a_weight(folder):
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(dict(list(weights.items())[1:]), folder / "adapter_model.safetensors")


HARM = {
    "no config": lambda folder: (folder / "span_config.json").unlink(),
    "config is cut": lambda folder: (folder / "span_config.json").write_text("{"),
    "config of a later version": with_config(format_version=2),
    "config of another head": with_config(head="segment"),
    "no such head": with_config(head="third"),
    "no backbone": with_config(base_model="nowhere/at/all"),
    "no trunk": with_config(adapter=False),
    "no head": lambda folder: (folder / "head.safetensors").unlink(),
    "no adapter": lambda folder: (folder / "adapter_config.json").unlink(),
    "adapter lacks a weight": without_a_weight,
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_folder_is_refused(make_detector, tmp_path, harm):
    make_detector(lora_r=2).save_pretrained(tmp_path / "d")
    HARM[harm](tmp_path / "d")
    with pytest.raises(CheckpointError) as caught:
        SpanDetector.from_pretrained(tmp_path / "d")
    assert "\n" not in str(caught.value)
    assert str(tmp_path / "d") in str(caught.value)


def test_an_adapter_of_another_trunk_is_refused(make_detector, tmp_path):
    detector = make_detector(lora_r=2)
    detector.config.base_fingerprint = "0"
    detector.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="was trained on weights 0 of"):
        SpanDetector.from_pretrained(tmp_path)
    assert make_detector(lora_r=0).config.base_fingerprint is None  # the trunk is saved too


def test_unusable_backbones_and_settings_are_refused(backbones, tmp_path):
    for settings in (
        {"max_length": 161},
        {"max_length": 10, "overlap": 8},
        {"overlap": -1},
        {"head": "third"},
        {"lora_r": 4, "target_modules": ["nowhere"]},
        {"lora_r": -1},
    ):
        with pytest.raises(InvalidArgumentError, match=list(settings)[-1]) as caught:
            SpanDetector.from_backbone(backbones["encoder"], **settings)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="nothing"):
        SpanDetector.from_backbone(str(tmp_path / "nothing"))
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    T5ForConditionalGeneration(T5Config(vocab_size=97, **sizes)).save_pretrained(tmp_path / "t5")
    TOKENIZERS["llama"]().save_pretrained(tmp_path / "t5")
    with pytest.raises(InvalidArgumentError, match="encoder-decoder"):
        SpanDetector.from_backbone(str(tmp_path / "t5"))
    with pytest.raises(InvalidArgumentError, match="threshold"):
        SpanConfig("pocket", threshold=-0.1)
