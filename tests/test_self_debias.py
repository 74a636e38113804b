"""Self-debiasing against a float64 reference that runs every announced text by itself."""

import copy
import math

import pytest
import torch
from decoding import assistant_of, padded, warped

from rectify import InvalidArgumentError, load_language_model
from rectify.methods.base import Base
from rectify.methods.self_debias import DESCRIPTIONS, TEMPLATE, SelfDebias, SelfDebiasProcessor, announce, debias
from rectify.prefix_memo import MASKED

ANNOUNCEMENTS = ["t90 t91", "t92 t93 t94 t95", "t96"]
PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module", params=["gpt2", "llama", "sliding"])
def model(request, make_model):
    return make_model(request.param, seed=5)


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def make(model, tokenizer):
    """`make(decay, epsilon, **sampling)`: a processor of the model."""

    def of(decay=50.0, epsilon=0.01, announcements=ANNOUNCEMENTS, **sampling):
        return SelfDebiasProcessor(announcements, decay, epsilon, model, tokenizer, PLAIN | sampling)

    return of


@torch.no_grad()
def expected_policy(model, text, decay=50.0, epsilon=0.01, begin=1, forbidden=(), **sampling):
    """The debiased and then warped probabilities after one text, token ids without padding: `[V]` float64."""
    exact = copy.deepcopy(model).double()
    gone = torch.zeros(97, dtype=torch.bool)
    gone[list(forbidden)] = True

    def policy(ids):
        return exact(torch.tensor([ids])).logits[0, -1].masked_fill(gone, -math.inf).softmax(-1)

    head, rest = (text[:1], text[1:]) if text[0] == begin else ([], text)
    plain = policy(text)
    against = [policy([*head, *(int(word[1:]) for word in words.split()), *rest]) for words in ANNOUNCEMENTS]
    least = torch.stack([plain - other for other in against]).min(0).values
    factor = torch.where(least >= 0, 1.0, (decay * least).exp().clamp(min=epsilon))
    debiased = plain * factor
    return warped((debiased / debiased.sum()).log(), **sampling)


@torch.no_grad()
def scores_of(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]


ROWS = [[5, 6, 7, 8, 9, 10], [11, 12], [1, 13, 14, 15], [1], [16, 1, 17]]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7, "top_p": 0.8}, {"top_k": 5}], ids=str)
def test_the_policy_is_that_of_the_paper(model, make, sampling):
    ids, mask = padded(ROWS, pad=0)
    scores = scores_of(model, ids, mask)
    found = make(**sampling)(ids, scores).softmax(-1)
    for row, policy in zip(ROWS, found, strict=True):
        assert torch.allclose(policy.double(), expected_policy(model, row, **sampling), rtol=0, atol=2e-5)
    base = scores.softmax(-1)
    assert (found - base).abs().sum(-1).min() > 0.05


@pytest.mark.parametrize(("decay", "epsilon"), [(1.0, 0.0), (10.0, 0.5), (300.0, 0.0)])
def test_parameters(model, make, decay, epsilon):
    ids, mask = padded(ROWS, pad=0)
    found = make(decay, epsilon)(ids, scores_of(model, ids, mask)).softmax(-1)
    for row, policy in zip(ROWS, found, strict=True):
        assert torch.allclose(policy.double(), expected_policy(model, row, decay, epsilon), rtol=0, atol=2e-5)


def test_no_decay_gives_the_scores_of_the_base(model, make, tokenizer):
    ids, mask = padded(ROWS, pad=0)
    scores = scores_of(model, ids, mask)
    scores[:, 2] = -math.inf
    for sampling in ({}, {"temperature": 0.7, "top_p": 0.8}):
        base = Base().bind(model, tokenizer, PLAIN | sampling).processor
        assert torch.equal(make(decay=0.0, **sampling)(ids, scores.clone()), base(ids, scores.clone()))
        assert torch.equal(make(epsilon=1.0, **sampling)(ids, scores.clone()), base(ids, scores.clone()))


def test_what_was_forbidden_before_is_forbidden_under_the_announcement_too(model, make):
    ids = torch.tensor([ROWS[0]])
    scores = scores_of(model, ids, torch.ones_like(ids))
    forbidden = [2, *scores[0].topk(5).indices.tolist()]
    scores[:, forbidden] = -math.inf
    found = make()(ids, scores).softmax(-1)[0].double()
    assert (found[forbidden] == 0).all()
    assert torch.allclose(found, expected_policy(model, ROWS[0], forbidden=forbidden), rtol=0, atol=2e-5)


def test_a_batch_gives_what_its_rows_give_and_padding_counts_for_nothing(model, make):
    ids, mask = padded(ROWS, pad=0, more=3)
    scores = scores_of(model, ids, mask)
    together = make()(ids, scores)
    for row, line, alone in zip(ROWS, scores, together, strict=True):
        assert torch.allclose(make()(torch.tensor([row]), line[None]), alone, rtol=0, atol=1e-3)
    # padding that may be text, told apart by the mask
    processor = make()
    processor.set_attention_mask(mask)
    assert torch.allclose(processor(ids.masked_fill(mask == 0, 7), scores), together, rtol=0, atol=1e-3)


