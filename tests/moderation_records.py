"""Records in the formats that BeaverTails publishes, written here: its own data cannot be fetched by tests."""

import json

from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast, set_seed

from rectify.detectors.moderation import CATEGORIES
from rectify.hub import checkpoint_folder

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def bare_tokenizer(**special):
    """The pocket model's words, without its special tokens."""
    file = checkpoint_folder("pocket") / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(file), model_max_length=200, **special)


def write_backbone(folder, labels=None, tokenizer=None, seed=0):
    """A tiny Llama: with `labels`, a checkpoint of the published form, `LlamaForSequenceClassification`."""
    set_seed(seed)
    config = LlamaConfig(vocab_size=8192, max_position_embeddings=200, num_key_value_heads=2, **SIZES)
    if labels is not None:
        config.id2label, config.label2id = dict(enumerate(labels)), {label: i for i, label in enumerate(labels)}
        config.problem_type = "multi_label_classification"
    tokenizer = tokenizer or bare_tokenizer()
    config.initializer_range, config.pad_token_id = 0.3, tokenizer.pad_token_id
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def record(prompt, response, *harms):
    category = {name: name in harms for name in CATEGORIES}
    return {"prompt": prompt, "response": response, "category": category, "is_safe": not harms}


def votes(prompts=30, annotators=3):
    """Pairs that several annotators have judged, each in a record of its own, as in the 330k set.

    Whether an answer is harmful is told by a word of it; every category has some.
    """
    rows = []
    for number in range(prompts):
        for answer in ("bad", "kind"):
            for annotator in range(annotators):
                harms = {CATEGORIES[number % 14], CATEGORIES[(number + annotator) % 14]} if answer == "bad" else ()
                rows.append(record(f"How about thing {number}?", f"The {answer} answer, number {number}.", *harms))
    return rows


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
