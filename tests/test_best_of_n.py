"""Best of n: which of the draws is kept, and that the first draw is the base's own continuation."""

import json
import math

import numpy as np
import pytest
from prompt_records import records
from torch import nn

from rectify import InvalidArgumentError, load_language_model
from rectify.detectors import ToxicityClassifier
from rectify.evaluation.prompted_run import PromptedRun
from rectify.evaluation.run_settings import RunSettings
from rectify.methods import best_of_n
from rectify.methods.base import Base
from rectify.methods.best_of_n import BestOfN

N, DRAWS = 2, 3
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


def number(text):
    """Some toxicity that tells texts apart."""
    return sum(int(word[1:]) ** 2 for word in text.split()) % 97 / 97


def gaps(text):
    """The same, but that the most and the least toxic texts have none."""
    return math.nan if not 0.3 < number(text) < 0.7 else number(text)


FAKES = {"number": number, "gaps": gaps, "equal": lambda text: 0.5, "none": lambda text: math.nan}


class FakeClassifier(nn.Module):
    """What a classifier is to the method."""

    def __init__(self, name):
        super().__init__()
        self.toxicity = FAKES[name]

    @classmethod
    def from_pretrained(cls, name):
        return cls(name)

    def probabilities(self, texts, batch_size=64):
        assert not any(text != text.strip() for text in texts)
        return np.array([self.toxicity(text) for text in texts], dtype=np.float32)


@pytest.fixture(scope="module")
def make_run(tmp_path_factory, make_model, make_tokenizer):
    """`make_run(n, *methods)`: a run over five prompts, whose continuations are generated and measured."""
    folder = tmp_path_factory.mktemp("place")
    make_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    prompts = folder / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(one) + "\n" for one in records(9)))

    def make(n, *methods):
        output = str(tmp_path_factory.mktemp("run"))
        given = {"split": "all", "num_prompts": 5, "n": n, "max_new_tokens": 4, "batch_size": 3, "scorers": ("stub",)}
        run = PromptedRun(
            RunSettings(model=str(folder), prompts=str(prompts), output_dir=output, methods=methods, **given)
        )
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(best_of_n, "ToxicityClassifier", FakeClassifier)
            run.run(("generate", "measure"))
        return run

    return make


@pytest.fixture(scope="module")
def run(make_run):
    return make_run(N, *(f"best_of_n:{name},n={DRAWS}" for name in FAKES), "best_of_n:number,n=1")


@pytest.fixture(scope="module")
def base(make_run):
    """As many continuations of the base as best of n draws."""
    return continuations(make_run(N * DRAWS, "base"), 0)


def continuations(run, place):
    """Those of the method at a place: a list for each prompt."""
    return [ones for part in range(len(run.batches)) for ones in run.records_of(run.methods[place], part)]


@pytest.mark.parametrize("name", FAKES)
def test_the_first_of_the_least_toxic_draws_is_kept(run, base, name):
    found = continuations(run, 1 + list(FAKES).index(name))
    places, passed_over = [], False
    for ones, drawn in zip(found, base, strict=True):
        assert len(ones) == N
        for sample, one in enumerate(ones):
            draws = drawn[sample::N]  # draw after draw, each with samples of its own
            values = [FAKES[name](draw.text) for draw in draws]
            least = min((value for value in values if not math.isnan(value)), default=None)
            places.append(0 if least is None else values.index(least))
            passed_over |= any(map(math.isnan, values[: places[-1]]))
            assert one == draws[places[-1]]
    # draws differ, and each is kept somewhere, unless all are equally toxic
    assert all(len({draw.token_ids for draw in drawn}) == N * DRAWS for drawn in base)
    assert set(places) == ({0, 1, 2} if name in ("number", "gaps") else {0})
    assert passed_over == (name == "gaps")


def test_one_draw_is_the_base(run):
    assert run.methods[-1].label == "best_of_n:number,n=1"
    assert continuations(run, -1) == continuations(run, 0)


def test_clean_texts_have_no_likelihood_where_whole_texts_are_chosen(run):
    sums = [next(iter(run.clean_of(method).read([0]))) for method in run.methods]
    assert sums[1:5] == [None] * 4
    assert sums[0]["nll"] == sums[5]["nll"]


# --- the method


def test_it_draws_from_the_base_and_judges_continuations_by_the_pocket_classifier():
    model, tokenizer = load_language_model("pocket")
    decoder = BestOfN().bind(model, tokenizer, PLAIN | {"top_p": 0.9})
    texts = [" You idiot\n", "You idiot", "Have a nice day", " "]
    found = decoder.toxicity(texts)
    expected = ToxicityClassifier.from_pretrained("pocket-reward").probabilities(texts[1:3])
    assert found[1:3] == pytest.approx(expected, abs=1e-6)
    assert found[0] == pytest.approx(found[1], abs=1e-6)
    assert found[1] > 0.5 > found[2]
    assert np.isnan(found[3])
    assert decoder.draws == 4
    assert [type(read) for read in decoder.reads] == [ToxicityClassifier]
    base = Base().bind(model, tokenizer, PLAIN | {"top_p": 0.9}).processor
    assert type(decoder.processor) is type(base)
    assert decoder.processor.sampling == base.sampling


@pytest.mark.parametrize("n", [0, -1])
def test_no_draws_are_refused(n):
    with pytest.raises(InvalidArgumentError, match=f"n is {n}: give 1 or more"):
        BestOfN(n)
