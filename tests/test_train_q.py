"""`train_q.py`: reading trajectories, training, resuming, and what it measures."""

import errno
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from sklearn.metrics import roc_auc_score
from transformers import TrainerCallback

from rectify import DeadEndQNetwork
from rectify.errors import TrajectoryError
from rectify.hub import load_language_model
from rectify.training import q_training
from rectify.training.hidden_states import CachedStates
from rectify.training.q_calibration import recalibrate
from rectify.training.q_command import main
from rectify.training.q_metrics import network_logits, network_risks, value_metrics
from rectify.training.trajectory_data import Trajectory, TrajectoryDataset, collate, read_trajectories


@pytest.fixture
def folder(tmp_path, make_model, make_tokenizer):
    """A tiny GPT-2 with its tokenizer, and 60 trajectories in which `t5` is toxic."""
    make_model("gpt2").save_pretrained(tmp_path / "lm")
    make_tokenizer().save_pretrained(tmp_path / "lm")
    generator = np.random.default_rng(0)
    lines = []
    for _ in range(60):
        words = [f"t{i}" for i in generator.integers(3, 12, size=8)]
        toxic = "t5" in words[3:]
        record = {"prompt": " ".join(words[:3]), "continuation": " ".join(words[3:]), "reward": [-float(toxic)]}
        lines.append(json.dumps(record) + "\n")
    (tmp_path / "train.jsonl").write_text("".join(lines))
    return tmp_path


def run(folder, output, *flags):
    return main(
        f"--model_name_or_path {folder}/lm --train_file {folder}/train.jsonl --output_dir {folder}/{output} "
        "--per_device_train_batch_size 8 --num_train_epochs 2 --learning_rate 3e-3 --logging_steps 1 --use_cpu "
        "--validation_split_percentage 20 --rank 8 --disable_tqdm true".split()
        + list(flags)
    )


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def test_both_forms_are_read(tmp_path):
    path = tmp_path / "t.json"
    path.write_text(
        '{"text": "a b", "reward": [-1.0]}\n\n{"prompt": "a", "continuation": "b", "reward": -0.25}\n'
        '{"text": "c", "reward": [0]}\n'
    )
    assert read_trajectories([path]) == [
        Trajectory("", "a b", -1.0),
        Trajectory("a", "b", -0.25),
        Trajectory("", "c", 0.0),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 is not JSON"),
        ("[1]", "line 2 is list"),
        ('{"prompt": "a", "reward": 0}', 'line 2 has the fields prompt, reward: give "text"'),
        ('{"text": "a"}', "line 2 has the reward None"),
        ('{"text": "a", "reward": [0.5]}', "line 2 has the reward 0.5"),
        ('{"text": "a", "reward": NaN}', "line 2 has the reward nan"),
        ('{"text": "a", "reward": [0, 0]}', r"line 2 has the reward \[0, 0\]"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path, line, message):
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine", "reward": 0}\n' + line + "\n")
    with pytest.raises(TrajectoryError, match=message):
        read_trajectories([path])


def test_missing_and_empty_files_are_named(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, message in (("none.jsonl", "cannot be read"), ("empty.jsonl", "holds no line")):
        with pytest.raises(TrajectoryError, match=message):
            read_trajectories([tmp_path / name])


def test_what_counts(make_tokenizer):
    trajectories = [Trajectory("t3 t4", "t5 t6", -1.0), Trajectory("", "t7 t8 t9", 0.0), Trajectory("t3", "", 0.0)]
    data = TrajectoryDataset(trajectories, make_tokenizer(), 10)
    assert (len(data), data.too_short, data.truncated) == (2, 1, 0)
    assert data[0] == {"input_ids": [3, 4, 5, 6, 2], "start": 2, "reward": -1.0}
    assert data[1] == {"input_ids": [7, 8, 9, 2], "start": 1, "reward": 0.0}
    plain = TrajectoryDataset(trajectories, make_tokenizer(), 10, append_eos=False, ignore_prompt=False)
    assert plain[0] == {"input_ids": [3, 4, 5, 6], "start": 1, "reward": -1.0}
    batch = collate([data[0], data[1]])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    assert batch["counted"].int().tolist() == [[0, 0, 1, 1, 1], [0, 1, 1, 1, 0]]


def test_the_prompt_is_cut_first_and_from_its_beginning(make_tokenizer):
    trajectory = Trajectory("t3 t4 t5", "t6 t7", 0.0)
    for size, ids, start in ((5, [4, 5, 6, 7, 2], 2), (4, [5, 6, 7, 2], 1), (3, [5, 6, 7], 1), (2, [5, 6], 1)):
        data = TrajectoryDataset([trajectory], make_tokenizer(), size)
        assert data.items == [{"input_ids": ids, "start": start, "reward": 0.0}]
        assert data.truncated == 1


def test_an_end_token_inside_a_text_is_text(make_tokenizer, make_model):
    # pad and end are one token here: the mask must tell them apart
    trajectories = [Trajectory("t3", "t2 t2 t4", -1.0), Trajectory("t3", "t4", 0)]
    data = TrajectoryDataset(trajectories, make_tokenizer(pad="t2"), 9)
    batch = collate(data.items)
    assert batch["attention_mask"].sum().item() == 5 + 3
    assert batch["counted"].sum().item() == 4 + 2


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--td_lambda", "0.5", "--loss", "squared_error", "--polyak_update_lr", "0.2"),
        ("--td_lambda", "0", "--gamma", "0.99", "--behavior_model", "LM", "--lora_r", "2", "--mlp_size", "8"),
        ("--no_ignore_prompt", "--no_append_eos", "--gradient_accumulation_steps", "2", "--bf16"),
    ],
)
def test_it_trains_and_saves_what_generate_loads(folder, flags):
    flags = [f"{folder}/lm" if flag == "LM" else flag for flag in flags]
    assert run(folder, "q", *flags) == 0
    network = DeadEndQNetwork.from_pretrained(folder / "q")
    figures = json.loads((folder / "q" / "all_results.json").read_text())
    assert {"eval_loss", "eval_auc_50", "eval_auc_100", "eval_brier", "eval_calibration_error"} <= figures.keys()
    assert network.config.training["td_lambda"] == float(flags[1] if "--td_lambda" in flags else 1.0)
    assert network.config.training["eval_loss"] == figures["eval_loss"]
    assert network.config.vocabulary is not None


