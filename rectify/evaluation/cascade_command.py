"""The evaluation of a cascade over files of labelled texts."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import numpy as np

from rectify.command_line import Parser, execute, say
from rectify.detectors.cascade import accuracy_cost
from rectify.errors import InvalidArgumentError
from rectify.evaluation.cascade import GAIN_AT, Judged, cascade_figures, cascade_table
from rectify.evaluation.cascade_plots import draw_curves
from rectify.json_files import write_figures, write_whole
from rectify.scoring.cascade import SCORES_FILE, calibrated, confidence, correct, toxicity_by
from rectify.splits import Split, split_of
from rectify.text_files import TEXT_COLUMN, LabelledText, one_a_file, read_labelled_texts
from rectify.training.cascade_command import scorer_temperature


def make_parser(prog: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=prog,
        description="Accuracy and macro F1 of a small detector that leaves a share of the texts to a larger one.",
        allow_abbrev=False,
    )
    parser.add_argument("--small", required=True, metavar="SCORER", help="as in `rectify score`")
    parser.add_argument("--large", required=True, metavar="SCORER", help="as in `rectify score`")
    parser.add_argument("--test_files", nargs="+", required=True, metavar="FILE", help="labelled texts, a source each")
    parser.add_argument("--validation_files", nargs="+", default=[], metavar="FILE", help="those that calibrate")
    parser.add_argument(
        "--fixed_split",
        action="store_true",
        help="of the test files, the fixed test part is the test, and the fixed validation part calibrates",
    )
    every = "once, or for each test and then each validation file"
    parser.add_argument("--text_column", nargs="+", default=[TEXT_COLUMN], metavar="NAME", help=every)
    parser.add_argument("--label_column", nargs="+", default=["label"], metavar="NAME", help=every)
    parser.add_argument("--label_values", nargs="+", default=[""], metavar="VALUE=LABEL,…", help=every)
    parser.add_argument("--sources", nargs="+", metavar="NAME", help="of the test files (default: the files' names)")
    parser.add_argument("--large_cost", type=float, default=10.0, help="in the small one's, for the curves")
    parser.add_argument("--device", help="where the detectors run")
    parser.add_argument("--output_dir", type=Path, required=True, metavar="DIR", help="gets JSON, Markdown and curves")
    return parser


def _read(arguments: argparse.Namespace) -> tuple[dict[str, list[LabelledText]], list[LabelledText]]:
    """The test texts of each source, and all validation texts."""
    files = [*arguments.test_files, *arguments.validation_files]
    if bool(arguments.validation_files) == arguments.fixed_split:
        raise InvalidArgumentError(
            "give validation_files or fixed_split: temperatures and threshold are chosen by them"
        )
    columns = [
        one_a_file(name, getattr(arguments, name), len(files))
        for name in ("text_column", "label_column", "label_values")
    ]
    names = arguments.sources or [Path(file).stem for file in arguments.test_files]
    names = [*one_a_file("sources", names, len(arguments.test_files)), *[""] * len(arguments.validation_files)]
    tests: dict[str, list[LabelledText]] = {}
    held: list[LabelledText] = []
    for name, file, *how in zip(names, files, *columns, strict=True):
        rows = [row for row in read_labelled_texts([file], *([one] for one in how)) if row.text.strip()]
        if not name:
            held += rows
        elif arguments.fixed_split:
            parts: dict[Split, list[LabelledText]] = {"train": [], "validation": [], "test": []}
            for row in rows:
                parts[split_of(row.text)].append(row)
            tests.setdefault(name, []).extend(parts["test"])
            held += parts["validation"]
        else:
            tests.setdefault(name, []).extend(rows)
    for name, rows in (*tests.items(), ("validation", held)):
        if len({row.label >= 0.5 for row in rows}) < 2:
            raise InvalidArgumentError(f"{name} holds {len(rows)} texts, not of both labels: give other files")
    return tests, held


def run(arguments: argparse.Namespace) -> None:
    """Run the evaluation.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    tests, held = _read(arguments)
    rows = [*held, *(row for some in tests.values() for row in some)]
    say(f"texts: {len(held)} for validation, " + ", ".join(f"{len(some)} of {name}" for name, some in tests.items()))
    toxic = np.array([row.label >= 0.5 for row in rows])
    texts = [row.text for row in rows]
    cache = arguments.output_dir / SCORES_FILE
    small, large = (toxicity_by(spec, texts, cache, arguments.device) for spec in (arguments.small, arguments.large))
    cut = len(held)
    validation = Judged("validation", small[:cut], large[:cut], toxic[:cut])
    temperatures = (
        scorer_temperature(validation.small, validation.toxic),
        scorer_temperature(validation.large, validation.toxic),
    )
    report: dict[str, Any] = {
        **{"small": arguments.small, "large": arguments.large, "temperatures": temperatures, "validation_n": cut},
        "sources": {},
    }
    for name, some in tests.items():
        part = slice(cut, cut + len(some))
        judged = Judged(name, small[part], large[part], toxic[part])
        cut += len(some)
        report["sources"][name] = cascade_figures(judged, validation, temperatures)
        right = correct(judged.small, judged.toxic)
        sure = confidence(calibrated(judged.small, temperatures[0]))
        curve = accuracy_cost(sure, right, correct(judged.large, judged.toxic), arguments.large_cost)
        picture = re.sub(r"[^\w-]", "_", name)
        draw_curves(sure, right, curve, GAIN_AT, arguments.output_dir / f"{picture}.png")
    write_figures(arguments.output_dir / "cascade.json", report)
    write_whole(arguments.output_dir / "cascade.md", cascade_table(report) + "\n")
    print(cascade_table(report))


def main(argv: list[str] | None = None, prog: str = "cascade.py") -> int:
    """The command as a function of its arguments. Returns the exit code."""
    return execute(run, make_parser(prog), argv, extras=["train"])
