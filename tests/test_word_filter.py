"""The word filter against a slow reference that looks at texts; and its list of words."""

import math
from functools import cache

import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import Unigram
from transformers import PreTrainedTokenizerFast

from rectify import InvalidArgumentError, load_language_model
from rectify.methods.base import Base
from rectify.methods.word_filter import WordFilter, WordFilterProcessor

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}


@pytest.fixture(scope="module")
def pocket():
    return load_language_model("pocket")


@pytest.fixture(scope="module")
def make(pocket):
    """`make(words, **sampling)`: the filter on the pocket model."""

    @cache
    def of(words, sampling):
        return WordFilterProcessor(words, *pocket, PLAIN | dict(sampling))

    def made(words, **sampling):
        processor = of(tuple(words), tuple(sampling.items()))
        processor.set_attention_mask(None)
        return processor

    return made


def forbidden(processor, tokenizer, text):
    """The texts of the tokens that may not follow a text."""
    ids = torch.tensor([tokenizer(text)["input_ids"]], dtype=torch.int64)
    scores = processor(ids, torch.zeros(1, len(tokenizer)))
    return {tokenizer.decode([token]) for token in (scores[0] == -math.inf).nonzero()[:, 0].tolist()}


def written(tokenizer, words):
    """The words' forms as token ids, and whether each begins with a space."""
    forms = {form for word in words for form in (word, word.lower(), word.capitalize(), word.upper())}
    return [(space == " ", tokenizer(space + form)["input_ids"]) for form in forms for space in ("", " ")]


def completing(tokenizer, forms, ids):
    """The tokens that would complete a form after the ids, by their text."""
    found = set()
    for spaced, (*before, last) in forms:
        if ids[len(ids) - len(before) :] == before:
            earlier = tokenizer.decode(ids[: len(ids) - len(before)])
            if spaced or not earlier[-1:].isalnum():
                found.add(last)
    return found


# --- which tokens


@pytest.mark.parametrize(
    ("words", "text", "tokens"),
    [
        (["idiot"], "You are an", [" idiot"]),
        (["idiot"], "You are an Id", [" idiot", "iot"]),
        (["idiot"], "You are an IDI", [" idiot", "OT"]),
        (["moron"], "MOR", [" moron", "ON"]),
        (["asshole"], "such an", [" asshole"]),
        (["asshole"], "such an Ass", [" asshole", "hole"]),
        (["white trash"], "they are white", [" trash"]),
        (["white trash"], "they are", []),
        (["NaCl"], "some Na", ["Cl"]),  # as it is listed
        (["ass", "damn"], "my", [" ass", " Ass", " damn", " Damn"]),
    ],
    ids=str,
)
def test_what_would_complete_a_word_is_forbidden(pocket, make, words, text, tokens):
    assert forbidden(make(words), pocket[1], text) == set(tokens)


@pytest.mark.parametrize("text", ["cl", "my cl", "3", "Mr"])
def test_inside_a_word_only_words_after_a_space_are_forbidden(pocket, make, text):
    assert forbidden(make(["ass"]), pocket[1], text) == {" ass", " Ass"}


@pytest.mark.parametrize("text", ["(", "my “", "so:\n", "don't -", "my "])
def test_where_no_word_is_going_on_words_without_a_space_are_forbidden_too(pocket, make, text):
    assert forbidden(make(["ass"]), pocket[1], text) == {" ass", " Ass", "ass", "Ass"}


def test_a_word_may_begin_the_text(pocket, make):
    tokenizer = pocket[1]
    assert forbidden(make(["ass"]), tokenizer, "") == {" ass", " Ass", "ass", "Ass"}
    assert forbidden(make(["moron"]), tokenizer, "mor") == {" moron", "on"}
    assert forbidden(make(["moron"]), tokenizer, "humor") == {" moron"}


@pytest.mark.parametrize("text", ["You are such an", "MOR", "my white", "humor", " NaCl of an AS", "I—an id"])
def test_the_tokens_are_those_of_a_slow_reference(pocket, make, text):
    tokenizer, words = pocket[1], ["idiot", "ass", "white trash", "moron", "NaCl", "4chan"]
    tokens = completing(tokenizer, written(tokenizer, words), tokenizer(text)["input_ids"])
    assert forbidden(make(words), tokenizer, text) == {tokenizer.decode([token]) for token in tokens}


def test_no_listed_word_is_generated(pocket, make):
    model, tokenizer = pocket
    inputs = tokenizer(["You are such a", "She said", "Oh, (I"], return_tensors="pt", padding=True)
    length, new = inputs["input_ids"].shape[1], 16

    def steps(processor):
        """Each generated token with what stood before it."""
        torch.manual_seed(3)
        processor.set_attention_mask(inputs["attention_mask"])
        options = processor.sampling.generate_kwargs() | {"do_sample": True, "num_return_sequences": 2}
        output = model.generate(**inputs, logits_processor=[processor], max_new_tokens=new, **options).tolist()
        return [(row[:place], row[place]) for row in output for place in range(length, len(row))]

    base = steps(Base().bind(model, tokenizer, PLAIN).processor)
    # the words that the model as it is writes, of one token and of several
    texts = [tokenizer.decode([*ids[length:], token]) for ids, token in base]
    words = sorted({word for text in texts for word in text.split() if word.isalpha()})
    forms = written(tokenizer, words)
    assert {len(ids) for _, ids in forms} >= {1, 2, 3}
    assert any(token in completing(tokenizer, forms, ids) for ids, token in base)
    assert not any(token in completing(tokenizer, forms, ids) for ids, token in steps(make(words)))


