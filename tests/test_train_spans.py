"""Training of span detectors: what is learnt, the threshold, killed and resumed, and what is refused."""

import json
import random

import numpy as np
import pytest
import torch
from commands import run_command
from span_models import save_backbone
from transformers import TrainerCallback, TrainingArguments

from rectify.cli import main
from rectify.detectors.spans import SpanDetector
from rectify.errors import InvalidArgumentError
from rectify.evaluation.span_f1 import character_f1
from rectify.splits import split_of
from rectify.text_files import AnnotatedText
from rectify.training.spans import LabelledWindows, SpanSettings, collate, train_spans


def examples(count, seed):
    """Words, of which each "bad" is a span; some texts have none."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        words = draw.choices("cefgh", k=draw.randint(1, 5))
        if index % 4:
            words.insert(draw.randint(1, len(words)), "bad")
        text = " ".join(words)
        start = text.find("bad")
        rows.append(AnnotatedText(text, ((start, start + 3),) if start >= 0 else ()))
    return rows


TRAIN, HELD = examples(96, seed=0), examples(24, seed=1)


@pytest.fixture(scope="session")
def trunks(tmp_path_factory):
    folders = {kind: str(tmp_path_factory.mktemp(kind)) for kind in ("encoder", "gpt2")}
    for kind, folder in folders.items():
        save_backbone(kind, folder)
    return folders


def settings(trunks, kind="encoder", **changes):
    return SpanSettings(**{"model_name_or_path": trunks[kind], "max_length": 32, "overlap": 8, **changes})


def arguments(folder, **changes):
    given = {
        "output_dir": str(folder),
        "learning_rate": 1e-2,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 16,
        "train_sampling_strategy": "group_by_length",
        "eval_strategy": "epoch",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**given | changes)


@pytest.mark.parametrize(
    ("kind", "lora_r", "head"), [("encoder", 4, "token"), ("encoder", 4, "segment"), ("gpt2", 0, "segment")]
)
def test_a_rule_is_learnt(trunks, tmp_path, kind, lora_r, head):
    blank = AnnotatedText(" ", ())
    # a whole trunk takes smaller steps than an adapter
    few = arguments(tmp_path, learning_rate=2e-2 if lora_r else 1e-2, num_train_epochs=9, eval_strategy="no")
    trained = train_spans(settings(trunks, kind, head=head, lora_r=lora_r), few, TRAIN, [*HELD, blank])
    loaded = SpanDetector.from_pretrained(tmp_path)
    texts = [row.text for row in HELD]
    f1 = character_f1(loaded.find(texts), [row.spans for row in HELD])
    assert f1.mean() > 0.8
    figures = loaded.config.training["validation"]
    assert figures == {"n": 25, "character_f1": pytest.approx((f1.sum() + 1) / 25)}
    assert loaded.config.threshold == trained.config.threshold
    assert loaded.config.head == head
    assert json.loads((tmp_path / "all_results.json").read_text())["eval_character_f1"] == figures["character_f1"]
    if (kind, head) == ("encoder", "token"):  # its tokenizer knows no casing
        [found] = loaded.find(["c\tf  BAD e"])
        assert [span[:2] for span in found] == [(5, 8)]


class Kill(TrainerCallback):
    """What a kill is to a training: it ends right after a checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step >= 8:
            raise KeyboardInterrupt


@pytest.mark.parametrize("lora_r", [0, 4])
def test_a_killed_training_goes_on_as_if_nothing_had_been(trunks, tmp_path, lora_r):
    how = {"save_strategy": "steps", "save_steps": 4, "num_train_epochs": 2}
    chosen = settings(trunks, lora_r=lora_r, lora_dropout=0.1 * bool(lora_r))
    train_spans(chosen, arguments(tmp_path / "whole", **how), TRAIN, HELD)
    with pytest.raises(KeyboardInterrupt):
        train_spans(chosen, arguments(tmp_path / "cut", **how), TRAIN, HELD, [Kill()])
    with pytest.raises(InvalidArgumentError, match="head 'token', not 'segment'"):
        train_spans(settings(trunks, lora_r=lora_r, head="segment"), arguments(tmp_path / "cut", **how), TRAIN, HELD)
    train_spans(chosen, arguments(tmp_path / "cut", **how), TRAIN, HELD)
    weights = "adapter_model.safetensors" if lora_r else "trunk/model.safetensors"
    for name in ("span_config.json", "head.safetensors", weights):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    with pytest.raises(InvalidArgumentError, match="finished"):
        train_spans(chosen, arguments(tmp_path / "cut", **how), TRAIN, HELD)


