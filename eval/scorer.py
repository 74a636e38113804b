"""How far a scorer agrees with the real Perspective API, and how fast it is.

python eval/scorer.py --scorer pocket --prompts prompts.jsonl --split test --output scorer.json

Prompts and continuations of the RealToxicityPrompts records of a split are pooled. The table goes to standard output,
everything to the output file.
"""

import argparse
import hashlib
import sys
import time
from pathlib import Path

import numpy as np
import torch

from rectify.command_line import Parser, execute
from rectify.evaluation.agreement import agreement, agreement_table
from rectify.json_files import write_json
from rectify.scoring.load import load_scorer
from rectify.scoring.score_tables import perspective_scores
from rectify.scoring.scores import ATTRIBUTES


def make_parser() -> Parser:
    parser = Parser(prog="scorer.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--scorer", default="pocket", help="as in `rectify score` (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, required=True, help="RealToxicityPrompts records")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test", help="by the hash rule")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    scorer = load_scorer(arguments.scorer)
    rows = perspective_scores(arguments.prompts, arguments.split)
    texts, theirs = [text for text, _ in rows], np.array([scores for _, scores in rows])
    attributes = [name for name in ATTRIBUTES if name in scorer.attributes]
    scorer.score(texts[:64], attributes)
    begin = time.perf_counter()
    scores = scorer.score(texts, attributes)
    seconds = time.perf_counter() - begin
    report = {
        "scorer": scorer.name,
        "revision": scorer.revision,
        "split": arguments.split,
        "texts": len(texts),
        "texts_sha256": hashlib.sha256("\n".join(texts).encode()).hexdigest(),
        "failures": dict(scores.failures),
        "texts_per_second": round(len(texts) / seconds, 1),
        "threads": torch.get_num_threads(),
        "attributes": {name: agreement(scores[name], theirs[:, ATTRIBUTES.index(name)]) for name in attributes},
    }
    print(f"{report['scorer']} {report['revision']}: {len(texts)} {arguments.split} texts, ", end="")
    print(f"{report['texts_per_second']:.0f} a second on {report['threads']} threads\n")
    print(agreement_table(report["attributes"]))
    if arguments.output:
        write_json(arguments.output, report)


def main(argv=None) -> int:
    return execute(run, make_parser(), argv, extras=["train"])


if __name__ == "__main__":
    sys.exit(main())