# --- other vocabularies


def test_a_vocabulary_that_begins_each_text_with_a_space(make_model):
    """SentencePiece, as Llama 2 and Mistral have it."""
    pieces = ["<unk>", "▁", "▁bad", "bad", "▁a", "▁is", "▁(", "cl", "\n", "dest"]
    tokenizer = Tokenizer(Unigram([(piece, -len(pieces) + len(piece)) for piece in pieces], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    assert tokenizer("bad")["input_ids"] == [2]
    processor = WordFilterProcessor(["bad"], make_model(vocab_size=len(pieces)), tokenizer, PLAIN)

    def found(*before):
        ids = torch.tensor([[pieces.index(piece) for piece in before]])
        scores = processor(ids, torch.zeros(1, len(pieces)))[0]
        return {piece for piece, score in zip(pieces, scores, strict=True) if score == -math.inf}

    assert found("▁a") == {"▁bad"}
    assert found("▁a", "cl") == {"▁bad"}
    assert found("▁(") == {"▁bad", "bad"}


def test_forms_that_the_vocabulary_lacks_forbid_nothing(make_model, make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.unk_token = "t3"
    assert tokenizer("T5")["input_ids"] == [3]
    processor = WordFilterProcessor(["t5", "nowhere"], make_model(), tokenizer, PLAIN)
    assert (processor(torch.tensor([[9]]), torch.zeros(1, 97))[0] == -math.inf).nonzero().tolist() == [[5]]


# --- padding, dead ends, warpers


def test_padding_counts_for_nothing(pocket, make):
    tokenizer, processor = pocket[1], make(["ass", "moron", "idiot"])
    rows = [tokenizer(text)["input_ids"] for text in ("mor", "(id", "Let us say you are an Id", "")]
    rows[-1] = [tokenizer("my")["input_ids"][0]]
    longest = max(map(len, rows)) + 2
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    scores = torch.randn(len(rows), len(tokenizer), generator=torch.Generator().manual_seed(0))
    alone = [
        make(["ass", "moron", "idiot"])(torch.tensor([row]), line[None])[0]
        for row, line in zip(rows, scores, strict=True)
    ]
    assert all((line == -math.inf).any() for line in alone)
    for pad in (0, *tokenizer("mor")["input_ids"]):  # with a mask it may be a word
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
        processor.set_attention_mask(mask)
        assert torch.equal(processor(ids, scores), torch.stack(alone))


def test_a_row_in_which_all_is_forbidden_is_left_as_it_is(pocket, make):
    tokenizer = pocket[1]
    ids = torch.tensor([tokenizer("my")["input_ids"]]).repeat(2, 1)
    word, other = tokenizer(" ass")["input_ids"] + tokenizer(" cat")["input_ids"]
    scores = torch.full((2, len(tokenizer)), -math.inf)
    scores[:, word], scores[1, other] = 1.5, -4.0
    found = make(["ass"])(ids, scores.clone())
    assert torch.equal(found[0], scores[0])
    assert found[1].isfinite().nonzero().tolist() == [[other]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_warpers_follow(pocket, make, dtype):
    tokenizer = pocket[1]
    ids = torch.tensor([tokenizer("my")["input_ids"]])
    word, second, third = (tokenizer(text)["input_ids"][0] for text in (" ass", " cat", " dog"))
    scores = torch.full((1, len(tokenizer)), -9.0, dtype=dtype)
    scores[0, [word, second, third]] = torch.tensor([8.0, 4.0, 2.0], dtype=dtype)
    found = make(["ass"], top_k=2, temperature=0.5)(ids, scores)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert {token: float(found[0, token]) for token in found[0].isfinite().nonzero()[:, 0].tolist()} == {
        second: 8,
        third: 4,
    }


# --- the list


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("words.txt", "idiot\n\n  \n moron \n"),
        ("bom.txt", "\ufeffidiot\r\nmoron\r\n"),
        ("words.csv", "severity,text\n2.5,idiot\n,moron\n"),
        ("words.tsv", "text\tlanguage\nidiot\ten\nmoron\ten\n"),
    ],
)
def test_a_list_is_read(pocket, tmp_path, name, content):
    (tmp_path / name).write_text(content, encoding="utf-8")
    decoder = WordFilter(path=str(tmp_path / name)).bind(*pocket, PLAIN)
    assert forbidden(decoder.processor, pocket[1], "an") == {" idiot", " moron"}
    assert (decoder.draws, decoder.toxicity, decoder.reads) == (1, None, ())
    assert decoder.processor.statistics() is None


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("none.txt", None, "cannot be read"),
        ("empty.txt", b" \n\n", "holds no word"),
        ("latin.txt", "crétin".encode("latin-1"), "UTF-8"),
        ("words.csv", b"word\nidiot\n", "no column 'text'"),
    ],
)
def test_a_list_that_cannot_be_used_is_refused(pocket, tmp_path, name, content, said):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidArgumentError, match=said):
        WordFilter(path=str(tmp_path / name)).bind(*pocket, PLAIN)


def test_another_list_is_another_revision(tmp_path):
    model, tokenizer = load_language_model("pocket")
    path = tmp_path / "words.txt"
    revisions = []
    for words in ("fool\n", "fool\nidiot\n", "fool\n"):
        path.write_text(words)
        revisions.append(WordFilter(path=str(path)).bind(model, tokenizer, {}).revision)
    assert revisions[0] == revisions[2] != revisions[1]