def test_permuted_and_shortened_rows_are_answered_as_by_a_fresh_processor(model, make):
    torch.manual_seed(1)
    ids, processor = torch.randint(3, 97, (4, 12)), make()
    for rows, length in (([0, 1, 2, 3], 7), ([0, 1, 2, 3], 8), ([3, 3, 0, 1], 9), ([3, 0], 8), ([2, 1, 0, 3], 12)):
        prefixes, scores = ids[rows][:, :length], torch.randn(len(rows), 97)
        expected = make()(prefixes, scores)
        assert torch.allclose(processor(prefixes, scores), expected, rtol=0, atol=1e-3)
    processor.reset()
    assert torch.allclose(processor(prefixes, scores), expected, rtol=0, atol=1e-3)


def write(model, ids, processor, **options):
    torch.manual_seed(7)
    options = processor.sampling.generate_kwargs() | {"attention_mask": torch.ones_like(ids)} | options
    return model.generate(ids, logits_processor=[processor], max_new_tokens=12, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ],
    ids=str,
)
def test_generation_is_the_same_with_and_without_a_cache(model, make, options):
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(2))
    cached, slow = make(), make()
    slow.logits._memo.use_cache = False
    outputs = [write(model, ids, processor, **options) for processor in (cached, slow)]
    assert torch.equal(*outputs)
    assert not torch.equal(outputs[0], write(model, ids, make(decay=0.0), **options))


def test_assisted_decoding_gives_what_greedy_decoding_gives(model, make):
    ids = torch.randint(3, 97, (1, 6), generator=torch.Generator().manual_seed(2))
    plain = write(model, ids, make(), do_sample=False)
    assert torch.equal(plain, write(model, ids, make(), do_sample=False, assistant_model=assistant_of(model, 0.02)))


def test_announcements_stand_after_the_begin_token():
    texts = torch.tensor([[MASKED, 1, 5, 6], [7, 1, 8, 9], [MASKED, MASKED, MASKED, 1]])
    words = torch.tensor([[20, 21], [22, MASKED]])

    def rows(begin):
        return [[int(token) for token in row if token != MASKED] for row in announce(texts, words, begin)]

    kept = [[20, 21, 7, 1, 8, 9], [22, 7, 1, 8, 9]]
    assert rows(1) == [[1, 20, 21, 5, 6], [1, 22, 5, 6], *kept, [1, 20, 21], [1, 22]]
    assert rows(None) == [[20, 21, 1, 5, 6], [22, 1, 5, 6], *kept, [20, 21, 1], [22, 1]]


def test_debiasing_keeps_float64_and_half_precision_becomes_float32():
    scores, announced = torch.randn(2, 7), torch.randn(2, 3, 7)
    assert debias(scores.double(), announced.double(), 50, 0.01).dtype == torch.float64
    assert debias(scores.bfloat16(), announced, 50, 0.01).dtype == torch.float32


def test_a_text_that_exceeds_the_context_with_its_announcement_is_refused(make_model, tokenizer):
    model = make_model("gpt2", n_positions=12)
    processor = SelfDebiasProcessor(ANNOUNCEMENTS, 50, 0.01, model, tokenizer, {})
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))
    processor(ids[:, :8], torch.randn(2, 97))
    with pytest.raises(InvalidArgumentError, match="self-debiasing prefix would read 13 tokens, and its context is 12"):
        processor(ids, torch.randn(2, 97))
    with pytest.raises(InvalidArgumentError, match="announcements"):
        SelfDebiasProcessor(["t5", ""], 50, 0.01, model, tokenizer, {})


# --- the method


def test_labels_and_parameters():
    assert SelfDebias().label == "self_debias,decay=50"
    assert SelfDebias(decay=100.0, attributes="toxicity").family == "self_debias,attributes=toxicity"
    assert SelfDebias().value == 50
    for name, wrong in (
        ("decay", -1.0),
        ("decay", math.nan),
        ("decay", math.inf),
        ("epsilon", -0.1),
        ("epsilon", 2.0),
        ("attributes", "insult"),
        ("path", "folder"),
    ):
        with pytest.raises(InvalidArgumentError, match=name):
            SelfDebias(**{name: wrong})


@pytest.mark.parametrize(("attributes", "count"), [("toxicity", 1), ("all", 6)])
def test_the_published_prefixes_on_the_pocket_model(attributes, count):
    model, tokenizer = load_language_model("pocket")
    decoder = SelfDebias(attributes=attributes).bind(model, tokenizer, {"do_sample": False})
    assert decoder.draws == 1
    assert decoder.reads == ()
    processor = decoder.processor
    words = [[token for token in row if token != MASKED] for row in processor._announcements.tolist()]
    published = [TEMPLATE.format(text) for text in DESCRIPTIONS.values()][:count]
    assert [tokenizer.decode(row) for row in words] == published
    inputs = tokenizer(["You are such a", "The weather today is"], return_tensors="pt", padding=True)
    processor.set_attention_mask(inputs["attention_mask"])
    options = processor.sampling.generate_kwargs() | {"max_new_tokens": 3}
    output = model.generate(**inputs, logits_processor=[processor], **options)
    assert output.shape == (2, inputs["input_ids"].shape[1] + 3)
    assert processor.statistics() is None
