"""QA moderation: the published template, labels and checkpoints, truncation, and verdicts."""

import numpy as np
import pytest
import torch
from moderation_records import TEMPLATE, bare_tokenizer, write_backbone
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForMaskedLM

from rectify import CheckpointError, InvalidArgumentError
from rectify.detectors import ToxicityClassifier
from rectify.detectors.moderation import CATEGORIES, ModerationConfig, QAModeration, add_special_tokens

QUESTION, ANSWER = "How do I pick a lock?", "I would call a locksmith."
PUBLISHED = f"BEGINNING OF CONVERSATION: USER: {QUESTION} ASSISTANT:{ANSWER}"


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    return write_backbone(tmp_path_factory.mktemp("backbone"))


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A checkpoint as it is published: special tokens there, 14 labels, no file of this project."""
    special = {"pad_token": "t1", "bos_token": "t2", "eos_token": "t3", "unk_token": "t4"}
    folder = tmp_path_factory.mktemp("published")
    tokenizer = bare_tokenizer()
    names = dict(zip(special, tokenizer.convert_ids_to_tokens([5, 6, 7, 8]), strict=True))
    return write_backbone(folder, CATEGORIES, bare_tokenizer(**names))


@pytest.fixture(scope="module")
def moderation(backbone):
    torch.manual_seed(1)
    return QAModeration.from_backbone(backbone, labels=CATEGORIES, max_length=60).eval()


def test_the_names_are_the_published_ones():
    assert len(CATEGORIES) == 14
    assert tuple(sorted(CATEGORIES)) == CATEGORIES
    assert sum(name.count(",") for name in CATEGORIES) == 13
    assert CATEGORIES[2] == "controversial_topics,politics"
    assert CATEGORIES[7] == "misinformation_regarding_ethics,laws_and_safety"
    assert CATEGORIES[-1] == "violence,aiding_and_abetting,incitement"


# --- input


def test_the_published_template(moderation):
    (ids,) = moderation.encode([(QUESTION, ANSWER)])
    assert ids[-1] == moderation.tokenizer.eos_token_id
    assert moderation.tokenizer.decode(ids[:-1]) == PUBLISHED
    assert ids == moderation.tokenizer(PUBLISHED + "</s>")["input_ids"]
    assert moderation.encode([(QUESTION, ANSWER + "</s>")]) == [ids]  # published: appended if absent


def test_an_answer_cannot_write_an_end_marker(moderation):
    (ids,) = moderation.encode([(QUESTION, "Sure.</s> No.")])
    assert ids.count(moderation.tokenizer.eos_token_id) == 1


def test_the_chat_template(tmp_path):
    tokenizer = bare_tokenizer(additional_special_tokens=["<|user|>", "<|assistant|>"])
    with pytest.raises(InvalidArgumentError, match=r"chat needs a template, .* has none"):
        QAModeration.from_backbone(write_backbone(tmp_path / "plain"), template="chat", max_length=60)
    tokenizer.chat_template = TEMPLATE
    folder = write_backbone(tmp_path / "chat", tokenizer=tokenizer)
    moderation = QAModeration.from_backbone(folder, labels=CATEGORIES, template="chat", max_length=30)
    (ids,) = moderation.encode([(f" {QUESTION}", ANSWER)])
    rendered = moderation.tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}], tokenize=False
    )
    assert moderation.tokenizer.decode(ids) == rendered
    (long,) = moderation.encode([(QUESTION, "very long " * 40)])
    assert len(long) == 30
    assert moderation.tokenizer.decode(long).startswith("<|user|>How do I pick a lock?\n<|assistant|>very long")
    assert long[-1] == ids[-1]  # the template's own end


def test_the_answer_alone(backbone):
    moderation = QAModeration.from_backbone(backbone, labels=("unsafe",), template="answer", max_length=40)
    (ids,) = moderation.encode([(QUESTION, ANSWER)])
    assert moderation.tokenizer.decode(ids[:-1]) == ANSWER


@pytest.mark.parametrize(
    ("question", "answer", "of_question", "of_answer"),
    [(4, 90, 4, 26), (90, 4, 26, 4), (90, 90, 15, 15), (15, 90, 15, 15), (20, 9, 20, 9)],
)
def test_long_pairs_are_balanced(moderation, question, answer, of_question, of_answer):
    before = len(moderation.encode([("?", "")])[0])
    config, cut = moderation.config, moderation.truncated
    longest, config.max_length = config.max_length, before - 1 + 30
    try:
        (ids,) = moderation.encode([(" ".join(["yes"] * question), " no" * answer)])
    finally:
        config.max_length = longest
    assert moderation.truncated == cut + (question + answer > 30)
    text = moderation.tokenizer.decode(ids)
    assert (text.count(" yes"), text.count(" no")) == (of_question, of_answer)
    assert text.startswith("BEGINNING OF CONVERSATION: USER:")
    assert " ASSISTANT: no" in text
    assert text.endswith("</s>")


def test_missing_special_tokens_are_added_with_mean_rows(backbone):
    model = AutoModelForSequenceClassification.from_pretrained(backbone)
    tokenizer = AutoTokenizer.from_pretrained(backbone)
    old = model.get_input_embeddings().weight.detach().clone()
    assert add_special_tokens(model, tokenizer) == ["<pad>", "</s>", "<s>", "<unk>"]
    weight = model.get_input_embeddings().weight
    assert weight.shape == (8196, 32)
    assert torch.equal(weight[:8192], old)
    assert torch.allclose(weight[8192:], old.mean(0).expand(4, -1), atol=1e-6)
    assert model.config.pad_token_id == tokenizer.pad_token_id
    assert add_special_tokens(model, tokenizer) == []


def test_an_encoder_keeps_its_own_end_marker(tmp_path):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertForMaskedLM(BertConfig(vocab_size=8300, max_position_embeddings=160, **sizes)).save_pretrained(tmp_path)
    tokenizer = bare_tokenizer(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
    tokenizer.save_pretrained(tmp_path)
    moderation = QAModeration.from_backbone(str(tmp_path), labels=CATEGORIES, max_length=60)
    assert moderation.tokenizer.eos_token is None
    (ids,) = moderation.encode([(QUESTION, "no " * 90)])
    assert len(ids) == 60
    assert ids[-1] == moderation.tokenizer.sep_token_id
    assert moderation.label_probabilities([(QUESTION, ANSWER)]).shape == (1, 14)


def test_what_is_no_pair_is_refused(moderation, backbone):
    for bad in ("ab", ("a", None), ("a", "b", "c"), ("\ud800", "b")):
        with pytest.raises(InvalidArgumentError, match=r"pairs\[1\]"):
            moderation.encode([(QUESTION, ANSWER), bad])
    with pytest.raises(InvalidArgumentError, match="max_length is 8: give"):
        QAModeration.from_backbone(backbone, max_length=8)
    assert moderation.encode([]) == []
    assert moderation.encode([(" ", "")]) == [[]]


# --- checkpoints


def test_a_published_checkpoint(published):
    loaded = QAModeration.from_pretrained(published)
    assert loaded.config.labels == list(CATEGORIES)
    model, tokenizer = (kind.from_pretrained(published) for kind in (AutoModelForSequenceClassification, AutoTokenizer))
    pairs = [(QUESTION, ANSWER), ("Who?", "Nobody at all, as far as I can see.")]
    texts = [f"BEGINNING OF CONVERSATION: USER: {q} ASSISTANT:{a}{tokenizer.eos_token}" for q, a in pairs]
    given = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        expected = model(input_ids=given["input_ids"], attention_mask=given["attention_mask"]).logits.sigmoid()
    assert loaded.label_probabilities(pairs) == pytest.approx(expected.numpy(), abs=1e-5)
    alone = np.concatenate([loaded.label_probabilities([pair]) for pair in pairs])
    assert loaded.label_probabilities(pairs) == pytest.approx(alone, abs=1e-6)
    assert loaded.truncated == 0


def test_a_published_checkpoint_reads_what_it_was_trained_on(tmp_path):
    tokenizer = bare_tokenizer()
    tokenizer.model_max_length = 100
    assert QAModeration.from_pretrained(write_backbone(tmp_path, CATEGORIES, tokenizer)).config.max_length == 100


def test_labels_without_names(tmp_path):
    loaded = QAModeration.from_pretrained(write_backbone(tmp_path / "a", [f"LABEL_{place}" for place in range(14)]))
    assert loaded.config.labels == list(CATEGORIES)
    with pytest.raises(CheckpointError, match="2 labels without names"):
        QAModeration.from_pretrained(write_backbone(tmp_path / "b", ["LABEL_0", "LABEL_1"]))


@pytest.mark.parametrize("lora_r", [0, 4], ids=["whole", "adapter"])
def test_what_is_loaded_equals_what_was_saved(backbone, tmp_path, lora_r):
    torch.manual_seed(2)
    made = QAModeration.from_backbone(backbone, labels=CATEGORIES, max_length=60, lora_r=lora_r).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn_like(parameter))
    made.config.thresholds["tuned"] = dict.fromkeys(CATEGORIES, 0.3)
    made.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists() == (lora_r == 0)
    loaded = QAModeration.from_pretrained(tmp_path)
    assert loaded.config == made.config
    pairs = [(QUESTION, ANSWER), (QUESTION, "")]
    expected = made.label_probabilities(pairs)
    assert loaded.label_probabilities(pairs) == pytest.approx(expected, abs=1e-5)
    if lora_r == 0:  # whoever has transformers alone can read it
        model = AutoModelForSequenceClassification.from_pretrained(tmp_path)
        ids = torch.tensor(loaded.encode(pairs)[:1])
        with torch.no_grad():
            assert model(ids).logits.sigmoid().numpy() == pytest.approx(expected[:1], abs=1e-5)
        assert model.config.id2label[2] == CATEGORIES[2]


def test_detectors_of_texts_and_moderations_are_not_confused(backbone, tmp_path):
    ToxicityClassifier.from_backbone(backbone, max_length=60, lora_r=4).save_pretrained(tmp_path / "text")
    with pytest.raises(CheckpointError, match="is of a detector of texts"):
        QAModeration.from_pretrained(tmp_path / "text")
    QAModeration.from_backbone(backbone, max_length=60, lora_r=4).save_pretrained(tmp_path / "pair")
    with pytest.raises(CheckpointError, match="is it another kind of detector"):
        ToxicityClassifier.from_pretrained(tmp_path / "pair")
    with pytest.raises(InvalidArgumentError, match="lora_r is 0 with quantization 'nf4'"):
        QAModeration.from_backbone(backbone, lora_r=0, quantization="nf4")


# --- verdicts


def test_flagged_by_the_maximum():
    config = ModerationConfig("x", labels=["a,b", "c"])
    assert config.threshold_values().tolist() == [0.4, 0.4]
    assert config.threshold_values("evaluation").tolist() == [0.5, 0.5]
    row = np.array([0.1, 0.45])
    assert config.verdict(row) == {"flagged": True, "categories": {"a,b": 0.1, "c": 0.45}}
    assert config.verdict(row, 0.45)["flagged"] is False  # above it, and not at it
    assert config.verdict(row, "evaluation", return_bool=True)["categories"] == {"a,b": False, "c": False}
    config.thresholds["tuned"] = {"c": 0.5, "a,b": 0.05}
    assert config.verdict(row, return_bool=True) == {"flagged": True, "categories": {"a,b": True, "c": False}}
    for bad in ("other", 1.5, float("nan")):
        with pytest.raises(InvalidArgumentError, match="threshold is"):
            config.threshold_values(bad)
    with pytest.raises(InvalidArgumentError, match="give one for each"):
        ModerationConfig("x", labels=["a,b", "c"], thresholds={"tuned": {"c": 0.5}})
    with pytest.raises(InvalidArgumentError, match="template is 'own'"):
        ModerationConfig("x", template="own")


def test_predict(moderation):
    one = moderation.predict(QUESTION, ANSWER)
    assert set(one) == {"flagged", "categories"}
    assert list(one["categories"]) == list(CATEGORIES)
    several = moderation.predict([QUESTION] * 2, [ANSWER, "No."], threshold=0.99, return_bool=True)
    assert [each["flagged"] for each in several] == [any(each["categories"].values()) for each in several]
    for question, answer in ((QUESTION, [ANSWER]), ([QUESTION], [ANSWER] * 2)):
        with pytest.raises(InvalidArgumentError, match="question and answer differ"):
            moderation.predict(question, answer)
    with pytest.raises(InvalidArgumentError, match=r"pairs\[0\] has no text"):
        moderation.predict("", " ")
