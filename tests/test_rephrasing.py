"""Fillers: what they put into gaps, trying again until it is safe, and the figures of rewrites against human ones."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertModel, PreTrainedTokenizerFast

from rectify.builders.masking import MASK
from rectify.detectors.span_decoding import Span
from rectify.errors import InvalidArgumentError, ReplyError, TrajectoryError
from rectify.evaluation.chrf import chrf
from rectify.evaluation.fluency import continuation_nll
from rectify.evaluation.rewriting import measure_rewrites, rewrite, table
from rectify.methods.base import Base
from rectify.methods.rectification import Static
from rectify.rephrasing.causal_filler import CausalFiller
from rectify.rephrasing.chat_filler import ChatFiller
from rectify.rephrasing.filler import rephrase
from rectify.rephrasing.sentences import read_sentences
from rectify.rephrasing.seq2seq_filler import Seq2SeqFiller
from rectify.scoring.scores import Scores
from rectify.sentence_encoder import SentenceEncoder

SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
MASKED = [f"t40 t41 {MASK} t42 t43", f"{MASK} t50 t51", f"t60 t61 {MASK}", f"t70 {MASK} t71 t72 {MASK} t73"]


def no_toxicity(texts):
    return np.zeros(len(texts))


# --- trying until it is safe


class Script:
    """Gives what is written down for each attempt."""

    name = "script"

    def __init__(self, *attempts):
        self.attempts, self.asked = attempts, []

    def fill(self, masked, attempt, originals=None):
        self.asked.append(list(masked))
        assert [text.lower() for text in originals] == list(masked) or MASK in masked[0]
        return [self.attempts[attempt].get(text) for text in masked]


def length(texts):
    return np.array([np.nan if text == "?" else len(text) / 10 for text in texts])


def test_what_is_not_safe_is_tried_again():
    filler = Script(
        {"a": "fine", "b": "much too bad", "c": None, "d": "?", "e": f"{MASK}", "f": " "},
        {"b": "ok", "c": "terrible", "d": "?", "e": "yes"},
        {"c": "bad bad", "f": "no"},
    )
    found = rephrase(list("ABCDEF"), list("abcdef"), filler, length, attempts=3)
    assert [(one.text, one.attempts, one.reason) for one in found] == [
        ("fine", 1, None),
        ("ok", 2, None),
        (None, 3, "unsafe"),
        (None, 3, "unfilled"),
        ("yes", 2, None),
        ("no", 3, None),
    ]
    assert filler.asked == [list("abcdef"), list("bcdef"), list("cdf")]
    assert found[2].toxicity == 0.7
    with pytest.raises(InvalidArgumentError, match="attempts is 0"):
        rephrase(["A"], ["a"], filler, length, attempts=0)


def test_the_gate_asks_for_likeness_to_the_original():
    filler = Script({"a": "near", "b": "far"}, {"b": "off"})

    def similarity(texts, others):
        assert {text.isupper() for text in texts} == {True}
        return np.array([0.9 if other == "near" else 0.1 for other in others])

    found = rephrase(["A", "B"], ["a", "b"], filler, length, 2, similarity=similarity, min_similarity=0.5)
    assert [(one.text, one.similarity, one.reason) for one in found] == [("near", 0.9, None), (None, 0.1, "dissimilar")]


# --- a causal model


@pytest.fixture(scope="module")
def filler(model, make_tokenizer):
    """`filler(method, toxicity, temperature, words, **changes)`; with `words`, never with nothing."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"

    def of(method=None, toxicity=no_toxicity, temperature=1.0, words=False, **changes):
        decoder = (method or Base()).bind(model, tokenizer, SAMPLING | {"temperature": temperature})
        one = CausalFiller(model, tokenizer, decoder, toxicity, "tiny", **{"draws": 4} | changes)
        if words:
            candidates = one._candidates
            one._candidates = lambda *given: [[some for some in row if some.words] for row in candidates(*given)]
        return one

    return of


def test_gaps_are_filled_and_the_rest_is_as_it_was(filler):
    one = filler(words=True)
    for masked, text in zip(MASKED, one.fill(MASKED, 0), strict=True):
        around = [part.split() for part in masked.split(MASK)]
        words = text.split()
        assert words[: len(around[0])] == around[0]
        assert words[len(words) - len(around[-1]) :] == around[-1]
        gaps = masked.count(MASK)
        kept = sum(map(len, around))
        assert kept + gaps <= len(words) <= kept + 2 * gaps
        assert "  " not in text


def test_a_batch_gives_what_single_texts_give_and_attempts_differ(filler):
    one = filler(temperature=50.0, words=True)
    together = one.fill(MASKED, 0)
    assert [one.fill([text], 0)[0] for text in MASKED] == together
    assert one.fill(MASKED, 0) == together
    assert one.fill(MASKED, 1) != together
    assert filler(temperature=50.0, words=True, seed=1).fill(MASKED, 0) != together


