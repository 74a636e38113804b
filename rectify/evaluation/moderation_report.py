"""Moderations on judged pairs, and against other judges: files, tables and the plot."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from rectify.detectors.moderation import QAModeration
from rectify.errors import InvalidArgumentError, install_line
from rectify.evaluation.moderation import flagged_differences, flagged_estimates, moderation_figures
from rectify.evaluation.moderation_agreement import OURS, Agreement, agreement_of, agreement_plot, read_judged
from rectify.evaluation.plotting import can_plot
from rectify.evaluation.run_tables import Table
from rectify.json_files import sha256_of, write_figures, write_json, write_whole
from rectify.training.moderation import read_judged_pairs

logger = logging.getLogger(__name__)

_FIGURES = ("accuracy", "precision", "recall", "f1", "auc", "preference")


def compare_moderations(
    moderations: Mapping[str, QAModeration],
    records: Sequence[str],
    output_dir: Path,
    *,
    threshold: float | str = "evaluation",
    reference: str | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> str:
    """Judge pairs whose categories are known, and write `metrics.json` and `report.md`.

    Args:
        moderations: by the names that the tables show.
        records: see `read_judged_pairs`.
        output_dir: where the files go.
        threshold: see `ModerationConfig.threshold_values`.
        reference: a moderation, to which the others are compared, paired.
        batch_size: pairs at a time.
        seed: of the intervals.

    Returns:
        What `report.md` holds.

    Raises:
        InvalidArgumentError: a moderation has other categories than the records, or a threshold that there is not.
        TrajectoryError: the records cannot be used.
    """
    rows, categories = read_judged_pairs(records)
    read, rows = len(rows), [row for row in rows if any(part.strip() for part in row.pair)]
    if not rows:
        raise InvalidArgumentError(f"records hold {read} pairs, all of them blank: give pairs with a text")
    harmful = np.array([row.labels for row in rows]) >= 0.5
    prompts, flags = [row.prompt for row in rows], np.asarray(harmful.any(-1))
    found: dict[str, Any] = {}
    decisions: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    thresholds: dict[str, np.ndarray] = {}
    for name, moderation in moderations.items():  # all of them before the first is asked
        if set(moderation.config.labels) != set(categories):
            differing = min(set(moderation.config.labels) ^ set(categories))
            raise InvalidArgumentError(
                f"moderations holds {name!r}, whose categories are not those of the records, as to {differing!r}: give "
                "one that was trained on these"
            )
        thresholds[name] = moderation.config.threshold_values(threshold)
    for name, moderation in moderations.items():
        values = thresholds[name]
        pairs = cast(Any, [row.pair for row in rows])
        probabilities = moderation.label_probabilities(pairs, batch_size, progress=True)
        truth = harmful[:, [categories.index(label) for label in moderation.config.labels]]
        decisions[name] = np.asarray((probabilities > values).any(-1)), probabilities.max(-1)
        found[name] = {
            "base_model": moderation.config.base_model,
            "template": moderation.config.template,
            "truncated": moderation.truncated,
            "flagged": flagged_estimates(*decisions[name], flags, prompts, seed=seed),
            "categories": moderation_figures(moderation.config.labels, probabilities, truth, values),
        }
    metrics = {
        "rule": f"flagged where a category is above its threshold, {threshold}",
        "intervals": {"coverage": 0.95, "seed": seed, "over": "prompts"},
        "records": {"pairs": len(rows), "blank": read - len(rows), "sha256": sha256_of([list(row) for row in rows])},
        "moderations": found,
    }
    if reference is not None:
        metrics["reference"] = reference
        for name in found:
            if name != reference:
                found[name]["over_reference"] = flagged_differences(
                    decisions[name], decisions[reference], flags, prompts, seed=seed
                )
    output_dir.mkdir(parents=True, exist_ok=True)
    write_figures(output_dir / "metrics.json", metrics)
    report = _markdown(f"Moderation of {len(rows)} pairs", _tables(metrics))
    write_whole(output_dir / "report.md", report)
    return report


def judge_answers(
    moderation: QAModeration,
    judged: Path,
    output_dir: Path,
    *,
    models: Sequence[str] = (),
    threshold: float | str = "evaluation",
    batch_size: int = 16,
) -> tuple[Agreement, str]:
    """Judge answers that others have judged, and write the published files: `predictions.json`, the verdicts in bool;
    `evaluation.json`, the records with `flagged.moderation`; `agreement.json`; and, with matplotlib,
    `flagged-proportion.png`.

    Args:
        moderation: what judges.
        judged: see `read_judged`.
        output_dir: where the files go.
        models: see `agreement_of`.
        threshold, batch_size: as in `compare_moderations`.

    Returns:
        How far they agree, and a table of it.

    Raises:
        TrajectoryError: the file cannot be used.
        InvalidArgumentError: it has no answer of the models, or there is no such threshold.
    """
    records = read_judged(judged)
    if models and not set(models) & {record["model"] for record in records}:
        raise InvalidArgumentError(
            f"models is {list(models)}, and {str(judged)!r} has no answer of them: give some of "
            f"{', '.join(dict.fromkeys(record['model'] for record in records))}"
        )
    questions, answers = ([record[name] for record in records] for name in ("prompt", "response"))
    predictions = moderation.predict(questions, answers, batch_size=batch_size, threshold=threshold, return_bool=True)
    records = [
        record | {"flagged": record["flagged"] | {OURS: prediction["flagged"]}}
        for record, prediction in zip(records, predictions, strict=True)
    ]
    agreement = agreement_of(records, models)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / "predictions.json", predictions)
    write_json(output_dir / "evaluation.json", records)
    write_figures(
        output_dir / "agreement.json",
        {"models": agreement.metrics(), "missing_models": agreement.missing, "unjudged": agreement.unjudged},
    )
    if can_plot():
        agreement_plot(agreement).savefig(output_dir / "flagged-proportion.png", dpi=150)
    else:
        logger.info("no plot is drawn without matplotlib: %s", install_line("plots"))
    return agreement, _markdown("Judges", [_agreement_table(agreement)])


# ---------------------------------------------------------------------------------------------------------------------
# Tables


def _tables(metrics: dict[str, Any]) -> list[Table]:
    moderations = metrics["moderations"]
    rows = [(name, *(_interval(one["flagged"][figure]) for figure in _FIGURES)) for name, one in moderations.items()]
    note = f"{metrics['rule'].capitalize()}. With 95 % intervals over prompts; chance is 0.5 of AUC and preference."
    tables = [Table("Flagged", ("moderation", *_FIGURES), tuple(rows), note)]
    if (reference := metrics.get("reference")) is not None:
        rows = [
            (name, *(_interval(one["over_reference"][figure], "+") for figure in _FIGURES))
            for name, one in moderations.items()
            if name != reference
        ]
        note = "Differences, paired, with 95 % intervals over prompts."
        tables.append(Table(f"Over {reference}", ("moderation", *_FIGURES), tuple(rows), note))
    shown = ("f1", "average_precision", "auc")
    for name, one in moderations.items():
        found = one["categories"]
        rows = [(mean, "", *(_plain(found[mean].get(figure)) for figure in shown)) for mean in ("macro", "micro")]
        rows += [
            (category, str(figures["n"]), *(_plain(figures.get(figure)) for figure in shown))
            for category, figures in found["by_category"].items()
        ]
        tables.append(Table(f"Categories by {name}", ("category", "pairs", *shown), tuple(rows)))
    return tables


def _agreement_table(agreement: Agreement) -> Table:
    first = next(iter(agreement.answers))
    judges, both = list(agreement.flagged[first]), list(agreement.agreements[first])
    rows = [
        (
            model,
            str(count),
            *(_plain(1 - agreement.flagged[model][judge]) for judge in judges),
            *(_plain(agreement.agreements[model][name]) for name in both),
        )
        for model, count in agreement.answers.items()
    ]
    header = ("model", "answers", *(f"safe by {judge}" for judge in judges), *both)
    notes = [f"No answers of {', '.join(agreement.missing)}."] if agreement.missing else []
    notes += [f"Not judged by {judge}: {count}." for judge, count in agreement.unjudged.items()]
    return Table("Safe answers and agreement", header, tuple(rows), " ".join(notes))


def _markdown(title: str, tables: Sequence[Table]) -> str:
    body = "\n".join(f"## {table.title}\n\n{table.markdown()}\n{table.note}\n" for table in tables)
    return f"# {title}\n\n{body}"


def _plain(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.3f}"


def _interval(estimate: dict[str, float], sign: str = "") -> str:
    if estimate["value"] != estimate["value"]:
        return "–"
    value, low, high = (f"{estimate[name]:{sign}.3f}" for name in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
