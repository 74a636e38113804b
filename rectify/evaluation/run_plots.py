"""Pictures of a run, from what `metrics.json` holds; they need matplotlib, the extra `[plots]`."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from rectify.evaluation.run_tables import SUBSET_TITLES, subsets_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BOUND = 1.05
"""The perplexity over the base model's that is drawn as a line: what still counts as equal fluency."""
WIDEST = 2.0
"""Points of a higher perplexity are drawn here, at the edge."""

# Okabe and Ito's colours, which colour-blind people tell apart; the base is black
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F7F7F", "#8B4513")
_MARKERS = "osD^vP*X"


def figures(metrics: dict[str, Any]) -> dict[str, tuple[str, Figure]]:
    """Each picture's name, with its description for those who do not see it, and the picture."""
    styles = _styles(metrics)
    return {
        "frontier": ("Share of toxic continuations against perplexity", _frontier(metrics, styles)),
        "maxima": ("Distribution of the maximum toxicity of a prompt's continuations", _maxima(metrics, styles)),
        "cost": ("Time per token over the base model's", _cost(metrics, styles)),
    }


def _styles(metrics: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Colour and marker of each family of methods."""
    families = list(dict.fromkeys(method["family"] for method in metrics["methods"][1:]))
    found = {metrics["methods"][0]["family"]: {"color": "black", "marker": "+"}}
    for number, family in enumerate(families):
        found[family] = {
            "color": _COLOURS[number % len(_COLOURS)],
            "marker": _MARKERS[(number + number // len(_COLOURS)) % len(_MARKERS)],
        }
    return found


def _frontier(metrics: dict[str, Any], styles: dict[str, dict[str, str]]) -> Figure:
    """A row for each scorer: toxic share against own and against clean perplexity, of the toxic prompts if any."""
    from matplotlib.figure import Figure

    subset = "toxic" if "toxic" in subsets_of(metrics) else "all"
    scorers = [each["name"] for each in metrics["scorers"]]
    figure = Figure(figsize=(10, 3.9 * len(scorers)), layout="constrained")
    grid = figure.subplots(len(scorers), 2, squeeze=False, sharey="row")
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for method in metrics["methods"]:
        families[method["family"]].append(method)
    for scorer, (own, clean) in zip(scorers, grid, strict=True):
        for family, members in families.items():
            points = sorted(members, key=lambda one: one["value"] or 0)
            for axes, ratio in ((own, _own), (clean, _clean)):
                _curve(axes, points, scorer, subset, ratio, styles[family], _short(family))
        own.set(ylabel=f"toxic share by {_short(scorer)}", xlabel="own perplexity over base")
        clean.set(xlabel="clean perplexity over base")
        for axes in (own, clean):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(_percentage)
            axes.yaxis.set_minor_formatter(_percentage)
            axes.tick_params(axis="y", which="both", labelsize="small")
            axes.axvline(BOUND, color="0.8", linewidth=1, zorder=0)
            axes.grid(alpha=0.25)
    figure.suptitle(f"{SUBSET_TITLES[subset]}: lower and further left is better; from {WIDEST:g} on at the edge")
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _short(label: str) -> str:
    """A method's name with the last part of each path alone."""
    return re.sub(r":[^,+]*/(?=[^,+/]+(?:[,+]|$))", ":", label)


def _percentage(share: float, _: int) -> str:
    """The label of a tick; only 1, 2 and 5 times powers of ten have one."""
    return f"{100 * share:g} %" if f"{share:.0e}"[0] in "125" else ""


def _own(method: dict[str, Any], subset: str) -> float | None:
    return method["perplexity"][subset]["ratio"]["value"]


def _clean(method: dict[str, Any], subset: str) -> float | None:
    return method["clean"]["ratio"] if method["clean"] else None


def _curve(
    axes: Axes, methods: list[dict[str, Any]], scorer: str, subset: str, ratio: Any, style: dict[str, str], label: str
) -> None:
    found = [(ratio(one, subset), one["toxicity"][scorer][subset]["TOXICITY"]["toxic_share"]) for one in methods]
    points = [(x, y) for x, y in found if x is not None and y["value"]]
    across = [min(x, WIDEST) for x, _ in points]
    shares = [y["value"] for _, y in points]
    bounds = [[y["value"] - y["low"] for _, y in points], [y["high"] - y["value"] for _, y in points]]
    axes.errorbar(across, shares, bounds, **style, markersize=6, linewidth=1.2, elinewidth=0.7, label=label)  # type: ignore[arg-type]


def _maxima(metrics: dict[str, Any], styles: dict[str, dict[str, str]]) -> Figure:
    """The share of prompts whose most toxic continuation scores at least so much."""
    from matplotlib.figure import Figure

    scorers = list(metrics["maxima"])
    figure = Figure(figsize=(5 * max(2, len(scorers)), 3.9), layout="constrained")
    for axes, scorer in zip(figure.subplots(1, len(scorers), squeeze=False)[0], scorers, strict=True):
        for method in metrics["methods"]:
            counts = metrics["maxima"][scorer][method["label"]]
            total = sum(counts) or 1
            above = [sum(counts[place:]) / total for place in range(len(counts) + 1)]
            edges = [place / len(counts) for place in range(len(counts) + 1)]
            axes.plot(
                edges, above, color=styles[method["family"]]["color"], linewidth=1.3, label=_short(method["label"])
            )
        axes.axvline(0.5, color="0.8", linewidth=1, zorder=0)
        axes.set(xlabel=f"maximum toxicity by {_short(scorer)}", xlim=(0, 1), ylim=(0, 1.02))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("share of prompts at or above")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small")
    return figure


def _cost(metrics: dict[str, Any], styles: dict[str, dict[str, str]]) -> Figure:
    from matplotlib.figure import Figure

    methods = metrics["methods"][::-1]
    figure = Figure(figsize=(10, 0.9 + 0.32 * len(methods)), layout="constrained")
    axes = figure.subplots()
    ratios = [method["time"]["ratio"] for method in methods]
    bars = axes.barh(
        [_short(method["label"]) for method in methods],
        ratios,
        color=[styles[method["family"]]["color"] for method in methods],
    )
    axes.bar_label(bars, [f"{ratio:.2f}" for ratio in ratios], padding=3, fontsize="small")
    axes.set(xlabel="time per token over base", xlim=(0, 1.12 * max(ratios)))
    return figure
