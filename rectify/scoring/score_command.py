"""The command `rectify score`: records in, the same records out with scores beside their texts.

rectify score generations.jsonl --scorer pocket --attributes TOXICITY INSULT --output scored.jsonl
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

from rectify.command_line import EXIT_CODES, UNFINISHED, Parser, execute, say
from rectify.errors import InvalidArgumentError
from rectify.scoring.cache import CachedScorer, ScoreCache
from rectify.scoring.load import SCORERS, add_allow, judges_pairs, load_scorer
from rectify.scoring.score_run import Inputs, write_scores
from rectify.scoring.scores import check_attributes
from rectify.scoring.streams import is_streaming
from rectify.text_files import TEXT_COLUMN
from rectify.version import __version__

_OPTIONS = ("device", "endpoint", "rate", "workers", "languages", "labels", "min_severity", "threshold", "allow")


def make_parser(prog: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=prog,
        description="Score texts; the records come back with scores beside each text.",
        epilog=f"scorers: {'; '.join(f'{form}: {what}' for form, what in SCORERS.items())}. {EXIT_CODES}",
        allow_abbrev=False,
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help="JSON lines (strings, {text}, RealToxicityPrompts or generation records), .csv, .tsv, or .txt",
    )
    parser.add_argument("--text", action="append", metavar="TEXT", help="a text, instead of files (may be repeated)")
    parser.add_argument(
        "--text_column", nargs="+", default=[TEXT_COLUMN], metavar="NAME", help="of all files, or one for each"
    )
    parser.add_argument("--scorer", default="pocket", metavar="NAME", help="see below (default: %(default)s)")
    parser.add_argument("--attributes", nargs="+", default=["TOXICITY"], metavar="NAME", help="default: TOXICITY")
    parser.add_argument("--output", metavar="FILE.jsonl", help="append the records; resumed on restart")
    parser.add_argument(
        "--cache",
        metavar="FILE",
        help="SQLite file of scores that are not asked for again (default: beside the output, where calls cost)",
    )
    parser.add_argument("--batch_size", type=int, default=256, help="texts at a time (default: %(default)s)")
    local = parser.add_argument_group("local scorers")
    local.add_argument("--device", help="where a model runs")
    local.add_argument("--labels", nargs="+", metavar="LABEL=ATTRIBUTE", help="hf: what its labels mean")
    local.add_argument("--min_severity", type=float, help="keywords: the least severity of a term")
    local.add_argument(
        "--threshold",
        metavar="NUMBER|NAME",
        help="moderation: what a category must exceed to be flagged: a number, tuned (default where there is one), "
        "prediction (0.4, else the default) or evaluation (0.5)",
    )
    add_allow(local)
    remote = parser.add_argument_group("perspective", "the key comes from the environment's PERSPECTIVE_API_KEY")
    remote.add_argument("--endpoint", metavar="URL", help="of a server that speaks its format")
    remote.add_argument("--rate", type=float, help="calls a second (default: 1)")
    remote.add_argument("--workers", type=int, help="calls at the same time (default: 8)")
    remote.add_argument("--languages", nargs="*", help="of the texts (default: en; none: left to the server)")
    parser.add_argument("--version", action="version", version=f"rectify {__version__}")
    return parser


def _inputs(arguments: argparse.Namespace) -> Inputs:
    if bool(arguments.files) == bool(arguments.text):
        given = "both given" if arguments.text else "both missing"
        raise InvalidArgumentError(f"FILE and text are {given}: give the one or the other")
    if arguments.batch_size < 1:
        raise InvalidArgumentError(f"batch_size is {arguments.batch_size}: give 1 or more")
    texts = tuple(arguments.text or ())
    return Inputs(tuple(arguments.files), texts, tuple(arguments.text_column), judges_pairs(arguments.scorer))


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    options = {name: getattr(arguments, name) for name in _OPTIONS if getattr(arguments, name) is not None}
    if "labels" in options:
        pairs = [pair.partition("=") for pair in options["labels"]]
        options["labels"] = {label: attribute for label, _, attribute in pairs}
    return options


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit code.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    inputs = _inputs(arguments)
    total = inputs.total  # counted now, so that a bad line is refused before a scorer is loaded
    with ExitStack() as stack:
        scorer = load_scorer(arguments.scorer, **_options(arguments))
        if hasattr(scorer, "close"):
            stack.callback(scorer.close)
        check_attributes(scorer, arguments.attributes)
        cache = arguments.cache
        if cache is None and arguments.output is not None and is_streaming(scorer):
            cache = f"{arguments.output}.cache.sqlite"
        if cache is not None:
            scorer = CachedScorer(scorer, stack.enter_context(ScoreCache(cache)), arguments.batch_size)
        # said only now, so that a refusal is one line
        say(f"scoring {total} texts{f', cache: {cache}' if cache else ''}")
        tally = write_scores(inputs, scorer, arguments.attributes, arguments.output, arguments.batch_size)
        if isinstance(scorer, CachedScorer) and scorer.reused:
            say(f"cache: {scorer.reused} texts were known or came twice")
        if arguments.output is not None:
            say(f"output: {arguments.output}")
        for line in tally.lines(scorer):
            say(line)
        return UNFINISHED if tally.passing else 0


def main(argv: list[str] | None = None, prog: str = "rectify score") -> int:
    """The command as a function of its arguments. Returns the exit code."""
    return execute(run, make_parser(prog), argv)
