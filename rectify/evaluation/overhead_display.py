"""A cost report for people: Markdown tables, and a plot of the ratios against the length."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rectify.evaluation.plotting import check_plot

_PARTS = {
    "trunk": "Q trunk",
    "states": "memo or tap",
    "head": "head",
    "warpers": "warpers",
    "support": "support",
    "rule": "rule",
    "statistics": "statistics",
    "bookkeeping": "bookkeeping",
    "outside": "outside the processor",
}

Cell = tuple[int, int]


def markdown_table(report: dict[str, Any]) -> str:
    """Time of every arm over the base model's, and MiB above its peak: a line for each batch and length."""
    times = {(row["arm"], row["against"], row["batch"], row["new_tokens"]): row for row in report["time"]}
    memory = {(row["arm"], row["batch"], row["new_tokens"]): row for row in report["memory"]}
    measured = [(row["batch"], row["new_tokens"]) for row in [*report["time"], *report["memory"]]]
    pairs = list(dict.fromkeys((row["arm"], row["against"]) for row in report["time"]))
    arms = list(dict.fromkeys(row["arm"] for row in report["memory"] if row["arm"] != "base"))
    header = ["batch", "new tokens"]
    if pairs:
        header += ["base, ms per token"]
    header += [arm if against == "base" else f"{_bracketed(arm)} / {_bracketed(against)}" for arm, against in pairs]
    header += [f"{arm}, MiB above base" for arm in arms]
    lines = []
    for cell in sorted(set(measured)):
        line = [str(number) for number in cell]
        if pairs:
            base = (
                row["against_ms"] for (_, against, *where), row in times.items() if (against, *where) == ("base", *cell)
            )
            line.append(_number(next(base, None), ".2f"))
        line += [_ratio(times.get((*pair, *cell))) for pair in pairs]
        line += [_number(memory.get((arm, *cell), {}).get("extra_mib"), ".0f") for arm in arms]
        lines.append(line)
    return _table(header, lines)


def interval_lines(report: dict[str, Any]) -> list[str]:
    """What the figures in brackets are."""
    found = sorted({(len(row["ratios"]), row["coverage"]) for row in report["time"]})
    return [f"ratios: medians of {n} repetitions, and an interval of {coverage:.1%} coverage" for n, coverage in found]


def growth_lines(report: dict[str, Any]) -> list[str]:
    """How the ratio of each arm and batch at the longest text compares with that at the shortest."""
    found = []
    for (arm, batch), points in curves(report).items():
        if len(points) > 1:
            (short, first, *_), (long, last, *_) = points[0], points[-1]
            found.append(
                f"{arm}, batch {batch}: the ratio at {long} new tokens is {last / first:.3f} times that at {short}"
            )
    return found


def weight_lines(report: dict[str, Any]) -> list[str]:
    """What each arm's own weights take."""
    weights = {row["arm"]: row["weights_mib"] for row in report["memory"] if row["arm"] != "base"}
    return [f"{arm}: {mib:.1f} MiB of weights of its own" for arm, mib in weights.items()]


def profile_table(report: dict[str, Any]) -> str:
    """What each part of a rectified step costs, in ms and as a share of the base model's step."""
    header = ["arm", "batch", "base step, ms", "rectified step, ms", *_PARTS.values()]
    lines = [
        [row["arm"], str(row["batch"]), f"{row['base_step_ms']:.2f}", f"{row['step_ms']:.2f}"]
        + [f"{row['ms'][part]:.2f} ({row['share'][part]:.1%})" for part in _PARTS]
        for row in report["profile"]
    ]
    return _table(header, lines)


def agreement_table(report: dict[str, Any]) -> str:
    """Greedy decisions of each arm that differ from those of its slow reference."""
    names = ("arm", "decisions", "differing", "under_margin", "near_ties")
    margins = [f"{row['margin']:g}" for row in report["agreement"][:1]]
    titles = ["of these with a margin under " + "".join(margins), "decisions with such a margin"]
    return _table(
        ["arm", "decisions", "other than the reference's", *titles],
        [[str(row[name]) for name in names] for row in report["agreement"]],
    )


def _bracketed(name: str) -> str:
    return f"({name})" if " " in name else name


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *lines]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _ratio(row: dict[str, Any] | None) -> str:
    return "–" if row is None else f"{row['ratio']:.3f} ({row['low']:.3f}–{row['high']:.3f})"


# ---------------------------------------------------------------------------------------------------------------------


def curves(report: dict[str, Any]) -> dict[tuple[str, int], list[tuple[int, float, float, float]]]:
    """For each arm and batch, by length: new tokens, the ratio to the base model, and its interval's ends."""
    found: dict[tuple[str, int], list[tuple[int, float, float, float]]] = {}
    for row in report["time"]:
        if row["against"] == "base":
            point = (row["new_tokens"], row["ratio"], row["low"], row["high"])
            found.setdefault((row["arm"], row["batch"]), []).append(point)
    return {which: sorted(points) for which, points in found.items()}


def plot_ratios(report: dict[str, Any], path: str | Path) -> None:
    """Draw the ratio against the length, a panel for each batch and a line for each arm; both axes logarithmic.

    Raises:
        InvalidArgumentError: see `plotting.check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    lines = curves(report)
    batches = sorted({batch for _, batch in lines}) or [0]
    figure = Figure(figsize=(4.5 * len(batches), 4), layout="constrained")
    panels: Any = figure.subplots(1, len(batches), sharey=True, squeeze=False)[0]
    for panel, batch in zip(panels, batches, strict=True):
        for (arm, own), points in lines.items():
            if own == batch:
                lengths, ratios, lows, highs = zip(*points, strict=True)
                ends = [[r - low for r, low in zip(ratios, lows, strict=True)]]
                ends += [[high - r for r, high in zip(ratios, highs, strict=True)]]
                panel.errorbar(lengths, ratios, yerr=ends, marker="o", capsize=3, label=arm)
                for length, ratio in zip(lengths, ratios, strict=True):
                    panel.annotate(f"{ratio:.2f}", (length, ratio), (4, 4), textcoords="offset points", fontsize=8)
        panel.axhline(1, color="grey", linewidth=0.5)
        panel.set(title=f"batch {batch}", xlabel="new tokens", xscale="log", yscale="log")
        panel.set_xticks(sorted({point[0] for points in lines.values() for point in points}))
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_formatter(ScalarFormatter())
            axis.set_minor_formatter(NullFormatter())
        panel.set_xticks([], minor=True)
        panel.margins(x=0.12)
    panels[0].set_ylabel("time / base")
    panels[0].legend()
    where = report["environment"]
    figure.suptitle(
        f"{where['model_shape']}, {where['dtype']}, {where['accelerator'] or where['cpu']}, "
        f"{where['torch_threads']} threads, rule {where['rule']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
