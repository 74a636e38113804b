"""Import of checkpoints of the published system (`mcao516/rectification-lm`)."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoTokenizer, GPT2Config, GPT2Model, PreTrainedTokenizerBase

from rectify.command_line import Parser, execute, say
from rectify.errors import CheckpointError, first_line
from rectify.q_network import DeadEndQNetwork, QConfig
from rectify.vocabulary import Fingerprint

_TRUNK = "transformer."
_HEAD = {
    "ilql_heads.q_heads.0.0.weight": "inner.weight",
    "ilql_heads.q_heads.0.0.bias": "inner.bias",
    "ilql_heads.q_heads.0.3.weight": "tokens.weight",
    "ilql_heads.q_heads.0.3.bias": "tokens.bias",
}


def import_published(folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> DeadEndQNetwork:
    """A Q network from a folder that the published `train.py` saved: a GPT-2 trunk and two ILQL-style heads.

    The online head is taken. The target head and the unused language-model head are left out, and the values are
    clipped to [−1, 0], the range of their training targets.

    Args:
        folder: holds `config.json` and `model.safetensors` or `pytorch_model.bin` (read without running pickled code).
        tokenizer: the one it was trained with, whose vocabulary is recorded.

    Raises:
        CheckpointError: files or weights are missing.
    """
    folder = Path(folder)
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if (folder / "model.safetensors").exists():
            state = load_file(folder / "model.safetensors")
        else:
            state = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    except (OSError, ValueError, EOFError, RuntimeError, SafetensorError, UnpicklingError) as error:
        raise CheckpointError(
            f"{str(folder)!r} is no published checkpoint ({first_line(error)}): "
            "give the folder with config.json and model.safetensors or pytorch_model.bin"
        ) from error
    if missing := sorted(_HEAD.keys() - state.keys()):
        raise CheckpointError(f"{str(folder)!r} has no {missing[0]}: it is not a checkpoint of the published system")
    trunk = GPT2Model(GPT2Config.from_dict(settings))
    # older releases also saved the causal-mask buffers
    weights: dict[str, Tensor] = {
        name.removeprefix(_TRUNK): tensor
        for name, tensor in state.items()
        if name.startswith(_TRUNK) and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    config = QConfig(
        vocab_size=state["ilql_heads.q_heads.0.3.weight"].shape[0],
        hidden_size=trunk.config.n_embd,
        head="published",
        vocabulary=Fingerprint.of(tokenizer) if tokenizer is not None else None,
        training={"imported_from": "mcao516/rectification-lm"},
    )
    network = DeadEndQNetwork(config, trunk)
    try:
        trunk.load_state_dict(weights)
        network.head.load_state_dict({ours: state[theirs] for theirs, ours in _HEAD.items()})
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"{str(folder)!r} has other weights than its config.json says: {reason}") from error
    return network.eval()


def run(arguments: argparse.Namespace) -> None:
    """Run the command `rectify import`.

    Raises:
        CheckpointError: the checkpoint or the tokenizer cannot be used.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer) if arguments.tokenizer else None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"tokenizer {arguments.tokenizer!r} cannot be loaded: {error}") from error
    import_published(arguments.folder, tokenizer).save_pretrained(arguments.output)
    say(f"Q network: {arguments.output}, imported from {arguments.folder}")


def main(argv: list[str] | None = None, prog: str = "rectify import") -> int:
    """The command as a function of its arguments. Returns the exit code."""
    parser = Parser(prog=prog, description="Turn a checkpoint of the published system into a Q network.")
    parser.add_argument("folder", help="folder that the published train.py saved")
    parser.add_argument("output", help="folder for the Q network")
    parser.add_argument("--tokenizer", help="folder or Hub id of its tokenizer, so that another vocabulary is refused")
    return execute(run, parser, argv, folders=("output",))
