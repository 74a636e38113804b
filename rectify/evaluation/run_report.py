"""The stage report of a run: `metrics.json`, `report.md`, `report.html`, and its pictures as PNG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

from rectify.evaluation.examples import Example, Shown, drawn, most_toxic, starred, toxic_words
from rectify.evaluation.plotting import can_plot
from rectify.evaluation.prompted_run import PromptedRun
from rectify.evaluation.run_metrics import measured
from rectify.evaluation.run_page import page
from rectify.evaluation.run_plots import figures
from rectify.evaluation.run_tables import facts, tables
from rectify.evaluation.toxicity_prompts import TOXIC, prompt_toxicity
from rectify.json_files import write_json, write_whole

METRICS_FILE, MARKDOWN_FILE, PAGE_FILE = "metrics.json", "report.md", "report.html"
EXAMPLES = 5
"""Toxic prompts that are shown, and others."""

_TITLE = "RealToxicityPrompts"


def write_report(run: PromptedRun, star: bool = True) -> str:
    """Write the report of a run whose other stages are done into its folder.

    Args:
        run: with all parts made.
        star: whether toxic words are starred in the examples.

    Returns:
        The report in Markdown.

    Raises:
        InvalidArgumentError: a stage is not done, or prompts lack scores and `allow_missing` is not set.
    """
    metrics = measured(run)
    write_json(run.folder / METRICS_FILE, metrics)
    pictures = _draw(metrics, run.folder) if can_plot() else {}
    report = markdown(metrics, [f"![{description}]({name}.png)" for name, (description, _) in pictures.items()])
    write_whole(run.folder / MARKDOWN_FILE, report)
    shown = examples_of(run, star)
    write_whole(
        run.folder / PAGE_FILE,
        page(_TITLE, facts(metrics), metrics["warnings"], tables(metrics), list(pictures.values()), shown),
    )
    return report


def markdown(metrics: dict[str, Any], pictures: list[str]) -> str:
    """The report in Markdown.

    Args:
        metrics: of `measured`.
        pictures: lines that show them.
    """
    parts = [f"# {_TITLE}"]
    parts += [f"**Warning:** {warning}." for warning in metrics["warnings"]]
    first, *others = tables(metrics)
    for table in (first, *others):
        parts += [f"## {table.title}", table.markdown().rstrip(), *([table.note] if table.note else [])]
        if table is first:
            parts += pictures
    parts += ["## What was run", "\n".join(f"- {name}: {value}" for name, value in facts(metrics))]
    return "\n\n".join(parts) + "\n"


def examples_of(run: PromptedRun, star: bool) -> list[Example]:
    """Drawn prompts, each with every method's most toxic continuation by the first scorer."""
    places = drawn(run.prompts, EXAMPLES, run.settings.seed)
    scorer = run.scorer(run.settings.scorers[0])
    shown: dict[int, list[Shown]] = {place: [] for place in places}
    for method in run.methods:
        for place in places:
            number, row = divmod(place, run.batch_size)
            texts = [one.text for one in run.records_of(method, number)[row]]
            (scores,) = run.scores_of(method, scorer).read([number])
            found = np.array(scores["scores"]["TOXICITY"][row], dtype=np.float64)  # None becomes NaN
            shown[place].append(most_toxic(method.label, texts, found))
    texts = [run.prompts[place].text for place in places] + [one.text for ones in shown.values() for one in ones]
    words = toxic_words(texts) if star else set()
    return [
        Example(
            starred(run.prompts[place].text, words),
            (prompt_toxicity(run.prompts[place]) or 0) >= TOXIC,
            tuple(Shown(one.method, starred(one.text, words), one.score) for one in shown[place]),
        )
        for place in places
    ]


def _draw(metrics: dict[str, Any], folder: Path) -> dict[str, tuple[str, str]]:
    """Write the pictures; each name's description and SVG."""
    found = {}
    for name, (description, figure) in figures(metrics).items():
        figure.savefig(folder / f"{name}.png", dpi=130)
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
        found[name] = (description, text.getvalue())
    return found
