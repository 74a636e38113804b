"""Detectors side by side on the test texts of several sources: figures, tables and pictures."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rectify.errors import install_line
from rectify.evaluation.calibration import reliability
from rectify.evaluation.detector_intervals import THRESHOLD, detector_difference, detector_figures
from rectify.evaluation.functional_tests import FunctionalTest, functional_accuracy
from rectify.evaluation.plotting import can_plot
from rectify.evaluation.run_tables import Table
from rectify.json_files import sha256_of, write_figures, write_whole
from rectify.scoring.scores import Scorer
from rectify.text_files import LabelledText

if TYPE_CHECKING:
    from matplotlib.figure import Figure

logger = logging.getLogger(__name__)

ATTRIBUTE = "TOXICITY"
SHOWN = ("accuracy", "f1", "auc", "average_precision", "ece", "brier")


class Scored(NamedTuple):
    """A detector's probabilities on the texts of each source, `[N]` each, NaN where there is none."""

    name: str
    scorer: Scorer
    by_source: dict[str, np.ndarray]


def compare_detectors(
    detectors: Mapping[str, Scorer],
    sources: Mapping[str, Sequence[LabelledText]],
    output_dir: Path,
    *,
    reference: str | None = None,
    functional: Sequence[FunctionalTest] = (),
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Score all texts with all detectors, and write `metrics.json`, `report.md` and, with matplotlib, the pictures.

    Args:
        detectors: by the names that the tables show.
        sources: test texts by the names of where they are from; from a label of 0.5 on a text counts as toxic.
        output_dir: where the files go.
        reference: a detector, to which the others' macro F1 is compared, paired.
        functional: tests of HateCheck's form.
        resamples, seed: of the intervals.

    Returns:
        What `metrics.json` holds.
    """
    scored = [
        Scored(name, scorer, {source: _score(scorer, [row.text for row in rows]) for source, rows in sources.items()})
        for name, scorer in detectors.items()
    ]
    labels = {source: np.array([row.label for row in rows]) for source, rows in sources.items()}
    metrics: dict[str, Any] = {
        "rule": f"a text is toxic from a probability of {THRESHOLD} on, and so is a label",
        "intervals": {"coverage": 0.95, "resamples": resamples, "seed": seed, "over": "texts"},
        "sources": {
            source: {"texts": len(rows), "sha256": sha256_of([list(row) for row in rows])}
            for source, rows in sources.items()
        },
        "detectors": {
            one.name: {
                "scorer": one.scorer.name,
                "revision": one.scorer.revision,
                "sources": {
                    source: detector_figures(probability, labels[source], resamples, seed)
                    for source, probability in one.by_source.items()
                },
            }
            for one in scored
        },
    }
    if reference is not None:
        against = next(one for one in scored if one.name == reference)
        metrics["reference"] = reference
        for one in scored:
            metrics["detectors"][one.name]["over_reference"] = {
                source: detector_difference(probability, against.by_source[source], labels[source], resamples, seed)
                for source, probability in one.by_source.items()
            }
    if functional:
        texts = [test.text for test in functional]
        metrics["functional"] = {
            one.name: functional_accuracy(list(functional), _score(one.scorer, texts)) for one in scored
        }
    output_dir.mkdir(parents=True, exist_ok=True)
    write_figures(output_dir / "metrics.json", metrics)
    tables = detector_tables(metrics)
    report = "\n".join(f"## {table.title}\n\n{table.markdown()}\n{table.note}\n" for table in tables)
    write_whole(output_dir / "report.md", f"# Detectors\n\n{report}")
    if can_plot():
        _calibration_plot(scored, labels).savefig(output_dir / "calibration.png", dpi=120)
        _matrix_plot(metrics).savefig(output_dir / "matrix.png", dpi=120)
    else:
        logger.info("no pictures are drawn without matplotlib: %s", install_line("plots"))
    return metrics


def _score(scorer: Scorer, texts: list[str]) -> np.ndarray:
    return scorer.score(texts, (ATTRIBUTE,))[ATTRIBUTE]


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def detector_tables(metrics: dict[str, Any]) -> list[Table]:
    """The macro F1 of each detector on each source, all figures source by source, and functional tests."""
    detectors, sources = metrics["detectors"], list(metrics["sources"])
    matrix = [
        (name, *(_interval(one["sources"][source].get("f1_macro")) for source in sources))
        for name, one in detectors.items()
    ]
    found = [Table("Macro F1", ("detector", *sources), tuple(matrix), "With 95 % intervals over texts.")]
    if (reference := metrics.get("reference")) is not None:
        rows = [
            (name, *(_signed(one["over_reference"][source]) for source in sources))
            for name, one in detectors.items()
            if name != reference
        ]
        note = "Differences of macro F1, paired, with 95 % intervals over texts."
        found.append(Table(f"Over {reference}", ("detector", *sources), tuple(rows), note))
    for source in sources:
        rows = []
        for name, one in detectors.items():
            figures = one["sources"][source]
            cells = (_plain(figures.get(figure)) for figure in SHOWN)
            rows.append((name, str(figures["n"]), str(figures["unscored"]), *cells))
        shown = ("accuracy", "F1 of toxic", "AUC", "average precision", "ECE", "Brier")
        share = next(iter(detectors.values()))["sources"][source].get("toxic_share")
        header = ("detector", "texts", "unscored", *shown)
        found.append(Table(source, header, tuple(rows), f"Toxic share of the labels: {_plain(share)}."))
    if functional := metrics.get("functional"):
        first = next(iter(functional.values()))
        rows = [
            (
                name,
                str(figures["n"] + figures["unscored"]),
                *(_plain(one[name]["accuracy"]) for one in functional.values()),
            )
            for name, figures in first.items()
        ]
        found.append(Table("Functional tests, accuracy", ("functionality", "texts", *functional), tuple(rows)))
    return found


def _plain(value: Any) -> str:
    value = value["value"] if isinstance(value, dict) else value
    return "–" if value is None or value != value else f"{value:.3f}"


def _interval(estimate: dict[str, float] | None) -> str:
    return "–" if estimate is None else f"{estimate['value']:.3f} ({estimate['low']:.3f}–{estimate['high']:.3f})"


def _signed(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:+.3f} ({estimate['low']:+.3f} to {estimate['high']:+.3f})"


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def _calibration_plot(scored: Sequence[Scored], labels: Mapping[str, np.ndarray]) -> Figure:
    """The observed share of toxic texts against the probability, a panel for each source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.6 * max(2, len(labels)), 4.2), layout="constrained")
    for axes, (source, label) in zip(figure.subplots(1, len(labels), squeeze=False)[0], labels.items(), strict=True):
        axes.plot((0, 1), (0, 1), color="0.8")
        for one in scored:
            probability = one.by_source[source]
            known = ~np.isnan(probability)
            if known.any():
                predicted, observed, _ = reliability(probability[known], (label[known] >= THRESHOLD).astype(float))
                axes.plot(predicted, observed, marker=".", label=one.name)
        axes.set(title=source, xlabel="probability", xlim=(0, 1), ylim=(0, 1))
    figure.axes[0].set_ylabel("share of toxic texts")
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    return figure


def _matrix_plot(metrics: dict[str, Any]) -> Figure:
    """Macro F1: detectors down, sources across."""
    from matplotlib.figure import Figure

    detectors, sources = list(metrics["detectors"]), list(metrics["sources"])
    values = np.array(
        [
            [
                metrics["detectors"][name]["sources"][source].get("f1_macro", {}).get("value", np.nan)
                for source in sources
            ]
            for name in detectors
        ]
    )
    figure = Figure(figsize=(2.2 + 1.3 * len(sources), 1.2 + 0.5 * len(detectors)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, vmin=0.4, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(sources)), sources)
    axes.set_yticks(range(len(detectors)), detectors)
    for (row, column), value in np.ndenumerate(values):
        axes.text(column, row, f"{value:.2f}", ha="center", va="center", color="white" if value < 0.8 else "black")
    figure.colorbar(image, label="macro F1")
    return figure
