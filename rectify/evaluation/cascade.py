"""What a cascade of two detectors gains at which share of escalations, on labelled texts."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rectify.detectors.cascade import least_confident, share_of_gain, threshold_for_budget
from rectify.evaluation.calibration import expected_calibration_error
from rectify.evaluation.intervals import Bootstrap, accuracy, macro_f1
from rectify.scoring.cascade import calibrated, confidence, correct

SHARES = (0.0, 0.1, 0.2, 0.3, 1.0)
"""Of escalations: of exactly so many texts, those that the small detector is least sure of."""
GAIN_AT = 0.3
"""The one of them at which the share of the gain is reported."""


@dataclass(frozen=True)
class Judged:
    """Texts of one source, as both detectors score them.

    Attributes:
        name: of the source.
        small, large: `[N]` scores in [0, 1], NaN where there is none.
        toxic: `[N]` bool labels.
    """

    name: str
    small: np.ndarray
    large: np.ndarray
    toxic: np.ndarray


def cascade_figures(judged: Judged, validation: Judged, temperatures: tuple[float, float]) -> dict[str, Any]:
    """Figures of one source.

    Args:
        judged: test texts.
        validation: validation texts, by which the threshold of `GAIN_AT` escalations is chosen.
        temperatures: of the small and the large detector, fitted to validation texts.

    Returns:
        `n`, `toxic_share`; `shares`, for each of `SHARES` `escalated`, and `accuracy` and `f1_macro` with 95 %
        bootstrap intervals over texts (a text without a score is wrong); `threshold`, the same at the one chosen on
        validation texts; `gain_at_30`, for both figures the share of what always asking the large one gains; `ece`
        of each detector's confidence, before and after calibration.
    """
    small = calibrated(judged.small, temperatures[0])
    sure = confidence(small)
    bootstrap = Bootstrap(len(judged.toxic))

    def at(asked: np.ndarray) -> dict[str, Any]:
        said = np.where(asked, _said(judged.large), _said(judged.small))
        truth = judged.toxic.astype(int)
        return {
            "escalated": float(asked.mean()),
            "accuracy": asdict(bootstrap.estimate(accuracy(said, truth))),
            "f1_macro": asdict(bootstrap.estimate(macro_f1(said, truth))),
        }

    found = {f"{share:g}": at(least_confident(sure, share)) for share in SHARES}
    small_alone, cascade, large_alone = (found[f"{share:g}"] for share in (0, GAIN_AT, 1))
    threshold = threshold_for_budget(confidence(calibrated(validation.small, temperatures[0])), GAIN_AT)
    return {
        "n": len(judged.toxic),
        "toxic_share": float(judged.toxic.mean()),
        "shares": found,
        "threshold": {"confidence": threshold, **at(~(sure >= threshold))},
        "gain_at_30": {
            name: share_of_gain(*(each[name]["value"] for each in (cascade, small_alone, large_alone)))
            for name in ("accuracy", "f1_macro")
        },
        "ece": {
            name: {"before": _ece(scores, judged.toxic, 1.0), "after": _ece(scores, judged.toxic, temperature)}
            for name, scores, temperature in (
                ("small", judged.small, temperatures[0]),
                ("large", judged.large, temperatures[1]),
            )
        },
    }


def _said(scores: np.ndarray) -> np.ndarray:
    """`[N]` labels, 0, 1, or −1 without a score."""
    return np.where(np.isnan(scores), -1, np.nan_to_num(scores) >= 0.5)


def _ece(scores: np.ndarray, toxic: np.ndarray, temperature: float) -> float:
    """The calibration error of the confidence, over the texts that have one."""
    known = ~np.isnan(scores)
    if not known.any():
        return float("nan")
    return expected_calibration_error(
        confidence(calibrated(scores[known], temperature)), correct(scores[known], toxic[known])
    )


def cascade_table(report: dict[str, Any]) -> str:
    """The report as Markdown."""
    lines = [
        f"small: `{report['small']}`, temperature {report['temperatures'][0]:.3g}; "
        f"large: `{report['large']}`, temperature {report['temperatures'][1]:.3g}",
        "",
        "| source | escalated | accuracy | macro F1 |",
        "|---|---|---|---|",
    ]
    for name, figures in report["sources"].items():
        rows = [*figures["shares"].values(), figures["threshold"]]
        for row, note in zip(rows, [""] * (len(rows) - 1) + [" (threshold chosen on validation)"], strict=True):
            cells = (_estimate(row["accuracy"]), _estimate(row["f1_macro"]))
            lines.append(f"| {name} | {row['escalated']:.1%}{note} | {cells[0]} | {cells[1]} |")
    lines += [
        "",
        "| source | n | gain at 30 %: accuracy | macro F1 | ECE small | ECE large |",
        "|---|---|---|---|---|---|",
    ]
    for name, figures in report["sources"].items():
        gain, ece = figures["gain_at_30"], figures["ece"]
        errors = [f"{ece[each]['before']:.3f} → {ece[each]['after']:.3f}" for each in ("small", "large")]
        gains = [f"{gain[each]:.0%}" if gain[each] == gain[each] else "no gain" for each in ("accuracy", "f1_macro")]
        lines.append(f"| {name} | {figures['n']} | {' | '.join([*gains, *errors])} |")
    return "\n".join(lines)


def _estimate(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.3f} [{estimate['low']:.3f}, {estimate['high']:.3f}]"