def test_it_learns_which_token_is_toxic(folder):
    assert run(folder, "q", "--num_train_epochs", "25") == 0
    network = DeadEndQNetwork.from_pretrained(folder / "q")
    values = network(torch.tensor([[7, 8, 9]]))[0, -1]
    assert values[5] < values[[3, 4, 6, 7, 8, 9]].min() - 0.2


class _Killed(Exception):
    pass


class _Kill(TrainerCallback):
    def on_log(self, args, state, control, **_):
        if state.global_step == 9:
            raise _Killed


@pytest.mark.parametrize(
    "flags",
    [
        ("--td_lambda", "0.5"),
        ("--lora_r", "2", "--td_lambda", "0.5"),
        ("--trunk", "shared", "--mlp_size", "8", "--td_lambda", "0.5"),
    ],
)
def test_a_resumed_run_is_the_uninterrupted_one(folder, flags, monkeypatch):
    flags = [*flags, "--save_strategy", "steps", "--save_steps", "4"]
    assert run(folder, "whole", *flags) == 0
    trainer_class = q_training.QTrainer

    def killed_trainer(*arguments, callbacks, **named):
        return trainer_class(*arguments, callbacks=[*callbacks, _Kill()], **named)

    with monkeypatch.context() as patch:
        patch.setattr(q_training, "QTrainer", killed_trainer)
        with pytest.raises(_Killed):
            run(folder, "parts", *flags)
    # as if killed while the newest checkpoint was written
    (folder / "parts" / "checkpoint-8" / "trainer_state.json").write_text("{")
    assert run(folder, "parts", *flags) == 0
    for name in ("head.safetensors", *(["adapter/adapter_model.safetensors"] if "--lora_r" in flags else [])):
        whole, parts = load_file(folder / "whole" / name), load_file(folder / "parts" / name)
        assert all(torch.equal(whole[key], parts[key]) for key in whole)
    results = [json.loads((folder / name / "all_results.json").read_text()) for name in ("whole", "parts")]
    assert results[0]["eval_loss"] == results[1]["eval_loss"]
    curves = [
        [entry["loss"] for entry in json.loads(path.read_text())["log_history"] if "loss" in entry]
        for path in (max((folder / name).glob("checkpoint-*/trainer_state.json")) for name in ("whole", "parts"))
    ]
    assert curves[0] == curves[1]


