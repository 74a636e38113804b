"""A quality report for people: Markdown tables."""

from __future__ import annotations

from typing import Any

from rectify.training.q_metrics import FRACTIONS

_RISKS = {"q": "Q network", "static": "token risks"}
_TEXTS = {
    "rollouts": "rollouts",
    "labelled_texts": "labelled texts",
    "realtoxicityprompts": "RealToxicityPrompts",
}
_COLUMNS = {
    "n": ("texts", ".0f"),
    "toxic": ("toxic_share", ".3f"),
    **{f"AUC at {percent} %": (f"auc_{percent}", ".4f") for percent in FRACTIONS},
    "AUC of all positions": ("auc_all_positions", ".4f"),
    "Brier": ("brier", ".4f"),
    "of the constant": ("brier_constant", ".4f"),
    "ECE": ("calibration_error", ".4f"),
}


def markdown_tables(report: dict[str, Any]) -> str:
    """The figures of a report: a table of the texts and one of the pairs, each with what was left out."""
    settings = report["settings"]
    lines = [f"Q network {settings['q']}, language model {settings['model']}"]
    texts = [name for name in _TEXTS if name in report]
    if texts:
        rows = [
            [_TEXTS[name], _RISKS[risk], *(_number(figures.get(key), form) for key, form in _COLUMNS.values())]
            for name in texts
            for risk, figures in report[name]["figures"].items()
        ]
        lines += ["", *_table(["texts", "risk", *_COLUMNS], rows)]
        lines += ["", *(f"{_TEXTS[name]}: {_counts(report[name])}" for name in texts)]
    if "pairs" in report:
        figures = report["pairs"]["figures"]
        header = [f"{group.replace('_', ' ')} ({one['pairs']})" for group, one in figures["q"].items()]
        rows = [[_RISKS[risk], *(_accuracy(one) for one in groups.values())] for risk, groups in figures.items()]
        lines += ["", *_table(["pairs", *header], rows)]
        lines += ["", f"pairs: {_counts(report['pairs'])}; the risk of a word is that of its first token,"]
        lines += ["and a table of token risks gets 0.5 by definition"]
    return "\n".join(lines) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(line)} |" for line in (header, ["---"] * len(header), *rows)]


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _accuracy(one: dict[str, Any]) -> str:
    error = one["standard_error"]
    return _number(one["accuracy"], ".3f") + (f" ± {error:.3f}" if error is not None else "")


def _counts(part: dict[str, Any]) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in part["counts"].items())
