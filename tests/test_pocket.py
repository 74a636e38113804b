"""The bundled pocket models, and the parts of their recipe."""

import hashlib
import json

import numpy as np

from rectify import DeadEndQNetwork, RectificationProcessor, checkpoint_folder, load_language_model, token_risks
from rectify.detectors import ToxicityClassifier
from rectify.hub import POCKET
from rectify.pocket.reward_model import WordToxicity, labelled_rows
from rectify.pocket.texts import LabelledText, read_fragments, read_texts
from rectify.pocket.trajectories import cut_texts, whole_texts
from rectify.splits import split_of


def test_the_bundle_is_small_and_holds_no_pickles():
    files = [path for name in POCKET for path in checkpoint_folder(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 25e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}


def test_the_pair_shares_a_vocabulary_and_tells_a_threat_from_a_report():
    _, tokenizer = load_language_model("pocket")
    q_network = DeadEndQNetwork.from_pretrained("pocket-q")
    q_network.config.vocabulary.check(tokenizer)
    texts = ("You are a stupid idiot", "The committee met in the morning")
    worst = [token_risks(q_network, tokenizer(text, return_tensors="pt")["input_ids"])[0, 1:].max() for text in texts]
    assert worst[0] > 0.5 > worst[1]


def test_a_head_on_the_models_own_states_tells_them_too(spy):
    model, tokenizer = load_language_model("pocket")
    q_network = DeadEndQNetwork.from_pretrained("pocket-q-shared", model=model)
    assert q_network.trunk is model.base_model
    runs = spy(q_network)
    processor = RectificationProcessor(q_network, model=model, tokenizer=tokenizer, do_sample=False)
    inputs = tokenizer("You are such a stupid", return_tensors="pt")
    output = model.generate(**inputs, logits_processor=[processor], **processor.generate_kwargs(), max_new_tokens=5)
    assert runs == []
    assert processor.statistics().moved > 0
    insult, praise = (
        token_risks(q_network, tokenizer(text, return_tensors="pt").input_ids)[0, -1]
        for text in ("You are a stupid idiot", "You are a good friend")
    )
    assert insult > praise + 0.2
    assert output.shape[1] > inputs.input_ids.shape[1]


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


def test_fragments_are_toxic_where_people_marked_them(tmp_path):
    (tmp_path / "toxic_spans").mkdir()
    lines = ["spans,text"]
    for number in range(30):
        text = f"number {number} is a nice day and you are a stupid person who talks"
        begin = text.index("stupid")
        lines.append(f'"{list(range(begin, begin + 6))}",{text}')
    (tmp_path / "toxic_spans" / "tsd_train.csv").write_text("\n".join(lines) + "\n")
    found = list(read_fragments(tmp_path, words=6))
    assert found
    assert all(fragment.toxic == ("stupid" in fragment.text) for fragment in found)
    assert all(len(fragment.text.split()) <= 6 for fragment in found)
    numbers = {fragment.text.split()[1] for fragment in found if fragment.text.startswith("number")}
    assert all(split_of(f"number {n} is a nice day and you are a stupid person who talks") == "train" for n in numbers)


def labelled(count: int) -> list[LabelledText]:
    return [
        LabelledText(f"you are a {'stupid' if n % 2 else 'kind'} person number x{n % 7}", bool(n % 2), "a", "train")
        for n in range(count)
    ]


def test_the_label_of_comments_is_spread_over_their_words():
    words = WordToxicity(labelled(200))
    stupid, kind, both, neither = words(["stupid", "kind", "stupid and kind", "person"])
    assert stupid > 0.9
    assert kind < 0.1
    assert 0.3 < both < 0.7
    assert 0.3 < neither < 0.7


def test_the_reward_model_learns_from_whole_texts_and_from_pieces():
    long = "nobody labelled this stupid text " * 20
    texts = [
        *labelled(200),
        LabelledText(long, None, "b", "train"),
        LabelledText("one-sided", True, "jigsaw_toxic_only", "train"),
        LabelledText("v", False, "a", "validation"),
    ]
    train, validation = labelled_rows(texts, [LabelledText("piece", True, "toxic_spans", "train")], 0)
    assert ("piece", 1.0) in train
    assert train[0] == (texts[0].text, 0.0)
    assert ("one-sided", 1.0) not in train
    pieces = [(text, label) for text, label in train if "nobody" in text]
    assert len(pieces) > 3
    assert all(text in long and len(text.split()) <= 25 and label > 0.9 for text, label in pieces)
    assert validation == [("v", 0.0)]


def test_a_cut_text_is_as_toxic_as_its_label_and_its_continuation(make_tokenizer, monkeypatch):
    words = " ".join(f"t{i}" for i in range(30, 90))
    texts = [LabelledText(words, label, "a", "train") for label in (True, False, None)]

    def score(continuations):
        assert len(continuations) == 2  # nobody labelled the third
        return np.full(len(continuations), 0.75)

    monkeypatch.setattr("rectify.pocket.trajectories.CUT_SHARE", 1)
    records = list(cut_texts(texts, make_tokenizer(), score, 0))
    assert [record["reward"] for record in records] == [[-0.75], [0]]
    for record in records:
        together = (record["prompt"] + record["continuation"]).replace(" ", "")
        assert words.replace(" ", "").startswith(together)
        assert record["prompt"]
        assert record["continuation"]


def test_comments_are_kept_whole_with_their_label():
    comments = "jigsaw_10k_airdecoding"
    texts = [LabelledText("a", True, comments, "train"), LabelledText("b", False, comments, "train"), *labelled(2)]
    assert [(record["text"], record["reward"]) for record in whole_texts(texts)] == [("a", [-1.0]), ("b", [0.0])]


def test_the_reward_model_tells_an_insult_from_small_talk():
    reward = ToxicityClassifier.from_pretrained("pocket-reward")
    insult, talk, nothing = reward.probabilities(["you stupid idiot", "see you at the station tomorrow", ""])
    assert insult > 0.5 > talk
    assert np.isnan(nothing)
