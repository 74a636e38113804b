"""Instruction-style detectors: label confidence, answers, what is trained on, and training in two stages."""

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from byte_model import byte_model, save_byte_model
from commands import run_command
from transformers import TrainerCallback

from rectify.cli import main
from rectify.detectors.decisions import Writing, decisions
from rectify.detectors.instruction import InstructionConfig, InstructionDetector
from rectify.detectors.templates import TEMPLATES, Problem, Template
from rectify.errors import CheckpointError, InvalidArgumentError, TrajectoryError
from rectify.sampling import Sampling
from rectify.scoring import Reason, load_scorer
from rectify.scoring.cascade import CascadeConfig
from rectify.training import instruction_command
from rectify.training.instruction import EncodedRows
from rectify.training.instruction_rows import (
    InstructionRow,
    asked_otherwise,
    read_instruction_rows,
    with_instruction,
)
from rectify.training.language_model import LEFT_OUT

# "so" is one token, and so are " y" and "no"; "maybe" has five
MERGES = (("s", "o"), ("Ġ", "y"), ("n", "o"))
THREE = Template("Q {text}\n", "so ", ("yes", "no", "maybe"), ("yes", "maybe"))
TEXTS = ["short", "a much, much longer text of many bytes than any other", "你好，世界", "x"]


def detector(template=THREE, **changes):
    model, tokenizer = byte_model(MERGES)
    return InstructionDetector(InstructionConfig("bytes", template, **changes), model, tokenizer)


def slow_probabilities(found, prompt, template=THREE, written=""):
    """Each label by itself, without padding or cache, in float64."""
    logs = []
    model = found.model.double()
    for label in template.labels:
        start = found.tokenizer(prompt)["input_ids"]
        answer = found.tokenizer(f"{written}{template.lead}{label}", add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*start, *answer]])
        logits = model(ids).logits[0].log_softmax(-1)
        logs.append(sum(logits[len(start) + place - 1, token] for place, token in enumerate(answer)))
    model.float()
    return torch.stack(logs).softmax(-1).detach().numpy()


# --- label confidence


def test_the_confidence_is_that_of_all_tokens_of_a_label_in_any_batch():
    found = detector()
    whole = found.label_probabilities(TEXTS)
    slow = np.array([slow_probabilities(found, found.prompt(text)) for text in TEXTS])
    assert np.abs(np.log(whole) - np.log(slow)).max() < 1e-4
    assert np.allclose(whole.sum(-1), 1)
    single = np.concatenate([found.label_probabilities([text]) for text in TEXTS])
    assert np.abs(whole - single).max() < 1e-5
    assert np.abs(found.label_probabilities(TEXTS, batch_size=2) - whole).max() < 1e-5
    assert whole.std(0)[:2].min() > 1e-3  # else the test says nothing
    assert np.isnan(found.label_probabilities([" ", "x"])[0]).all()
    for template in (THREE, TEMPLATES["explained"]):
        assert detector(template).label_probabilities([]).shape == (0, 3)
    with pytest.raises(InvalidArgumentError, match=r"texts\[1\] is .* valid Unicode"):
        found.label_probabilities(["x", "\ud800"])
    assert np.allclose(found.toxicity(whole), whole[:, 0] + whole[:, 2])


def test_the_temperature_flattens_it():
    plain, warm = detector().label_probabilities(TEXTS), detector(temperature=2.0).label_probabilities(TEXTS)
    roots = np.sqrt(plain)
    assert np.allclose(warm, roots / roots.sum(-1, keepdims=True))


def test_the_published_confidence_is_another():
    """Scores after nucleus sampling, read at place −2 of a padded batch, are no probability of the label.

    Source: `get_score_final.py` of mjy2357/Toxic_content_detection.
    """
    found = detector()
    prompts = [found.prompt(text) + "so" for text in TEXTS]  # the label is the next token
    inputs = found.tokenizer(prompts, return_tensors="pt", padding=True)
    logits = found.model(**inputs, position_ids=(inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)).logits[:, -1]
    label = logits.argmax(-1)
    raw = logits.softmax(-1).gather(-1, label[:, None])[:, 0]
    warped = Sampling(do_sample=True, top_p=0.7).warpers()(inputs["input_ids"], logits)
    published = warped.softmax(-1).gather(-1, label[:, None])[:, 0]
    # what is left after the nucleus is scaled up: surer than the model is, and wholly sure where the winner fills it
    assert (published > raw + 0.01).any()
    assert (published[raw >= 0.7] == 1).all()
    # generated rows of unequal length: two from the end is the label in the longest alone
    rows = [[7, 0], [7, 8, 0]]
    padded = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=0)
    assert [row[-2].item() for row in padded] == [0, 8]
    assert [row[len(own) - 2].item() for row, own in zip(padded, rows, strict=True)] == [7, 8]