def test_a_head_is_trained_on_the_models_own_states(folder):
    flags = ("--trunk", "shared", "--mlp_size", "16", "--num_train_epochs", "30", "--learning_rate", "1e-2")
    assert run(folder, "q", *flags) == 0
    files = {path.name for path in (folder / "q").iterdir() if path.is_file()}
    assert {"q_config.json", "head.safetensors", "all_results.json"} <= files
    assert not [name for name in files if name.startswith("states")]
    assert not (folder / "q" / "trunk").exists()
    model, _ = load_language_model(str(folder / "lm"))
    network = DeadEndQNetwork.from_pretrained(folder / "q", model=model)
    assert network.trunk is model.base_model
    assert json.loads((folder / "q" / "all_results.json").read_text())["eval_auc_100"] > 0.9


@pytest.mark.parametrize("flags", [("--lora_r", "2"), ("--trunk", "shared")])
def test_gradient_checkpointing_changes_nothing(folder, flags):
    for output, checkpointing in (("plain", "false"), ("checkpointed", "true")):
        assert run(folder, output, "--gradient_checkpointing", checkpointing, "--max_steps", "2", *flags) == 0
    plain, checkpointed = (load_file(folder / name / "head.safetensors") for name in ("plain", "checkpointed"))
    for name, weight in plain.items():
        torch.testing.assert_close(checkpointed[name], weight, msg=name)


def test_cached_states_are_those_of_the_trunk_and_go_on_after_a_kill(folder, make_model, make_tokenizer, spy):
    network = DeadEndQNetwork.from_trunk(make_model("gpt2"), shared=True)
    trajectories = TrajectoryDataset(read_trajectories([folder / "train.jsonl"]), make_tokenizer(), 64)
    runs = spy(network)
    whole = CachedStates(network, trajectories, folder / "a.bin", "key", batch_size=8, progress=False)
    assert len(runs) == 8
    for index in (0, 7, 59):
        ids = torch.tensor([whole[index]["input_ids"]])
        with torch.no_grad():
            expected = network.encode(ids)[0]
        assert torch.allclose(whole[index]["hidden"].float(), expected, rtol=0.01, atol=0.01)
    batch = collate([whole[3], whole[4]])
    assert batch["hidden"].shape == (*batch["input_ids"].shape, 32)
    # as if killed after three batches, the rest not yet written
    beside = folder / "a.json"
    beside.write_text(json.dumps(json.loads(beside.read_text()) | {"done": 3}))
    before = (folder / "a.bin").read_bytes()
    del runs[:]
    CachedStates(network, trajectories, folder / "a.bin", "key", batch_size=8, progress=False)
    assert len(runs) == 5
    assert (folder / "a.bin").read_bytes() == before
    del runs[:]
    CachedStates(network, trajectories, folder / "a.bin", "another", batch_size=8, progress=False).remove()
    assert len(runs) == 8
    assert not (folder / "a.bin").exists()
    assert not beside.exists()


def test_a_checkpoint_holds_no_frozen_weights(folder):
    assert run(folder, "q", "--lora_r", "2", "--max_steps", "1", "--save_strategy", "steps", "--save_steps", "1") == 0
    names = load_file(folder / "q" / "checkpoint-1" / "model.safetensors").keys()
    assert any("lora_A" in name for name in names)
    assert all("lora_" in name or ".head." in name for name in names)


