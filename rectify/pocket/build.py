"""Train the pocket models: a small language model that degenerates as real ones do, and its dead-end Q network.

    python -m rectify.pocket.build --data DATA --output OUTPUT

`DATA` holds one folder per data set (see `rectify.pocket.texts`). Stages whose result lies in `OUTPUT` are skipped, and
an interrupted training goes on from its last checkpoint, so the same command restarts a killed run. `OUTPUT/lm` and
`OUTPUT/q` are what `rectify/pocket` holds.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from rectify.hub import load_language_model
from rectify.pocket.dead_ends import train_q_network
from rectify.pocket.language_model import train_language_model
from rectify.pocket.rewards import fit_reward_model, validation_auc
from rectify.pocket.texts import LabelledText, read_texts
from rectify.pocket.trajectories import cut_texts, read, roll_out, write

logger = logging.getLogger(__name__)


def build_trajectories(texts: list[LabelledText], output: Path, rollouts: int, seed: int) -> None:
    """Write `train.jsonl` (rollouts and cut texts) and `validation.jsonl` (rollouts only)."""
    model, tokenizer = load_language_model(str(output / "lm"))
    reward_model = fit_reward_model(texts, seed)
    logger.info("reward model: AUC %.3f on validation texts", validation_auc(reward_model, texts))
    train = [text for text in texts if text.split == "train"]
    validation = [text for text in texts if text.split == "validation"]
    held = roll_out(validation, model, tokenizer, reward_model, rollouts // 10, seed + 1)
    own = roll_out(train, model, tokenizer, reward_model, rollouts, seed + 2)
    write(held, output / "validation.jsonl")
    write(own + cut_texts(train, tokenizer, reward_model, seed), output / "train.jsonl")


def main() -> None:
    """Run the stages that are not done."""
    parser = argparse.ArgumentParser(description="Train the pocket models.")
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per data set")
    parser.add_argument("--output", type=Path, required=True, help="folder for the models and the checkpoints")
    parser.add_argument("--epochs", type=float, default=2.5, help="of the language model (default: %(default)s)")
    parser.add_argument("--q_epochs", type=float, default=1.0, help="of the Q network (default: %(default)s)")
    parser.add_argument("--rollouts", type=int, default=36_000, help="sampled continuations (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    texts = list(read_texts(arguments.data))
    if not (output / "lm" / "tokenizer.json").exists():
        train_language_model(texts, output / "lm", arguments.epochs, arguments.seed)
    if not (output / "train.jsonl").exists():
        build_trajectories(texts, output, arguments.rollouts, arguments.seed)
    if not (output / "q" / "q_config.json").exists():
        _, tokenizer = load_language_model(str(output / "lm"))
        train_q_network(
            output / "lm",
            tokenizer,
            read(output / "train.jsonl"),
            read(output / "validation.jsonl"),
            output / "q",
            arguments.q_epochs,
            arguments.seed,
        )


if __name__ == "__main__":
    main()
