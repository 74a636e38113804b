"""Import of checkpoints of the published system (`mcao516/rectification-lm`)."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerBase

from rectify.command_line import Parser, execute, say
from rectify.errors import CheckpointError
from rectify.heads import PublishedHead
from rectify.hub import model_place
from rectify.pretrained import check_config, read_tokenizer, refusing, refusing_unusable
from rectify.q_network import DeadEndQNetwork, QConfig
from rectify.saved_config import read_object
from rectify.saved_weights import check_finite, read_weights, shapes_of
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
    with refusing(folder):
        return _import(Path(folder), tokenizer)


def _import(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> DeadEndQNetwork:
    remedy = "give the folder with config.json and model.safetensors or pytorch_model.bin"
    settings = GPT2Config.from_dict(read_object(folder / "config.json", remedy))
    check_config(settings, str(folder))
    state = _state(folder, remedy)
    if missing := sorted(_HEAD.keys() - state.keys()):
        raise CheckpointError(f"it has no {missing[0]}: it is not a checkpoint of the published system")
    # older releases also saved the causal-mask buffers
    weights: dict[str, Tensor] = {
        name.removeprefix(_TRUNK): tensor
        for name, tensor in state.items()
        if name.startswith(_TRUNK) and not name.endswith((".attn.bias", ".attn.masked_bias"))
    }
    head = {ours: state[theirs] for theirs, ours in _HEAD.items()}
    config = QConfig(
        vocab_size=head["tokens.weight"].shape[0],
        hidden_size=settings.n_embd,
        head="published",
        vocabulary=Fingerprint.of(tokenizer) if tokenizer is not None else None,
        training={"imported_from": "mcao516/rectification-lm"},
    )
    # compared before any memory is taken for sizes that may be anything
    if settings.n_layer > len(weights):
        raise CheckpointError(f"its config.json has {settings.n_layer} layers, its weights fewer: is it complete?")
    _check_shapes(weights, shapes_of(lambda: GPT2Model(settings)))
    _check_shapes(head, shapes_of(lambda: PublishedHead(config.hidden_size, config.vocab_size)))
    network = DeadEndQNetwork(config, GPT2Model(settings))
    network.trunk.load_state_dict(weights)
    network.head.load_state_dict(head)
    check_finite(network, "it")
    return network.eval()


def _state(folder: Path, remedy: str) -> dict[str, Tensor]:
    """The tensors of the folder; a pickle is read without running what it says."""
    if (folder / "model.safetensors").exists():
        return read_weights(folder / "model.safetensors", floats=False, finite=False)
    path = folder / "pytorch_model.bin"
    if not path.is_file():
        raise CheckpointError(f"it holds no weights: {remedy}")
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"its pytorch_model.bin holds other things than weights: {remedy}")
    return state


def _check_shapes(weights: dict[str, Tensor], wanted: dict[str, tuple[int, ...]]) -> None:
    for name in sorted(weights.keys() ^ wanted.keys()):
        lacking = "lack" if name in wanted else "have beside them"
        raise CheckpointError(f"its weights {lacking} {name!r}, unlike its config.json: is it complete?")
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise CheckpointError(
                f"its weights {name!r} are of shape {tuple(weights[name].shape)}, and by its config.json of {shape}: "
                "is it complete?"
            )
        if not weights[name].is_floating_point():
            kind = weights[name].dtype
            raise CheckpointError(f"its weights {name!r} are of type {kind}, not of floats: is it complete?")


def run(arguments: argparse.Namespace) -> None:
    """Run the command `rectify import`.

    Raises:
        CheckpointError: the checkpoint or the tokenizer cannot be used.
    """
    tokenizer = None
    if arguments.tokenizer:
        with refusing_unusable(f"tokenizer {arguments.tokenizer!r}", "give the folder or Hub id of one"):
            tokenizer = read_tokenizer(model_place(arguments.tokenizer))
    import_published(arguments.folder, tokenizer).save_pretrained(arguments.output)
    say(f"Q network: {arguments.output}, imported from {arguments.folder}")


def main(argv: list[str] | None = None, prog: str = "rectify import") -> int:
    """The command as a function of its arguments. Returns the exit code."""
    parser = Parser(prog=prog, description="Turn a checkpoint of the published system into a Q network.")
    parser.add_argument("folder", help="folder that the published train.py saved")
    parser.add_argument("output", help="folder for the Q network")
    parser.add_argument("--tokenizer", help="folder or Hub id of its tokenizer, so that another vocabulary is refused")
    return execute(run, parser, argv, folders=("output",))
