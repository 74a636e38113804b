"""The command `rectify train substitutions`: what people put in place of toxic words, from their rewrites."""

from __future__ import annotations

import argparse

from rectify.command_line import Parser, execute, say
from rectify.json_files import file_sha256
from rectify.rephrasing.sentences import read_sentences
from rectify.rephrasing.substitutions import Substitutions, SubstitutionsConfig


def make_parser(prog: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=prog,
        description="Count what people put in place of toxic words.",
        epilog="Use OUTPUT_DIR as `--filler causal:MODEL,substitutions=OUTPUT_DIR`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--train_files", nargs="+", metavar="FILE", required=True, help="columns toxic, neutral1, neutral2 …"
    )
    parser.add_argument("--output_dir", required=True, help="folder of the counts")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    sentences = [sentence for path in arguments.train_files for sentence in read_sentences(path)]
    config = SubstitutionsConfig(training={"files": {path: file_sha256(path) for path in arguments.train_files}})
    known = Substitutions.learn(sentences, config)
    known.save_pretrained(arguments.output_dir)
    counts = known.config.training
    say(
        f"{len(sentences)} sentences; {counts['aligned']} of {counts['rewrites']} rewrites keep enough of their words; "
        f"{counts['edits']} edits; saved to {arguments.output_dir}"
    )


def main(argv: list[str] | None = None, prog: str = "rectify train substitutions") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv)
