"""The bundled pocket models, and the parts of their recipe."""

import hashlib
import json

import torch

from rectify import DeadEndQNetwork, checkpoint_folder, load_language_model, token_risks
from rectify.pocket.dead_ends import collate
from rectify.pocket.texts import read_texts, split_of


def test_the_bundle_is_small_and_holds_no_pickles():
    files = [path for name in ("pocket", "pocket-q") for path in checkpoint_folder(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_the_pair_shares_a_vocabulary_and_tells_a_threat_from_a_report():
    _, tokenizer = load_language_model("pocket")
    q_network = DeadEndQNetwork.from_pretrained("pocket-q")
    q_network.config.vocabulary.check(tokenizer)
    texts = ("You are a stupid idiot", "The committee met in the morning")
    worst = [token_risks(q_network, tokenizer(text, return_tensors="pt")["input_ids"])[0, 1:].max() for text in texts]
    assert worst[0] > 0.5 > worst[1]


def test_the_split_rule():
    for key in ("a", "b.txt:0:10", "ä", ""):
        remainder = int(hashlib.sha256(key.encode()).hexdigest(), 16) % 10
        assert split_of(key) == ("test" if remainder == 1 else "validation" if remainder == 2 else "train")
    assert {split_of(str(i)) for i in range(40)} == {"train", "validation", "test"}


def test_test_records_stay_out(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "rectify.pocket.texts._READERS", {"forum": lambda folder: ((f"text {i}", True) for i in range(60))}
    )
    (tmp_path / "realtoxicityprompts").mkdir()
    records = [
        {"filename": "f", "begin": i, "end": 9, "prompt": {"text": f"text {i % 7}"}, "continuation": {"text": ""}}
        for i in range(40)
    ]
    path = tmp_path / "realtoxicityprompts" / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    found = list(read_texts(tmp_path))
    assert len({text.text for text in found}) == len(found)
    for text in found:
        if text.source == "forum":
            assert split_of(text.text) == text.split != "test"
            assert text.text not in {f"text {i}" for i in range(7)}  # all of these are RealToxicityPrompts records
        else:
            assert text.split != "test"


def test_only_continuation_and_end_count():
    items = [{"ids": [5, 6, 7, 0], "start": 1, "reward": -0.5}, {"ids": [8, 9, 0], "start": 2, "reward": 0.0}]
    batch = collate(items)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 0], [8, 9, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]
    assert batch["counted"].tolist() == [[False, True, True, True], [False, False, True, False]]
    torch.testing.assert_close(batch["labels"], torch.tensor([-0.5, 0.0]))
