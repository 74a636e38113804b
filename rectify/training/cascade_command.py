"""The command `rectify train cascade`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from rectify.command_line import Parser, execute, say
from rectify.detectors.cascade import accuracy_cost, threshold_for_accuracy, threshold_for_budget
from rectify.errors import InvalidArgumentError
from rectify.evaluation.cascade_plots import draw_curves
from rectify.scoring.cascade import (
    SCORES_FILE,
    CascadeConfig,
    calibrated,
    confidence,
    correct,
    log_odds,
    toxicity_by,
)
from rectify.scoring.load import allow_flag
from rectify.text_files import TEXT_COLUMN, read_labelled_texts
from rectify.training.score_calibration import calibration_temperature


def scorer_temperature(toxicity: np.ndarray, toxic: np.ndarray) -> float:
    """The temperature that calibrates scores, `[N]`, NaN where there is none, to `[N]` bool labels."""
    known = ~np.isnan(toxicity)
    return calibration_temperature(log_odds(toxicity[known]), toxic[known].astype(float))


def make_parser(prog: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=prog,
        description="Make a cascade of two detectors: calibrate both on labelled validation texts, and choose the "
        "confidence of the small one below which the large one decides. One is in memory at a time.",
        epilog="Use it as the scorer, or detector, cascade:OUTPUT_DIR.",
        allow_abbrev=False,
    )
    parser.add_argument("--small", required=True, metavar="SCORER", help="as in `rectify score`")
    parser.add_argument("--large", required=True, metavar="SCORER", help="as in `rectify score`")
    parser.add_argument("--validation_files", nargs="+", required=True, metavar="FILE", help="labelled texts")
    parser.add_argument("--text_column", nargs="+", default=[TEXT_COLUMN], metavar="NAME", help="once or for each file")
    parser.add_argument("--label_column", nargs="+", default=["label"], metavar="NAME", help="once or for each file")
    parser.add_argument("--label_values", nargs="+", default=[""], metavar="VALUE=LABEL,…", help="the same")
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--budget", type=float, metavar="SHARE", help="of the texts that the large one decides at most")
    chosen.add_argument("--target_accuracy", type=float, metavar="SHARE", help="that the cascade is to reach")
    chosen.add_argument("--threshold", type=float, metavar="CONFIDENCE", help="of the small one, 0.5 to 1")
    parser.add_argument("--large_cost", type=float, default=10.0, help="in the small one's, for the curve")
    parser.add_argument("--device", help="where the detectors run")
    parser.add_argument("--output_dir", required=True, metavar="DIR", help="gets cascade_config.json and the curves")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    for name in ("budget", "target_accuracy", "threshold"):
        value = getattr(arguments, name)
        if value is not None and not 0 <= value <= 1:
            raise InvalidArgumentError(f"{name} is {value}: give a number from 0 to 1")
    rows = read_labelled_texts(
        arguments.validation_files, arguments.text_column, arguments.label_column, arguments.label_values
    )
    rows = [row for row in rows if row.text.strip()]
    truth = np.array([row.label >= 0.5 for row in rows])
    if truth.all() or not truth.any():
        raise InvalidArgumentError(f"validation_files hold {len(rows)} texts of one label: give both kinds")
    say(f"texts: {len(rows)} for validation, {truth.mean():.1%} of them toxic")
    texts = [row.text for row in rows]
    cache = Path(arguments.output_dir) / SCORES_FILE
    scores = [toxicity_by(spec, texts, cache, arguments.device) for spec in (arguments.small, arguments.large)]
    for spec, values in zip((arguments.small, arguments.large), scores, strict=True):
        if np.isnan(values).all():
            raise InvalidArgumentError(f"{spec!r} scores none of the validation texts: give another")
    small, large = (scorer_temperature(values, truth) for values in scores)
    small_right, large_right = (correct(values, truth) for values in scores)
    sure = confidence(calibrated(scores[0], small))
    if arguments.budget is not None:
        threshold = threshold_for_budget(sure, arguments.budget)
    elif arguments.target_accuracy is not None:
        threshold = threshold_for_accuracy(sure, small_right, large_right, arguments.target_accuracy)
    else:
        threshold = arguments.threshold
    config = CascadeConfig(arguments.small, arguments.large, threshold, small, large)
    asked = config.escalated(scores[0])
    figures = {
        "n": len(rows),
        "small_accuracy": float(small_right.mean()),
        "large_accuracy": float(large_right.mean()),
        "accuracy": float(np.where(asked, large_right, small_right).mean()),
        "escalated": float(asked.mean()),
    }
    config.training = {"files": arguments.validation_files, "validation": figures}
    config.save_pretrained(arguments.output_dir)
    curve = accuracy_cost(sure, small_right, large_right, arguments.large_cost)
    picture = draw_curves(sure, small_right, curve, float(asked.mean()), Path(arguments.output_dir) / "cascade.png")
    said = ", ".join(f"{name} {value:.4g}" for name, value in figures.items())
    say(f"cascade: threshold {config.threshold:.4g}, temperatures {small:.4g} and {large:.4g}; {said}")
    if picture:
        say(f"curves: {picture}")
    flags = "".join(allow_flag(spec) for spec in dict.fromkeys((arguments.small, arguments.large)))
    say(f"cascade: saved in {arguments.output_dir}; use it as cascade:{arguments.output_dir}{flags}")


def main(argv: list[str] | None = None, prog: str = "rectify train cascade") -> int:
    """The command; returns its exit code."""
    return execute(run, make_parser(prog), argv, extras=["train"])
