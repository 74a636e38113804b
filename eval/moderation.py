"""Moderations side by side: on judged pairs, and against the judges of several models' answers.

python eval/moderation.py --moderations pairs=moderation answers=answer-only --reference answers \
    --records test.jsonl --judged evaluation.json --output_dir run
"""

import argparse
import sys
from pathlib import Path

from rectify.command_line import Parser, execute, say
from rectify.detectors.moderation import QAModeration
from rectify.errors import InvalidArgumentError
from rectify.evaluation.moderation_report import compare_moderations, judge_answers
from rectify.hub import available_device
from rectify.spec_pairs import named_places


def make_parser() -> Parser:
    parser = Parser(prog="moderation.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--moderations", nargs="+", required=True, metavar="NAME=PATH", help="folders, or Hub ids")
    parser.add_argument("--reference", metavar="NAME", help="a moderation to which the others are compared, paired")
    parser.add_argument("--records", nargs="+", default=[], help="judged pairs, as in `rectify train moderation`")
    parser.add_argument("--judged", type=Path, help="answers of models with flagged: {gpt4, human}, as published")
    parser.add_argument("--models", nargs="+", default=[], help="of --judged, in this order (default: all)")
    parser.add_argument(
        "--threshold", default="evaluation", help="a number, evaluation (0.5, default), prediction (0.4) or tuned"
    )
    parser.add_argument("--batch_size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--device", help="default: an accelerator if there is one")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser


def run(arguments: argparse.Namespace) -> None:
    places = named_places(arguments.moderations, "moderations", "NAME=PATH")
    if arguments.reference not in (None, *places):
        raise InvalidArgumentError(f"reference is {arguments.reference!r}: give one of {', '.join(places)}")
    if not arguments.records and arguments.judged is None:
        raise InvalidArgumentError("records and judged are both missing: give one of them, or both")
    device = available_device(arguments.device)
    moderations = {name: QAModeration.from_pretrained(place, device=device) for name, place in places.items()}
    how = {"threshold": arguments.threshold, "batch_size": arguments.batch_size}
    if arguments.records:
        report = compare_moderations(
            moderations,
            arguments.records,
            arguments.output_dir,
            reference=arguments.reference,
            seed=arguments.seed,
            **how,
        )
        print(report)
    if arguments.judged is not None:
        for name, moderation in moderations.items():
            folder = arguments.output_dir / name if len(moderations) > 1 else arguments.output_dir
            agreement, report = judge_answers(moderation, arguments.judged, folder, models=arguments.models, **how)
            print(report)
            if agreement.missing:
                say(f"judged: no answers of {', '.join(agreement.missing)}, which are left out")
            say(f"judged: {folder}")


def main(argv=None) -> int:
    return execute(run, make_parser(), argv, extras=["train"])


if __name__ == "__main__":
    sys.exit(main())
