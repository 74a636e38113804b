"""The command `rectify build spans`: texts in, texts with the spans that a scorer finds toxic out."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from typing import Any

from rectify.builders.selection import sample_items
from rectify.builders.spans import label_spans
from rectify.command_line import EXIT_CODES, UNFINISHED, say
from rectify.hub import model_place
from rectify.pretrained import read_tokenizer, refusing_unusable
from rectify.scoring.cache import CachedScorer, ScoreCache
from rectify.scoring.load import load_scorer
from rectify.scoring.scores import Scorer, check_attributes
from rectify.scoring.streams import is_streaming
from rectify.text_files import TEXT_COLUMN, read_texts


def add_parser(kinds: Any) -> None:
    """Add the flags of the command to the parsers of `rectify build`."""
    what = "Make texts with toxic spans for `rectify train spans`: a scorer scores every two neighbouring words."
    parser = kinds.add_parser("spans", description=what, epilog=EXIT_CODES, allow_abbrev=False)
    parser.add_argument("--texts", nargs="+", metavar="FILE", required=True, help="JSON lines, .csv, .tsv or .txt")
    parser.add_argument(
        "--text_column",
        nargs="+",
        default=[TEXT_COLUMN],
        metavar="NAME",
        help=f"given once, or once for each file (default: {TEXT_COLUMN})",
    )
    parser.add_argument("--num_texts", type=int, metavar="N", help="a random sample of the texts (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument(
        "--scorer", required=True, metavar="NAME", help="as in `rectify score`; not the one that is to judge later"
    )
    parser.add_argument("--device", help="where the scorer runs")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="score pairs of this model's tokens, as published (default: of words)"
    )
    parser.add_argument("--output", required=True, metavar="FILE.jsonl", help="resumed on restart")


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit code.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    texts = sample_items(read_texts(arguments.texts, arguments.text_column), arguments.num_texts, arguments.seed)
    tokenizer = _tokenizer(arguments.tokenizer) if arguments.tokenizer else None
    with ExitStack() as stack:
        scorer: Scorer = load_scorer(arguments.scorer, **({"device": arguments.device} if arguments.device else {}))
        if hasattr(scorer, "close"):
            stack.callback(scorer.close)
        check_attributes(scorer, ["TOXICITY"])
        if is_streaming(scorer):  # its calls cost
            scorer = CachedScorer(scorer, stack.enter_context(ScoreCache(f"{arguments.output}.cache.sqlite")))
        counts = label_spans(texts, scorer, arguments.output, tokenizer, arguments.tokenizer)
        say(str(counts))
        if counts.passing:
            say(f"texts whose segments may get a score another time: {counts.passing}; give a new output then")
    return UNFINISHED if counts.passing else 0


def _tokenizer(name: str) -> Any:
    with refusing_unusable(f"tokenizer {name!r}", "give a model's"):
        return read_tokenizer(model_place(name))
