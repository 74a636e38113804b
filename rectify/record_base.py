"""Record in saved folders the digest of the weights that their base model has now.

    python -m rectify.record_base FOLDER...

For folders of older versions, which recorded none or one of files, and for bases whose weights a new version of a
library names otherwise: what is there is taken for what the folder was trained on. Of a folder its configuration alone
is written anew. `rectify/pocket/q`, `q_shared` and `reward` were recorded so.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModel

from rectify.causal_body import causal_body
from rectify.command_line import Parser, execute, say
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.hub import model_place
from rectify.json_files import write_json
from rectify.pretrained import read_model, refusing_unusable
from rectify.saved_config import read_object
from rectify.weights_digest import weights_digest

CONFIG_FILES = (
    "q_config.json",
    "detector_config.json",
    "span_config.json",
    "instruction_config.json",
    "experts_config.json",
    "cmd_config.json",
)


def record_base(folder: Path) -> str:
    """Write the digest of a folder's base model into its configuration.

    Returns:
        The base model.

    Raises:
        CheckpointError: the folder has no base model, or that cannot be loaded.
        InvalidArgumentError: its layers are in 4 bits, which are known by their files.
    """
    files = [folder / name for name in CONFIG_FILES if (folder / name).exists()]
    if not files:
        raise CheckpointError(f"{str(folder)!r} holds none of {', '.join(CONFIG_FILES)}: give a folder that does")
    config = read_object(files[0], "give another folder")
    name, revision = config.get("base_model"), config.get("base_revision")
    if not isinstance(name, str):
        raise CheckpointError(f"{str(folder)!r} names no base_model: its weights are in the folder, or in memory alone")
    if config.get("quantization", "none") != "none":
        raise InvalidArgumentError(f"{str(folder)!r} is on a base in 4 bits, which is known by its files: leave it")
    place = model_place(name, revision)
    with refusing_unusable(f"base {name!r}", "put the model back"):
        model, _ = read_model(AutoModel, place, revision, dtype=torch.float32)
    body = causal_body(model) if files[0].name == "q_config.json" else model
    config.pop("signature", None)
    after = "base_revision" if "base_revision" in config else "base_model"
    config.pop("base_fingerprint", None)
    items = list(config.items())
    at = list(config).index(after) + 1
    write_json(files[0], dict([*items[:at], ("base_fingerprint", weights_digest(body)), *items[at:]]))
    return name


def run(arguments: argparse.Namespace) -> None:
    """Run the command."""
    for folder in arguments.folders:
        say(f"{folder}: of {record_base(folder)}")


def main(argv: list[str] | None = None) -> int:
    """The command as a function of its arguments. Returns the exit code."""
    parser = Parser(prog="python -m rectify.record_base", description="Record the weights of base models.")
    parser.add_argument("folders", nargs="+", type=Path, help="folders of Q networks, detectors, experts, …")
    return execute(run, parser, argv)


if __name__ == "__main__":
    sys.exit(main())
