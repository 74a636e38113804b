"""Detectors side by side: on test texts of several sources, within and across domains, and on functional tests.

python eval/detectors.py --detectors single=detector:all gated=detector:gated --test_files forum.csv tweets.csv \
    --label_column label class --label_values hate=1,noHate=0 0=1,1=1,2=0 --text_column text tweet --output_dir run
"""

import argparse
import sys
from pathlib import Path

from rectify.command_line import Parser, execute
from rectify.errors import InvalidArgumentError
from rectify.evaluation.detector_report import compare_detectors, detector_tables
from rectify.evaluation.functional_tests import read_functional_tests
from rectify.scoring.load import load_scorer
from rectify.spec_pairs import named_places
from rectify.splits import split_of
from rectify.text_files import TEXT_COLUMN, LabelledText, labelled_rows, one_a_file


def make_parser() -> Parser:
    parser = Parser(prog="detectors.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--detectors", nargs="+", required=True, metavar="NAME=SCORER", help="as in `rectify score`")
    parser.add_argument("--reference", metavar="NAME", help="a detector to which the others are compared, paired")
    parser.add_argument("--test_files", nargs="+", type=Path, required=True, help="labelled texts")
    parser.add_argument("--sources", nargs="+", help="what each file is (default: its name); equal ones are joined")
    parser.add_argument("--text_column", nargs="+", default=[TEXT_COLUMN], help="once, or once a file")
    parser.add_argument("--label_column", nargs="+", default=["label"], help="once, or once a file")
    parser.add_argument("--label_values", nargs="+", default=[""], help="as in `rectify train detector`")
    parser.add_argument(
        "--split", choices=("test", "validation", "all"), default="all", help="of the texts, by the fixed hash rule"
    )
    parser.add_argument("--functional_tests", type=Path, metavar="FILE", help="a file of HateCheck's form")
    parser.add_argument("--seed", type=int, default=0, help="of the resamples")
    parser.add_argument("--output_dir", type=Path, required=True)
    return parser


def read_sources(arguments: argparse.Namespace) -> dict[str, list[LabelledText]]:
    files = arguments.test_files
    names = one_a_file("sources", arguments.sources or [file.stem for file in files], len(files))
    columns = [
        one_a_file(name, getattr(arguments, name), len(files))
        for name in ("text_column", "label_column", "label_values")
    ]
    sources: dict[str, list[LabelledText]] = {name: [] for name in names}
    for name, file, *how in zip(names, files, *columns, strict=True):
        sources[name].extend(
            LabelledText(text, label)
            for _, text, label in labelled_rows(file, *how)
            if label is not None and arguments.split in ("all", split_of(text))
        )
        if not sources[name]:
            raise InvalidArgumentError(f"split is {arguments.split!r}, and {str(file)!r} holds no text of it: give all")
    return sources


def run(arguments: argparse.Namespace) -> None:
    specs = named_places(arguments.detectors, "detectors", "NAME=SCORER")
    if arguments.reference not in (None, *specs):
        raise InvalidArgumentError(f"reference is {arguments.reference!r}: give one of {', '.join(specs)}")
    functional = read_functional_tests(arguments.functional_tests) if arguments.functional_tests else []
    metrics = compare_detectors(
        {name: load_scorer(spec) for name, spec in specs.items()},
        read_sources(arguments),
        arguments.output_dir,
        reference=arguments.reference,
        functional=functional,
        seed=arguments.seed,
    )
    print("\n".join(f"{table.title}\n\n{table.markdown()}" for table in detector_tables(metrics)))


def main(argv=None) -> int:
    return execute(run, make_parser(), argv, extras=["train"])


if __name__ == "__main__":
    sys.exit(main())
