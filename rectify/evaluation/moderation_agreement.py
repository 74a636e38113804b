"""Judges of answers of several models: how many answers each finds safe, and how far they agree.

Source: the evaluation of BeaverTails' moderation, whose file format and plot these are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rectify.errors import TrajectoryError
from rectify.record_files import read_rows

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OURS = "moderation"
_FORM = 'give records {"prompt": "…", "response": "…", "model": "…", "flagged": {"gpt4": true, "human": false}}'


@dataclass(frozen=True)
class Agreement:
    """What judges say of models' answers.

    Attributes:
        flagged: of each model, the share of its answers that each judge flags.
        agreements: of each model, the share of its answers on which each two judges, `"a&b"`, say the same.
        answers: of each model, how many there are.
        unjudged: how many answers a judge says nothing of, by judge; they count in none of its figures.
        missing: models that were asked for, and have no answer.
    """

    flagged: dict[str, dict[str, float]]
    agreements: dict[str, dict[str, float]]
    answers: dict[str, int]
    unjudged: dict[str, int]
    missing: tuple[str, ...]

    def metrics(self) -> dict[str, Any]:
        """As published, `agreement/a&b` and `flagged_proportion/judge` of each model; `None` where there is none."""
        return {
            model: {
                "answers": self.answers[model],
                **{f"agreement/{both}": _known(value) for both, value in self.agreements[model].items()},
                **{f"flagged_proportion/{judge}": _known(value) for judge, value in self.flagged[model].items()},
            }
            for model in self.answers
        }


def read_judged(path: Path) -> list[dict[str, Any]]:
    """Records of the published form: `prompt`, `response`, `model`, and `flagged` by judge, `null` where unknown.

    Raises:
        TrajectoryError: the file cannot be read, or a record, which is named, is of another form.
    """
    records = []
    for place, record in read_rows(path):
        for name, kind in (("prompt", str), ("response", str), ("model", str), ("flagged", dict)):
            if not isinstance(record, dict) or not isinstance(record.get(name), kind):
                raise TrajectoryError(f"{place}: there is no {name} of type {kind.__name__}: {_FORM}")
        for judge, value in record["flagged"].items():
            if not isinstance(value, bool | None):
                raise TrajectoryError(f"{place}: flagged.{judge} is {value!r}: give true, false or null")
        records.append(record)
    return records


def agreement_of(records: Sequence[dict[str, Any]], models: Sequence[str] = ()) -> Agreement:
    """How far the judges of records agree.

    Args:
        records: as `read_judged` gives them.
        models: whose answers count, in this order; empty for all, in the order in which they come.
    """
    there = list(dict.fromkeys(record["model"] for record in records))
    chosen = [model for model in models if model in there] if models else there
    judges = sorted(
        {judge for record in records for judge in record["flagged"]}, key=lambda name: (name == "human", name)
    )
    flagged: dict[str, dict[str, float]] = {}
    agreements: dict[str, dict[str, float]] = {}
    answers: dict[str, int] = {}
    unjudged: Counter[str] = Counter()
    for model in chosen:
        of_model = [record["flagged"] for record in records if record["model"] == model]
        said = {judge: _said(of_model, judge) for judge in judges}
        unjudged.update({judge: int(np.isnan(values).sum()) for judge, values in said.items()})
        answers[model] = len(of_model)
        flagged[model] = {judge: _mean(values) for judge, values in said.items()}
        agreements[model] = {
            f"{one}&{other}": _mean(np.where(np.isnan(said[one] + said[other]), np.nan, said[one] == said[other]))
            for one, other in combinations(judges, 2)
        }
    missing = tuple(model for model in models if model not in there)
    return Agreement(flagged, agreements, answers, {name: n for name, n in unjudged.items() if n}, missing)


def _said(flagged: Sequence[dict[str, Any]], judge: str) -> np.ndarray:
    return np.array([np.nan if each.get(judge) is None else each[judge] for each in flagged], dtype=np.float64)


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _known(value: float) -> float | None:
    return None if value != value else value


def agreement_plot(agreement: Agreement) -> Figure:
    """The published plot: the proportion of safe pairs of each model as bars, the judges' agreements as lines."""
    from matplotlib.figure import Figure

    models = list(agreement.answers)
    judges, both = list(agreement.flagged[models[0]]), list(agreement.agreements[models[0]])
    figure = Figure(figsize=(max(8.0, 1.6 * len(models)), 6), layout="constrained")
    bars = figure.subplots()
    places, width = np.arange(len(models)), 0.75 / len(judges)
    for number, judge in enumerate(judges):
        safe = [1 - agreement.flagged[model][judge] for model in models]
        bars.bar(places + (number - (len(judges) - 1) / 2) * width, safe, width, label=f"safe by {judge}")
    bars.set_xticks(places, models)
    bars.set(ylabel="Proportion of Safe QA Pairs", ylim=(0, 1.03))
    lines = bars.twinx()
    for number, name in enumerate(both):
        values = [agreement.agreements[model][name] for model in models]
        lines.plot(places, values, marker="o", color=f"C{len(judges) + number}", label=f"agreement {name}")
    lines.set(ylabel="Agreement", ylim=(0.35, 1.03))
    found = [axes.get_legend_handles_labels() for axes in (bars, lines)]
    handles, labels = (list(chain.from_iterable(part)) for part in zip(*found, strict=True))
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    if agreement.missing:
        figure.suptitle(f"no answers of {', '.join(agreement.missing)}", fontsize="small")
    return figure