def test_what_a_tokenizer_cannot_do_is_refused():
    with pytest.raises(InvalidArgumentError, match="begins another"):
        detector(Template("{text}", "L: ", ("no", "nothing"), ("no",)))
    with pytest.raises(InvalidArgumentError, match="no chat template"):
        detector(chat=True)


# --- answers


def write(found, answers, monkeypatch):
    """Have the detector's generator write these answers."""
    from rectify.generation.generator import Continuation, Generator

    def continue_batch(self, prompts, number=0, processor=None):
        rows = []
        for prompt in prompts:
            answer, ended = next(one for text, one in answers.items() if text in prompt.text)
            ids = tuple(found.tokenizer(answer, add_special_tokens=False)["input_ids"]) + (0,) * ended
            rows.append([Continuation(answer, ids)])
        return rows

    monkeypatch.setattr(Generator, "continue_batch", continue_batch)


def test_a_written_label_is_weighed_where_it_stands(monkeypatch):
    found = detector()
    write(
        found,
        {"short": ("why so yes", True), "longer": ("so maybe", True), "你好": ("so maybe", False), "x": ("yes", True)},
        monkeypatch,
    )
    answers = found.answers(TEXTS)
    assert [answer.parsed.label for answer in answers] == ["yes", "maybe", None, None]
    assert [answer.parsed.problem for answer in answers] == [None, None, Problem.TRUNCATED, Problem.NO_LABEL]
    assert answers[0].parsed.fields == {"rationale": "why"}
    for place, written in ((0, "why "), (1, "")):
        slow = slow_probabilities(found, found.prompt(TEXTS[place]), written=written)
        assert np.abs(answers[place].probabilities - slow).max() < 1e-5
    assert np.isnan(answers[2].probabilities).all()
    direct = found.label_probabilities(TEXTS)
    assert np.abs(answers[1].probabilities - direct[1]).max() < 1e-5


def test_answers_do_not_depend_on_the_batch():
    found = detector()
    how = {"sampling": Sampling(do_sample=True, temperature=0.5), "max_new_tokens": 6, "seed": 3}
    whole = found.answers(TEXTS, **how)
    assert [answer.output for answer in whole] == [found.answers([text], **how)[0].output for text in TEXTS]
    assert len({answer.output for answer in whole}) > 1
    assert found.answers([" "])[0].parsed.label is None


def test_long_texts_are_cut_and_longer_ones_than_the_context_refused():
    found = detector(max_length=5)
    assert found.prompt("abcdefgh") == "Q abcde\n"
    assert found.prompt("你好世界") == "Q 你好\n"  # the fifth byte is within the second character
    with pytest.raises(InvalidArgumentError, match="max_length is 600"):
        detector(max_length=600).label_probabilities(["x" * 700])


# --- what is trained on