@pytest.mark.parametrize("lora_r", [0, 4])
def test_gradient_checkpointing_changes_nothing(trunks, tmp_path, lora_r):
    found = []
    for checkpointing in (False, True):
        how = arguments(tmp_path / str(checkpointing), max_steps=2, gradient_checkpointing=checkpointing)
        found.append(train_spans(settings(trunks, lora_r=lora_r), how, TRAIN[:32], HELD[:4]).state_dict())
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, msg=name)


def test_labels_are_those_of_the_texts_own_tokens(trunks):
    detector = SpanDetector.from_backbone(trunks["encoder"], max_length=10, overlap=2)
    data = LabelledWindows(
        detector, [AnnotatedText("Bad one", ((0, 3),)), AnnotatedText("x" * 3 + " bad " * 3, ())], "x"
    )
    batch = collate([data[0], data[1]])
    assert batch["input_ids"].shape == batch["own"].shape == batch["labels"].shape
    assert batch["labels"][0].nonzero().flatten().tolist() == [1]  # after [CLS]
    assert batch["own"][0].tolist()[:6] == [False, True, True, True, True, False]
    assert not batch["labels"][1].any()
    assert torch.equal(batch["own"] & ~batch["attention_mask"].bool(), torch.zeros_like(batch["own"]))


def test_figures_are_those_of_the_detector(trunks):
    detector = SpanDetector.from_backbone(trunks["encoder"], max_length=14, overlap=4).eval()
    rows = [*HELD, AnnotatedText("a bad long text of words " * 3, ((2, 5),)), AnnotatedText("", ())]
    data = LabelledWindows(detector, rows, "x").by_length()
    logits = np.full((len(data), 14), -100.0)
    with torch.inference_mode():
        for row, item in zip(logits, [data[index] for index in range(len(data))], strict=True):
            batch = collate([item])
            del batch["labels"]
            row[: len(item["own"])] = detector(**batch)[0].numpy()

    class Prediction:
        predictions = logits

    figures = data.figures(Prediction)
    found = detector.find([row.text for row in rows], figures["threshold"])
    assert character_f1(found, [row.spans for row in rows]).mean() == pytest.approx(figures["character_f1"], abs=1e-6)


def test_the_command(trunks, tmp_path, capsys):
    rows = [{"text": row.text, "spans": [list(span) for span in row.spans]} for row in examples(60, 2)]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["train", "spans", "--model_name_or_path", trunks["encoder"], "--train_files", tmp_path / "t.jsonl"]
    given += ["--max_length", 32, "--overlap", 8, "--num_train_epochs", 1, "--use_cpu", "--disable_tqdm", "true"]
    code, _, error = run_command(main, capsys, *given, "--output_dir", tmp_path / "d")
    assert code == 0, error
    parts = [split_of(row["text"]) for row in rows]
    counts = [parts.count(name) for name in ("train", "validation", "test")]
    said = f"texts: {counts[0]} for training, {counts[1]} for validation, {counts[2]} held out for a test\n"
    assert said in error
    assert "validation character F1" in error
    assert SpanDetector.from_pretrained(tmp_path / "d").config.training["texts"] == counts[0]
    (tmp_path / "bad.csv").write_text('spans,text\n"[1, 9]",abc\n')
    for wrong, words in (
        (["--train_files", tmp_path / "bad.csv"], "line 2"),
        (["--head", "third"], "head"),
        (["--lora_r", -1], "lora_r"),
        (["--max_length", 9], "max_length"),
    ):
        code, _, error = run_command(main, capsys, *given, "--output_dir", tmp_path / "n", *wrong)
        assert (code, words in error) == (2, True), error
        assert error.strip().splitlines()[-1].startswith("rectify train spans: error:")
