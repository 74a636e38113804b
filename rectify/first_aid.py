"""What to do where no Q network fits a model: the same advice wherever that shows."""

from __future__ import annotations

import shlex
from typing import TypeVar

from rectify.errors import RectifyError
from rectify.hub import POCKET, checkpoint_folder

Error = TypeVar("Error", bound=RectifyError)

# those of the methods that run with any causal language model
_WITHOUT_TRAINING = ("self_debias", "best_of_n,n=4", "word_filter:WORDS.txt")


def q_network_advice(model: str) -> str:
    """How to come to a Q network of a model in three commands, or to do without: one line.

    Args:
        model: its folder or Hub id, as the commands take it.
    """
    model = shlex.quote(next((name for name in POCKET if str(checkpoint_folder(name)) == model), model))
    commands = (
        f"rectify build trajectories --model {model} --texts TEXTS.jsonl --reward_model pocket-reward "
        "--output_dir data",
        f"rectify train q --trunk shared --model_name_or_path {model} --train_file data/train.jsonl "
        "--validation_file data/validation.jsonl --output_dir my-q",
        f"rectify generate --model {model} --rectify --q my-q",
    )
    return f"train one: {' && '.join(commands)}; or take a method that needs none: --method {_either()}"


def with_q_advice(error: Error, model: str) -> Error:
    """An error that is raised because no Q network fits, with the advice as its hint."""
    error.hint = q_network_advice(model)
    return error


def _either() -> str:
    *others, last = _WITHOUT_TRAINING
    return f"{', '.join(others)} or {last}"
