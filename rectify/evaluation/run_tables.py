"""The tables of a run's report, from what `metrics.json` holds; Markdown and page show the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from rectify.evaluation.toxicity_prompts import TOXIC

SUBSET_TITLES = {"all": "all prompts", "toxic": "toxic prompts", "nontoxic": "other prompts"}
_UNKNOWN = "–"


@dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        title: its heading.
        header: of the columns; the first names the rows.
        rows: as many cells each.
        note: what is to be known of it, or nothing.
    """

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """The table alone, without title and note."""
        lines = [self.header, ("---",) * len(self.header), *self.rows]
        return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def subsets_of(metrics: dict[str, Any]) -> list[str]:
    """The subsets of prompts that there are figures of, `all` first."""
    return list(metrics["methods"][0]["diversity"])


def tables(metrics: dict[str, Any]) -> list[Table]:
    """All tables of a report, the most important ones first."""
    return [*_toxicity(metrics), _fluency(metrics), _cost(metrics), *_decisions(metrics), *_attributes(metrics)]


def facts(metrics: dict[str, Any]) -> list[tuple[str, str]]:
    """What the figures are of: names and values, in words."""
    settings = metrics["settings"]
    scorers = "; ".join(f"{each['name']} (revision {each['revision']})" for each in metrics["scorers"])
    failures = sum(
        found["all"]["TOXICITY"]["failures"] for method in metrics["methods"] for found in method["toxicity"].values()
    )
    left_out = settings["left_out"]
    lengths = f"{settings['min_new_tokens']} to {settings['max_new_tokens']}"
    if settings["min_new_tokens"] == settings["max_new_tokens"]:
        lengths = f"exactly {settings['max_new_tokens']}, ending early is forbidden"
    return [
        ("model", f"{settings['model']}, {settings['model_parameters'] / 1e6:.1f} M parameters, {settings['dtype']}, "
         f"weights {settings['model_weights']}"),
        ("scorers", scorers),
        ("rule", settings["rule"]),
        ("prompts", f"{settings['num_prompts']} ({settings['subset']}, split {settings['split']}), file SHA-256 "
         f"{settings['prompts_file_sha256']}, prompts SHA-256 {settings['prompts_sha256']}; "
         f"{left_out['prompts']} left out as unusable, {left_out['unscored']} without a toxicity of their own"),
        ("continuations", f"{settings['n']} of each prompt, tokens: {lengths}"),
        ("sampling", f"temperature {settings['temperature']:g}, top-k {settings['top_k']}, top-p "
         f"{settings['top_p']:g}, keyed noise, seed {settings['seed']}, batches of {settings['batch_size']} prompts"),
        ("failures", f"{failures} continuations without a score"),
        ("perplexity", f"under {settings['ppl_model']}"),
        ("intervals", f"95 %, of {settings['resamples']} resamples of the prompts; changes are paired"),
        ("versions", ", ".join(f"{name} {version}" for name, version in settings["versions"].items())),
        ("command", settings["command"]),
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------


def _toxicity(metrics: dict[str, Any]) -> Iterable[Table]:
    for scorer in metrics["scorers"]:
        for subset in subsets_of(metrics):
            rows = []
            for method in metrics["methods"]:
                found = method["toxicity"][scorer["name"]][subset]["TOXICITY"]
                rows.append(
                    (
                        method["label"],
                        estimate(found["toxic_share"], percent),
                        _change(method, metrics, found["toxic_share_change"]),
                        estimate(found["expected_maximum"], "{:.3f}".format),
                        estimate(found["toxicity_probability"], "{:.3f}".format),
                    )
                )
            count = metrics["methods"][0]["toxicity"][scorer["name"]][subset]["TOXICITY"]["prompts"]
            yield Table(
                f"Toxicity by {scorer['name']}, {SUBSET_TITLES[subset]} ({count})",
                ("method", "toxic share", "change", "expected maximum toxicity", "toxicity probability"),
                tuple(rows),
                f"Toxic share: of the continuations, those with a score ≥ {TOXIC}. Toxicity probability: of the "
                f"prompts, those with at least one such continuation of {metrics['settings']['n']}.",
            )


def _fluency(metrics: dict[str, Any]) -> Table:
    rows = []
    for method in metrics["methods"]:
        own, clean, diversity = method["perplexity"]["all"], method["clean"], method["diversity"]["all"]
        rows.append(
            (
                method["label"],
                number(own["value"], ".1f"),
                estimate(own["ratio"], "{:.3f}".format),
                number(own["mean_of_continuations"], ".1f"),
                number(clean and clean["perplexity"], ".1f"),
                number(clean and clean["ratio"], ".3f"),
                percent(clean["cut_share"]) if clean else _UNKNOWN,
                *(number(diversity[f"distinct_{n}"], ".3f") for n in (1, 2, 3)),
                number(diversity["mean_length"], ".1f"),
                percent(diversity["empty"]),
                percent(diversity["repetition"]),
            )
        )
    header = ("method", "own perplexity", "× base", "mean of continuations", "clean perplexity", "× base", "cut")
    return Table(
        "Fluency and diversity, all prompts",
        (*header, "dist-1", "dist-2", "dist-3", "tokens", "empty", "repetition"),
        tuple(rows),
        f"Own perplexity: of what was generated, under {metrics['settings']['ppl_model']}; it falls as a policy gets "
        "narrower. Clean perplexity: of clean human continuations under the method, teacher-forced; it does not. Cut: "
        "of their tokens, those that the method makes ten times less probable.",
    )


def _cost(metrics: dict[str, Any]) -> Table:
    rows = tuple(
        (
            method["label"],
            number(method["time"]["ms_per_token"], ".3f"),
            number(method["time"]["ratio"], ".2f"),
            number(method["reads_parameters"] / 1e6, ".1f"),
            method["source"],
        )
        for method in metrics["methods"]
    )
    return Table(
        "Cost and source",
        ("method", "ms per token", "× base", "M parameters beside the model", "source"),
        rows,
        "Time of whole batches, medians; other work on the machine is not told apart.",
    )


def _decisions(metrics: dict[str, Any]) -> Iterable[Table]:
    counted = [method for method in metrics["methods"] if method["decisions"]]
    if counted:
        rows = tuple(
            (
                method["label"],
                f"{method['decisions']['decisions']:,}",
                number(method["decisions"]["capped_per_decision"], ".1f"),
                number(method["decisions"]["moved"], ".3f"),
                f"{method['decisions']['widened']:,}",
                f"{method['decisions']['dead_ends']:,}",
            )
            for method in counted
        )
        header = ("method", "decisions", "capped or removed tokens each", "probability moved", "widenings", "dead ends")
        unread = {method["label"]: method["decisions"].get("unread", 0) for method in counted}
        failed = [f"{label} in {count:,}" for label, count in unread.items() if count]
        note = f"A risk was no number, and held to be the highest, for {', '.join(failed)} decisions." if failed else ""
        yield Table("Decisions of rectification", header, rows, note)


def _attributes(metrics: dict[str, Any]) -> Iterable[Table]:
    for scorer in metrics["scorers"]:
        names = list(metrics["methods"][0]["toxicity"][scorer["name"]]["all"])
        if len(names) > 1:
            rows = tuple(
                (
                    method["label"],
                    *(
                        percent(method["toxicity"][scorer["name"]]["all"][name]["toxic_share"]["value"])
                        for name in names
                    ),
                )
                for method in metrics["methods"]
            )
            yield Table(
                f"Share of continuations with a score ≥ {TOXIC} by {scorer['name']}, by attribute, all prompts",
                ("method", *(name.lower().replace("_", " ") for name in names)),
                rows,
            )


# ---------------------------------------------------------------------------------------------------------------------


def percent(value: float | None) -> str:
    """A share as a percentage; a dash where it is unknown."""
    return _UNKNOWN if value is None else f"{100 * value:.1f} %"


def number(value: float | None, form: str) -> str:
    """A number in a format; a dash where it is unknown."""
    return _UNKNOWN if value is None else format(value, form)


def estimate(found: dict[str, Any], shown: Callable[[float], str]) -> str:
    """A figure with its interval."""
    if found["value"] is None:
        return _UNKNOWN
    if found["low"] is None:
        return shown(found["value"])
    return f"{shown(found['value'])} ({shown(found['low']).removesuffix(' %')}–{shown(found['high'])})".replace(
        " %)", ")"
    )


def _change(method: dict[str, Any], metrics: dict[str, Any], found: dict[str, Any]) -> str:
    if method is metrics["methods"][0] or found["value"] is None:
        return ""
    value, low, high = (
        _UNKNOWN if found[name] is None else f"{100 * found[name]:+.1f}".replace("-", "−")
        for name in ("value", "low", "high")
    )
    return f"{value} % ({low} to {high})"
