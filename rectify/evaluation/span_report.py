"""Span detectors side by side on annotated texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from rectify.evaluation.intervals import Bootstrap, Estimate
from rectify.evaluation.span_f1 import Spans, character_f1, characters, mean_f1
from rectify.json_files import sha256_of
from rectify.text_files import AnnotatedText

RESAMPLES = 1000


def span_report(
    rows: Sequence[AnnotatedText], predictions: Mapping[str, Sequence[Spans]], seed: int = 0
) -> dict[str, Any]:
    """The figures of each detector, with bootstrap intervals over texts, the same resamples for all.

    Args:
        rows: the annotated texts.
        predictions: by the detector's name, the spans of each text.
        seed: that draws the resamples.

    Returns:
        `texts`, `texts_with_spans`, `texts_sha256`, `resamples`, `seed`, `masked_share`, that of the characters that
        are annotated, and for each of `detectors`: `f1`, of all texts, `f1_with_spans` and `f1_without_spans`, of those
        where annotators found some or none, each `{value, low, high}`, and its `masked_share`.

    Raises:
        InvalidArgumentError: a prediction is not of as many texts.
    """
    annotated = [row.spans for row in rows]
    toxic = np.array([bool(spans) for spans in annotated])
    length = max(1, sum(len(row.text) for row in rows))
    bootstrap = Bootstrap(len(rows), RESAMPLES, seed)
    detectors = {}
    for name, predicted in predictions.items():
        f1 = character_f1(predicted, annotated)
        detectors[name] = {
            "f1": asdict(bootstrap.estimate(mean_f1(f1))),
            "f1_with_spans": asdict(bootstrap.estimate(mean_f1(f1, toxic))),
            "f1_without_spans": asdict(bootstrap.estimate(mean_f1(f1, ~toxic))),
            "masked_share": _count(predicted) / length,
        }
    return {
        "texts": len(rows),
        "texts_with_spans": int(toxic.sum()),
        "texts_sha256": sha256_of(rows),
        "resamples": RESAMPLES,
        "seed": seed,
        "masked_share": _count(annotated) / length,
        "detectors": detectors,
    }


def span_table(report: Mapping[str, Any]) -> str:
    """A `span_report` as a Markdown table."""
    lines = [
        "| detector | character F1 | where spans are annotated | where none is | characters found |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, found in report["detectors"].items():
        figures = [_shown(Estimate(**found[key])) for key in ("f1", "f1_with_spans", "f1_without_spans")]
        lines.append(f"| {' | '.join([name, *figures, format(found['masked_share'], '.1%')])} |")
    return "\n".join(lines)


def _count(predicted: Sequence[Spans]) -> int:
    return sum(len(characters(spans)) for spans in predicted)


def _shown(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} ({estimate.low:.3f}–{estimate.high:.3f})"