def test_the_likeliest_candidate_is_taken(filler, model):
    """Of all candidates, by a likelihood that is computed for each alone."""
    one = filler(reward_weight=0.0)
    seen, candidates = [], one._candidates
    one._candidates = lambda *given: seen.append(candidates(*given)) or seen[-1]
    (text,) = one.fill(MASKED[:1], 0)
    words = [filling.words for filling in seen[0][0]]
    assert "" in words
    encode = one.tokenizer.encode
    heads, tails = [encode("t40 t41")] * len(words), [encode(f"{some} t42 t43") for some in words]
    nll = continuation_nll(model, heads, tails).nll
    assert text.split() == ["t40", "t41", *words[int(nll.argmin())].split(), "t42", "t43"]


def test_the_reward_decides_too(filler):
    plain = filler(words=True).fill(MASKED[:1], 0)[0]
    word = plain.split()[2]

    def toxicity(texts):
        return np.array([0.99 if word in text.split() else 0.0 for text in texts])

    found = filler(toxicity=toxicity, words=True, reward_weight=1e3).fill(MASKED[:1], 0)[0]
    assert word not in found.split()


def test_a_text_that_is_too_long_is_not_filled(filler, model):
    one = filler()
    longest = model.config.max_position_embeddings
    before, after = (f"t1 {'t2 ' * longest}{MASK} t3", f"t1 {MASK} t3 {'t2 ' * longest}")
    found = one.fill([before, MASKED[0], f"{MASK} {before}", after], 0)
    assert [text is None for text in found] == [True, False, True, False]
    assert found[1] == one.fill(MASKED[:1], 0)[0]


def test_words_are_drawn_under_the_method(filler, run_place):
    """A table of risks under which nothing but some words may be drawn."""
    method = Static(path=str(run_place / "static"), rule="mask", threshold=0.5)
    free, ruled = Counter(), Counter()
    for attempt in range(4):
        for counts, one in ((free, filler(words=True)), (ruled, filler(method, words=True))):
            counts.update(one.fill(MASKED[:1], attempt)[0].split()[2:-2])
    risk = np.random.default_rng(3).random(97)
    assert all(risk[int(word[1:])] <= 0.5 for word in ruled)
    assert any(risk[int(word[1:])] > 0.5 for word in free)


# --- other fillers


