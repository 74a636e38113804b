"""Train the pocket models: a small language model that degenerates as real ones do, a reward model, and a Q network.

    python -m rectify.pocket.build --data DATA --output OUTPUT

`DATA` holds one folder per data set (see `rectify.pocket.texts`). Stages whose result lies in `OUTPUT` are skipped, and
an interrupted training goes on from its last checkpoint, so the same command restarts a killed run. `OUTPUT/lm`,
`OUTPUT/reward`, `OUTPUT/q` and `OUTPUT/q_shared` are what `rectify/pocket` holds.
"""

from __future__ import annotations

import argparse
import logging
from functools import partial
from pathlib import Path

from rectify.detectors import ToxicityClassifier
from rectify.hub import load_language_model
from rectify.pocket.dead_ends import train_pocket_q
from rectify.pocket.language_model import train_language_model
from rectify.pocket.reward_model import labelled_rows, rewards, train_reward_model
from rectify.pocket.texts import LabelledText, read_fragments, read_texts
from rectify.pocket.trajectories import cut_texts, roll_out, whole_texts, write


def build_data(texts: list[LabelledText], output: Path, rollouts: int, seed: int) -> tuple[list[Path], list[Path]]:
    """The trajectory files for training, and rollouts after validation texts; made where they are missing."""
    model, tokenizer = load_language_model(str(output / "lm"))
    score = partial(rewards, ToxicityClassifier.from_pretrained(output / "reward.work"))
    train = [text for text in texts if text.split == "train"]
    validation = [text for text in texts if text.split == "validation"]
    held = roll_out(validation, model, tokenizer, score, rollouts // 16, output / "validation", seed + 1)
    files = roll_out(train, model, tokenizer, score, rollouts, output / "train", seed + 2)
    cut, whole = output / "train" / "cut.jsonl", output / "train" / "whole.jsonl"
    if not cut.exists():
        write(cut_texts(train, tokenizer, score, seed), cut)
    if not whole.exists():
        write(whole_texts(train), whole)
    return [*files, cut, whole, whole], held  # few comments among many rollouts


def main() -> None:
    """Run the stages that are not done."""
    parser = argparse.ArgumentParser(description="Train the pocket models.")
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--output", type=Path, required=True, help="folder for the models and the checkpoints")
    parser.add_argument("--epochs", type=float, default=3.5, help="of the language model (default: %(default)s)")
    parser.add_argument("--reward_epochs", type=float, default=1.0, help="of the reward model (default: %(default)s)")
    parser.add_argument("--q_epochs", type=float, default=2.0, help="of the Q network (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=96_000, help="sampled continuations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    texts = list(read_texts(arguments.data))
    if not (output / "lm" / "tokenizer.json").exists():
        train_language_model(texts, output / "lm", arguments.epochs, arguments.seed)
    if not (output / "reward" / "detector_config.json").exists():
        rows = labelled_rows(texts, list(read_fragments(arguments.data)), arguments.seed)
        train_reward_model(output / "lm", *rows, output / "reward", arguments.reward_epochs, arguments.seed)
    missing = [name for name in ("q", "q_shared") if not (output / name / "q_config.json").exists()]
    if missing:
        files, held = build_data(texts, output, arguments.rollouts, arguments.seed)
        for name in missing:
            shared = name == "q_shared"
            # without a trunk to run, an epoch takes little
            epochs = arguments.q_epochs * (2 if shared else 1)
            train_pocket_q(output / "lm", files, held, output / name, epochs, arguments.seed, shared)


if __name__ == "__main__":
    main()
