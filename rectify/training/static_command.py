"""The command `rectify train static`: a context-free table of token risks, the baseline of a Q network."""

from __future__ import annotations

import argparse

from rectify.command_line import Parser, execute, say
from rectify.errors import InvalidArgumentError
from rectify.hub import model_place
from rectify.pretrained import read_model_config, read_tokenizer, refusing_unusable
from rectify.static_risk import StaticTokenRisk
from rectify.training.trajectory_data import TrajectoryDataset, read_trajectories
from rectify.vocabulary import Fingerprint


def make_parser(prog: str) -> Parser:
    """The flags of the command; those that `train_q.py` has as well mean the same."""
    parser = Parser(prog=prog, description="Average the risk of each token over the contexts it was taken in.")
    parser.add_argument("--model_name_or_path", required=True, help="whose tokenizer and vocabulary are used")
    parser.add_argument("--train_file", nargs="+", required=True, help="trajectories, as train_q.py takes them")
    parser.add_argument("--block_size", type=int, default=1024, help="longest trajectory (default: %(default)s)")
    parser.add_argument("--prior", type=float, default=20.0, help="counts of the base rate (default: %(default)s)")
    parser.add_argument("--output_dir", required=True, help="folder of the table")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    place = model_place(arguments.model_name_or_path)
    with refusing_unusable(f"model_name_or_path {arguments.model_name_or_path!r}", "give a model with its tokenizer"):
        config = read_model_config(place)
        tokenizer = read_tokenizer(place)
    data = TrajectoryDataset(read_trajectories(arguments.train_file), tokenizer, arguments.block_size)
    if not len(data):
        raise InvalidArgumentError("no trajectory has a token to learn from: give other files")
    table = StaticTokenRisk.fit(
        *data.columns,
        config.get_text_config().vocab_size,
        Fingerprint.of(tokenizer),
        prior=arguments.prior,
    )
    table.config.training["model_name_or_path"] = arguments.model_name_or_path  # whose vocabulary it is
    table.save_pretrained(arguments.output_dir)
    say(f"{len(data)} trajectories; saved to {arguments.output_dir}")


def main(argv: list[str] | None = None, prog: str = "rectify train static") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv)