def test_an_encoder_decoder_fills_every_text_in_batches():
    names = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *(f"t{number}" for number in range(40))]
    inner = Tokenizer(WordLevel({name: place for place, name in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    special = {"bos_token": "<s>", "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, mask_token="<mask>", **special)
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(vocab_size=len(names), init_std=0.5, **sizes))
    filler = Seq2SeqFiller(model, tokenizer, "tiny")
    masked = ["t1 <MASK> t2", "t3 t4 t5 t6 <MASK>"]
    found = filler.fill(masked, 0)
    assert filler.fill(masked, 0) == found
    assert filler.fill(masked, 1) != found
    assert all(text is None or len(text.split()) <= 12 for text in found)
    assert [filler.fill([text], 0)[0] for text in masked] == found
    assert filler.fill(["t1 " * 70 + MASK, masked[0], "t1 " * 58 + MASK], 0) == [None, found[0], None]
    assert filler.fill([], 0) == []
    tokenizer.mask_token = None
    with pytest.raises(InvalidArgumentError, match="without a mask token"):
        Seq2SeqFiller(model, tokenizer, "tiny")


class Chat:
    """Replies by a function of text and seed."""

    name, workers = "scripted", 2

    def __init__(self, reply):
        self.answer = reply

    def reply(self, messages, seed):
        assert [message["role"] for message in messages] == ["system", "user"]
        return self.answer(messages[-1]["content"], seed)


def test_a_chat_model_answers_with_the_text():
    from rectify.scoring.scores import Reason

    def answer(text, seed):
        if "fails" in text:
            raise ReplyError(Reason.TIMEOUT)
        if "lazy" in text:
            return text
        return f'"{text.replace(MASK, f"word{seed}")}"'

    filler = ChatFiller(Chat(answer), seed=3)
    masked = [f"a {MASK} b", f"fails {MASK}", f"lazy {MASK}", f'"quoted {MASK}"']
    assert filler.fill(masked, 1) == ["a word4 b", None, None, '""quoted word4""']


# --- rewrites


def slow_chrf(text, references):
    """By the definition, with lists of n-grams."""
    best = 0.0
    for reference in references:
        precisions, recalls = [], []
        for n in range(1, 7):
            parts = ["".join(each.split()) for each in (text, reference)]
            own, other = ([part[place : place + n] for place in range(len(part) - n + 1)] for part in parts)
            if own and other:
                both = sum(min(own.count(gram), other.count(gram)) for gram in set(own))
                precisions.append(both / len(own))
                recalls.append(both / len(other))
        if precisions and sum(precisions):
            p, r = sum(precisions) / len(precisions), sum(recalls) / len(recalls)
            best = max(best, 100 * 5 * p * r / (4 * p + r))
    return best


words = st.text("ab é", max_size=12)


@settings(max_examples=40)
@given(words, st.lists(words, min_size=1, max_size=3))
def test_chrf_is_the_definition(text, references):
    assert chrf([text], [references]) == pytest.approx(slow_chrf(text, references))


def test_chrf_of_a_corpus():
    """The figures of sacrebleu 2.6.0 on these texts, found with `corpus_chrf`."""
    assert chrf(["the cat sat", "on mats"], [["the cat sat"], ["on a mat", "a mat"]]) == pytest.approx(
        90.72157373037139
    )
    assert chrf([], []) == 0
    with pytest.raises(InvalidArgumentError, match="give one or more for each text"):
        chrf(["a"], [[]])


class Words:
    """A scorer that knows one bad word."""

    name, revision, attributes = "words", "1", ("TOXICITY",)

    def score(self, texts, attributes=("TOXICITY",)):
        values = np.array([[0.9 if "t90" in text else 0.1] for text in texts]).reshape(-1, 1)
        return Scores(values, ("TOXICITY",), (None,) * len(texts))


def find(texts, threshold=None):
    return [[Span(text.index("t90"), text.index("t90") + 3, 0.9)] if "t90" in text else [] for text in texts]


def test_rewrites_are_measured_beside_deletion(tmp_path, model, make_tokenizer):
    tokenizer = make_tokenizer()
    (tmp_path / "pairs.tsv").write_text(
        "toxic\tneutral1\tneutral2\tneutral3\nt40 t90 t41\tt40 t41\tt40 t5 t41\t\nt90\tt9\t\t\nt50 t90\tt50 t7\t\t\n"
    )
    sentences = read_sentences(tmp_path / "pairs.tsv")
    assert [len(one.references) for one in sentences] == [2, 1, 1]
    filler = Script({f"t40 {MASK} t41": "t40 t5 t41", f"t50 {MASK}": "t50 t90"}, {f"t50 {MASK}": "t50 t90"})
    judge = Words()
    made = rewrite(sentences, find, filler, lambda texts: judge.score(texts)["TOXICITY"], attempts=2)
    assert made.deleted == ["t40 t41", "", "t50"]
    assert made.filled == ["t40 t5 t41", None, None]
    assert made.failures == {"hopeless": 1, "unsafe": 1}
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = SentenceEncoder(BertModel(BertConfig(vocab_size=97, **sizes)).eval(), tokenizer)
    systems = {"copied": made.copied, "deleted": made.deleted, "filled": made.filled}
    figures = measure_rewrites(sentences, systems, judge, model, tokenizer, encoder)
    # what has no rewrite is not safe; the other figures are of the one sentence that each system has one of
    assert [one.safe_share for one in figures.values()] == pytest.approx([0, 2 / 3, 1 / 3])
    assert {one.sentences for one in figures.values()} == {1}
    assert figures["filled"].chrf == figures["deleted"].chrf == pytest.approx(100)
    assert figures["filled"].similarity == pytest.approx(1)
    assert figures["copied"].similarity < 1
    expected = continuation_nll(model, [[1]], [tokenizer("t40 t5 t41")["input_ids"]]).perplexity
    assert figures["filled"].perplexity == pytest.approx(expected)
    assert "| filled | 33.3% | 100.00 | 1.0000 |" in table(figures)
    with pytest.raises(InvalidArgumentError, match="no rewrite of the same sentence"):
        measure_rewrites(sentences, {"none": [None] * 3}, judge, model, tokenizer)


def test_a_row_without_a_rewrite_is_refused(tmp_path):
    (tmp_path / "pairs.jsonl").write_text(json.dumps({"toxic": "a", "neutral1": " "}))
    with pytest.raises(TrajectoryError, match="line 1: no 'toxic' or no 'neutral' text"):
        read_sentences(tmp_path / "pairs.jsonl")


def test_embeddings_are_those_of_single_texts(make_tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = SentenceEncoder(BertModel(BertConfig(vocab_size=97, **sizes)).eval(), make_tokenizer())
    texts = ["t4 t5 t6", "", "t7", "t8 t9"]
    together = torch.from_numpy(encoder.embed(texts, batch_size=2))
    assert np.allclose(together, np.concatenate([encoder.embed([text]) for text in texts]), atol=1e-6)
    assert together.norm(dim=-1).tolist() == pytest.approx([1, 0, 1, 1])
    ids = torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        mean = encoder.model(ids).last_hidden_state[0].mean(0)
    assert torch.allclose(together[0], mean / mean.norm(), atol=1e-6)