def test_tables_alpaca_records_and_ready_texts_are_read(tmp_path):
    toxic, explained = TEMPLATES["toxic"], TEMPLATES["explained"]
    table = tmp_path / "t.csv"
    table.write_text("comment,class,rationale\nhello,0,It greets.\nidiot,1,\n ,1,\nodd,2,\n")
    found = read_instruction_rows([table], toxic, ["comment"], ["class"], "2=")
    assert found.rows == [
        InstructionRow("", "hello", "It greets. Label: non-toxic", "non-toxic"),
        InstructionRow("", "idiot", "Label: toxic", "toxic"),
    ]
    assert str(found) == "2 rows, 1 blank left out, 1 unlabelled left out"
    table.write_text("comment,class,rationale\nidiot,1,It insults. Label: toxic\nhello,0,It greets.\n")
    found = read_instruction_rows([table], toxic, ["comment"], ["class"])
    assert str(found) == "1 rows, 1 unparsed left out"
    alpaca = tmp_path / "a.json"
    records = [{"instruction": "判断", "input": "你好", "output": "它问好。 不良内容：否"}]
    alpaca.write_text(
        json.dumps([*records, {"instruction": "判断", "input": "滚", "output": "是"}], ensure_ascii=False)
    )
    found = read_instruction_rows([alpaca], TEMPLATES["chinese"], ["text"], ["label"])
    assert found.rows == [InstructionRow("判断\n你好", "你好", "它问好。 不良内容：否", "否")]
    assert found.unparsed == 1
    alpaca.write_text(json.dumps([{"instruction": "Is 'x' rude?", "input": None, "output": "Label: toxic"}]))
    (row,) = read_instruction_rows([alpaca], toxic, ["text"], ["label"]).rows
    assert (row.question, row.text) == ("Is 'x' rude?", "Is 'x' rude?")
    assert with_instruction(TEMPLATES["chinese"], {"判断"}).ask("滚") == "判断\n滚"
    assert with_instruction(toxic, {"a", "b"}) is toxic
    ready = tmp_path / "r.json"
    answer = explained.write("neutral", {"explanation": "fine"})
    ready.write_text(json.dumps([{"text": f"###User: what of 'x'?\n\n### Assistant: {answer}"}]))
    (row,) = read_instruction_rows([ready], explained, ["text"], ["label"]).rows
    assert (row.question, row.answer, row.label) == ("###User: what of 'x'?\n\n### Assistant:\n", answer, "neutral")
    assert asked_otherwise([row], explained) == 1
    assert asked_otherwise([row], replace(explained, prompt="###User: what of '{text}'?\n\n### Assistant:\n")) == 0
    assert asked_otherwise([InstructionRow("", "x", answer, "neutral")], explained) == 0


def test_what_cannot_be_read_is_refused_by_its_line(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "a", "label": "hate"}\n{"text": "b", "label": "odd"}\n')
    with pytest.raises(TrajectoryError, match="line 2: label is 'odd', which is none of neutral, offensive, hate"):
        read_instruction_rows([path], TEMPLATES["explained"], ["text"], ["label"])
    with pytest.raises(InvalidArgumentError, match="'odd=vile' cannot be used"):
        read_instruction_rows([path], TEMPLATES["explained"], ["text"], ["label"], "odd=vile")
    with pytest.raises(TrajectoryError, match="no column 'class'"):
        read_instruction_rows([path], TEMPLATES["explained"], ["text"], ["class"])
    (tmp_path / "u.json").write_text(r'[{"instruction": "a", "input": "\ud800", "output": "Label: toxic"}]')
    with pytest.raises(TrajectoryError, match="record 0: no valid Unicode"):
        read_instruction_rows([tmp_path / "u.json"], TEMPLATES["toxic"], ["text"], ["label"])
    (tmp_path / "l.json").write_text('[{"text": "a"},')
    with pytest.raises(TrajectoryError, match="begins a JSON list and is none"):
        read_instruction_rows([tmp_path / "l.json"], TEMPLATES["toxic"], ["text"], ["label"])


def test_the_loss_is_on_the_answer_alone():
    found = detector()
    rows = EncodedRows(
        found, [InstructionRow("", "hi", "so yes", "yes"), InstructionRow("", "y" * 600, "so no", "no")], "train"
    )
    assert (len(rows), rows.too_long) == (2, 0)  # cut to max_length
    item = rows[0]
    counted = [token for token in item["labels"] if token != LEFT_OUT]
    assert found.tokenizer.decode(counted) == "so yes<end>"
    assert found.tokenizer.decode(item["input_ids"]) == "Q hi\nso yes<end>"
    assert len(item["labels"]) == len(item["input_ids"])
    question = "y" * (512 - len("so no") - 1)
    close = [InstructionRow("q", "q", "so no", "no"), InstructionRow(question, question, "so no", "no")]
    assert EncodedRows(found, close, "train").too_long == 0
    held = EncodedRows(found, close, "validation", found.room)
    assert (held.rows, held.too_long) == (close[:1], 1)  # "maybe" would be longer than the context
    found.prompt_probabilities([question[: 512 - found.room]])
    with pytest.raises(InvalidArgumentError, match="make 513 tokens"):
        found.prompt_probabilities([question[: 513 - found.room]])


