"""The README's three commands, on a tiny random GPT-2: trajectories, training, rectified generation."""

import json

from rectify import DeadEndQNetwork
from rectify.cli import main as rectify
from rectify.detectors import ToxicityClassifier
from rectify.generation.command import main as generate
from rectify.training.q_command import main as train_q


def test_your_own_model_in_three_commands(tmp_path, make_model, make_tokenizer, monkeypatch):
    make_model("gpt2").save_pretrained(tmp_path / "gpt2")
    make_tokenizer().save_pretrained(tmp_path / "gpt2")
    ToxicityClassifier.from_backbone(str(tmp_path / "gpt2"), max_length=64).save_pretrained(tmp_path / "detector")
    texts = [" ".join(f"t{(7 * row + step * row) % 90 + 3}" for step in range(30)) for row in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    monkeypatch.chdir(tmp_path)
    build = "build trajectories --model gpt2 --reward_model detector --texts texts.jsonl --n 4 --output_dir data"
    assert rectify(build.split()) == 0
    train = (
        "--model_name_or_path gpt2 --train_file data/train.jsonl --validation_file data/validation.jsonl "
        "--num_train_epochs 1 --use_cpu --output_dir q"
    )
    assert train_q(train.split()) == 0
    assert DeadEndQNetwork.from_pretrained("q").config.training["train_trajectories"] > 20
    said = "--model gpt2 --rectify --q q --prompt t5 --max_new_tokens 5 --output out.jsonl"
    assert generate(said.split()) == 0
    assert len(json.loads((tmp_path / "out.jsonl").read_text())["generations"]) == 1