def test_a_network_that_could_not_be_written_is_not_taken_for_a_finished_one(folder, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("rectify.q_network.save_file", full)
        assert run(folder, "full", "--max_steps", "1") == 2
    assert "No space left on device" in capsys.readouterr().err.splitlines()[-1]
    assert run(folder, "full", "--max_steps", "1") == 0


def test_foreign_and_finished_folders_are_refused(folder, capsys):
    assert run(folder, "q", "--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1") == 0
    assert run(folder, "q", "--max_steps", "2") == 2
    assert "holds a finished training" in capsys.readouterr().err
    (folder / "q" / "q_config.json").unlink()
    assert run(folder, "q", "--max_steps", "3") == 2
    assert "max_steps 2, not 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--td_lambda", "1.5"), "td_lambda is 1.5: give a number from 0 to 1"),
        (("--q_min", "0"), "q_min is 0.0 and q_max 0.0"),
        (("--behavior_model", "gpt2"), "Monte Carlo asks no policy"),
        (("--rank", "0"), "rank is 0"),
        (("--trunk", "shared", "--lora_r", "2"), "lora_r is 2 with trunk 'shared'"),
        (("--block_size", "1"), "block_size is 1"),
        (("--no_such_flag",), "no_such_flag"),
        (("--train_file", "none.jsonl"), "none.jsonl' cannot be read"),
        (("--model_name_or_path", "./nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(folder, capsys, flags, message):
    try:
        code = run(folder, "q", *flags)
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    assert error.startswith("train_q.py: error: ")
    assert message in error


# ---------------------------------------------------------------------------------------------------------------------
# Figures


def test_value_metrics_are_those_of_a_loop():
    generator = np.random.default_rng(0)
    risks = generator.random((30, 9))
    lengths = generator.integers(1, 10, size=30)
    starts = generator.integers(0, 3, size=30)
    for row in range(30):
        risks[row, starts[row] + lengths[row] :] = math.nan
        risks[row, : min(starts[row], starts[row] + lengths[row] - 1)] = math.nan
    toxic = generator.random(30) < 0.4
    figures = value_metrics(risks, toxic)
    kept = [row[~np.isnan(row)] for row in risks]
    for percent in (25, 50, 75, 100):
        at = [row[max(1, math.ceil(len(row) * percent / 100)) - 1] for row in kept]
        assert figures[f"auc_{percent}"] == pytest.approx(roc_auc_score(toxic, at))
    flat = [(p, label) for row, label in zip(kept, toxic, strict=True) for p in row]
    assert figures["brier"] == pytest.approx(sum((p - label) ** 2 for p, label in flat) / len(flat))
    rate = sum(label for _, label in flat) / len(flat)
    assert figures["brier_constant"] == pytest.approx(rate * (1 - rate))


def test_one_outcome_has_no_auc():
    figures = value_metrics(np.array([[0.1, 0.3]]), np.array([False]))
    assert "auc_100" not in figures
    assert figures["brier"] == pytest.approx((0.01 + 0.09) / 2)


def test_recalibration_fits_scale_and_shift(make_q_network):
    network = make_q_network()
    generator = torch.Generator().manual_seed(0)
    items = [{"input_ids": torch.randint(3, 97, (12,), generator=generator).tolist(), "start": 1} for _ in range(200)]
    logits, _ = network_logits(network, [{**item, "reward": 0.0} for item in items])
    # outcomes that are more extreme and rarer than the network says
    risk = 1 / (1 + np.exp(1 - 2 * np.nanmean(logits, -1)))
    toxic = np.random.default_rng(0).random(200) < risk
    rollouts = [{**item, "reward": -float(bad)} for item, bad in zip(items, toxic, strict=True)]
    scale, shift = recalibrate(network, rollouts)
    after, labels = network_logits(network, rollouts)
    np.testing.assert_allclose(after, scale * logits + shift, atol=1e-4, rtol=1e-4)
    risks, _ = network_risks(network, rollouts)
    assert np.nanmean(risks) == pytest.approx(labels.mean(), abs=0.01)