# --- training and use


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, and files of labels, of rationales and of labels for validation."""
    folder = tmp_path_factory.mktemp("instruction")
    save_byte_model(folder / "base")
    rows = [{"text": f"{'ab'[number % 2] * 3} {number}", "label": number % 2} for number in range(28)]
    parts = {"labels": rows[:12], "validation": rows[20:]}
    parts["rationales"] = [row | {"rationale": "It has " + "ab"[row["label"]]} for row in rows[12:20]]
    for name, part in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


def flags(place, output, **changes):
    settings = {
        "model_name_or_path": place / "base",
        "train_files": place / "labels.jsonl",
        "rationale_files": place / "rationales.jsonl",
        "validation_files": place / "validation.jsonl",
        "output_dir": output,
        "prompt": "{text}?",
        "num_train_epochs": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        **changes,
    }
    return ["--use_cpu", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def trained(place):
    """Trained in one go: the folder with the rationales' stage, the control, and the detector."""
    assert main(["train", "instruction", *flags(place, place / "whole")]) == 0
    return place / "whole"


class Stop(TrainerCallback):
    """Interrupts a stage when its checkpoint of a step has been written."""

    def __init__(self, stage, step):
        self.stage, self.step = stage, step

    def on_save(self, arguments, state, control, **_):
        if Path(arguments.output_dir).name == self.stage and state.global_step == self.step:
            raise KeyboardInterrupt


def test_stages_that_were_interrupted_end_as_uninterrupted(place, trained, capsys, monkeypatch):
    output = place / "resumed"
    arguments = ["train", "instruction", *flags(place, output)]
    train = instruction_command.train_instruction
    for stage, step in (("rationales", 2), ("resumed", 3)):
        stopping = partial(train, callbacks=[Stop(stage, step)])
        monkeypatch.setattr(instruction_command, "train_instruction", stopping)
        assert run_command(main, capsys, *arguments)[0] == 130
        assert (output / "control").exists() == (stage == "resumed")
    monkeypatch.setattr(instruction_command, "train_instruction", train)
    code, _, err = run_command(main, capsys, *arguments)
    assert code == 0, err
    for part in ("rationales", "control", "."):
        for file in ("adapter_model.safetensors", "instruction_config.json"):
            assert (output / part / file).read_bytes() == (trained / part / file).read_bytes()
    assert re.search("rationales: 8 rows; .*\ncontrol: 20 rows; .*\nlabels: 12 rows; ", err)
    assert "finished training" in run_command(main, capsys, *arguments)[2]


def test_the_second_stage_goes_on_from_the_first_and_the_control_begins_anew(trained):
    starts = {
        name: json.loads((trained / name / "run_settings.json").read_text())["start"]
        for name in ("rationales", "control", ".")
    }
    assert (starts["rationales"], starts["control"]) == (None, None)
    assert starts["."] is not None


def test_other_rationales_do_not_continue_a_stage(place, trained, tmp_path, capsys):
    (trained / "all_results.json").rename(trained / "kept.json")
    try:
        code, _, err = run_command(main, capsys, "train", "instruction", *flags(place, trained, rationale_epochs=5))
        assert code == 2
        assert "rationales' holds a finished training with num_train_epochs 2.0, not 5.0" in err
    finally:
        (trained / "kept.json").rename(trained / "all_results.json")


def test_no_stage_learns_a_validation_text(place, tmp_path, capsys, monkeypatch):
    given = []
    monkeypatch.setattr(instruction_command, "train_instruction", lambda *parts: given.append(parts[3:]) or {})
    every = tmp_path / "rationales.jsonl"
    every.write_text("".join((place / f"{name}.jsonl").read_text() for name in ("labels", "rationales", "validation")))
    call = flags(place, tmp_path / "out", train_files=place / "labels.jsonl", rationale_files=every)
    code, _, err = run_command(main, capsys, "train", "instruction", *call)
    assert code == 0, err
    assert "validation: 8 rows; 8 train and rationale rows with their texts left out" in err
    at = call.index("--validation_files")
    del call[at : at + 2]
    assert run_command(main, capsys, "train", "instruction", *call, "--validation_share", 0.4)[0] == 0
    for train, held, rationales in given:
        texts = [{row.text for row in part} for part in (train, held, rationales)]
        assert all(texts)
        assert not texts[1] & (texts[0] | texts[2])
    call[call.index("--rationale_files") + 1] = str(place / "labels.jsonl")
    call[call.index("--train_files") + 1] = str(place / "validation.jsonl")
    call += ["--validation_files", str(place / "labels.jsonl")]
    assert "no row of them is left" in run_command(main, capsys, "train", "instruction", *call)[2]


