"""The command `rectify detect`: texts in; label, confidence, explanation and who decided out.

rectify detect comments.csv --text_column comment --detector cascade:my-cascade --output found.jsonl --csv found.csv
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter

from rectify.command_line import EXIT_CODES, UNFINISHED, Parser, execute, say
from rectify.detectors.decisions import UNPARSED, Writing, decisions, write_table
from rectify.errors import InvalidArgumentError
from rectify.json_files import json_line
from rectify.sampling import Sampling
from rectify.scoring.load import add_allow
from rectify.scoring.scores import Reason
from rectify.text_files import TEXT_COLUMN, check_unicode, read_texts


def make_parser(prog: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=prog,
        description="Say of texts whether they are toxic, how surely, why, and who decided.",
        epilog=EXIT_CODES,
        allow_abbrev=False,
    )
    parser.add_argument("files", nargs="*", metavar="FILE", help="JSON lines, JSON lists, .csv, .tsv, or .txt")
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text, instead of files (may be repeated)")
    parser.add_argument("--text_column", nargs="+", default=[TEXT_COLUMN], metavar="NAME", help="once or for each file")
    parser.add_argument(
        "--detector",
        required=True,
        metavar="NAME",
        help="instruction:PATH, cascade:PATH, or a scorer of `rectify score`",
    )
    add_allow(parser)
    parser.add_argument("--device", help="where models run")
    parser.add_argument("--output", metavar="FILE.jsonl", help="gets the records (default: standard output); resumed")
    parser.add_argument("--csv", metavar="FILE.csv", help="gets the same as a table")
    written = parser.add_argument_group("answers of instruction:PATH")
    written.add_argument(
        "--write", action="store_true", help="have answers written where the labels alone would need none"
    )
    written.add_argument("--do_sample", action="store_true", help="sample (default: the likeliest tokens)")
    written.add_argument("--temperature", type=float, help="of sampling")
    written.add_argument("--top_p", type=float, help="of sampling")
    written.add_argument("--top_k", type=int, help="of sampling")
    written.add_argument("--max_new_tokens", type=int, default=200, help="of an answer (default: %(default)s)")
    written.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    written.add_argument("--batch_size", type=int, default=32, help="texts at a time (default: %(default)s)")
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit code.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    if bool(arguments.files) == bool(arguments.text):
        given = "both given" if arguments.text else "both missing"
        raise InvalidArgumentError(f"FILE and text are {given}: give the one or the other")
    sampling = {name: getattr(arguments, name) for name in ("temperature", "top_p", "top_k")}
    if not arguments.do_sample and any(value is not None for value in sampling.values()):
        raise InvalidArgumentError("temperature, top_p or top_k is given without do_sample: add --do_sample")
    for number, text in enumerate(arguments.text or (), start=1):
        check_unicode(text, f"text {number}")
    texts = arguments.text or read_texts(arguments.files, arguments.text_column)
    writing = Writing(
        write=arguments.write or arguments.do_sample,
        sampling=Sampling(do_sample=arguments.do_sample, **sampling),
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        batch_size=arguments.batch_size,
    )
    records = decisions(arguments.detector, texts, writing, arguments.device, arguments.output, arguments.allow or ())
    if arguments.output is None:
        sys.stdout.writelines(map(json_line, records))
    if arguments.csv:
        write_table(records, arguments.csv)
    passing = {reason.value for reason in Reason if reason.passing}
    labels = Counter(record["label"] for record in records)
    say(f"texts: {len(records)}, " + ", ".join(f"{count} {label}" for label, count in labels.most_common()))
    if labels[UNPARSED]:
        problems = Counter(record["problem"] for record in records if record["label"] == UNPARSED)
        say("unparsed: " + ", ".join(f"{count} {problem}" for problem, count in problems.most_common()))
    deciders = Counter(record["decided_by"] for record in records)
    if len(deciders) > 1:
        say("decided by: " + ", ".join(f"{name} {count}" for name, count in deciders.most_common()))
    return UNFINISHED if any(record.get("problem") in passing for record in records) else 0


def main(argv: list[str] | None = None, prog: str = "rectify detect") -> int:
    """The command as a function of its arguments. Returns the exit code."""
    return execute(run, make_parser(prog), argv)