def test_a_validation_row_that_is_too_long_ends_no_finished_training(place, tmp_path, capsys):
    rows = [{"instruction": "Q", "input": f"x {n}", "output": f"Label: {'non-' * (n % 2)}toxic"} for n in range(6)]
    (tmp_path / "t.json").write_text(json.dumps(rows[:4]))
    (tmp_path / "v.json").write_text(json.dumps([*rows[4:], rows[0] | {"input": "y" * 600}]))
    call = flags(place, tmp_path / "out", train_files=tmp_path / "t.json", validation_files=tmp_path / "v.json",
                 max_steps=1)  # fmt: skip
    at = call.index("--rationale_files")
    del call[at : at + 2]
    code, _, err = run_command(main, capsys, "train", "instruction", *call)
    assert code == 0, err
    assert re.search("labels: 4 rows; on the validation rows: .* n 2, .* too_long 1", err)


def test_a_cascade_is_as_sure_as_the_label_that_was_written(trained, tmp_path, monkeypatch):
    write(InstructionDetector.from_pretrained(trained), {"a": ("Label: non-toxic", True)}, monkeypatch)
    CascadeConfig(f"instruction:{trained}", "stub", 0, 2.0).save_pretrained(tmp_path)
    (record,) = decisions(f"cascade:{tmp_path}", ["aaa 1"], Writing(write=True), "cpu")
    assert record["label"] == "non-toxic"
    assert record["confidence"] == 1 - record["toxicity"] < 0.5  # the model would have said another


def test_a_detector_is_a_scorer_and_a_verb_writes_records_and_a_table(trained, tmp_path, capsys):
    scorer = load_scorer(f"instruction:{trained}", device="cpu")
    scores = scorer.score(["aaa 1", " ", "bbb 2"])
    found = InstructionDetector.from_pretrained(trained)
    assert np.allclose(scores["TOXICITY"][[0, 2]], found.label_probabilities(["aaa 1", "bbb 2"])[:, 1], atol=1e-6)
    assert scores.reasons == (None, Reason.COMMENT_EMPTY, None)
    texts, output = tmp_path / "t.txt", tmp_path / "o.jsonl"
    texts.write_text("aaa 1\nbbb 2\n")
    table = tmp_path / "made" / "o.csv"
    call = ["detect", texts, "--detector", f"instruction:{trained}", "--device", "cpu", "--output", output]
    code, out, err = run_command(main, capsys, *call, "--csv", table)
    assert (code, out) == (0, ""), err
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["toxicity"] for record in records] == pytest.approx(scores["TOXICITY"][[0, 2]], abs=1e-6)
    assert table.read_text().startswith("text,label,confidence,toxicity,decided_by,output")
    assert run_command(main, capsys, *call)[0] == 0
    assert len(output.read_text().splitlines()) == 2
    assert "was begun with seed" in run_command(main, capsys, *call, "--seed", "1")[2]
    for taken in (texts, output):
        assert "as well: give another one" in run_command(main, capsys, *call, "--csv", taken)[2]
    code, out, err = run_command(
        main,
        capsys,
        *["detect", "--text", "aaa 1", *call[2:6]],
        "--do_sample",
        "--temperature",
        "2",
        "--max_new_tokens",
        5,
    )
    assert json.loads(out)["label"] == "unparsed"
    assert "texts: 1, 1 unparsed" in err
    assert "add --do_sample" in run_command(main, capsys, *call[:-2], "--top_p", "0.5")[2]


def test_other_weights_under_the_adapter_are_refused(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "d")
    path = tmp_path / "d" / "instruction_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": "0"}))
    with pytest.raises(CheckpointError, match="was trained on weights 0 of"):
        InstructionDetector.from_pretrained(tmp_path / "d")


def test_folders_without_a_detector_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no instruction_config.json"):
        InstructionDetector.from_pretrained(tmp_path)
