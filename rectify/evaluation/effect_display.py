"""An effect report for people: a Markdown table, and curves of toxicity against what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rectify.errors import InvalidArgumentError

_COLUMNS: tuple[tuple[str, Callable[[dict[str, Any]], str]], ...] = (
    ("arm", lambda arm: f"`{arm['label']}`"),
    ("toxic share, toxic prompts", lambda arm: _share(arm["toxic"]["toxic_share"], arm["toxic"]["toxic_share_error"])),
    ("toxic share, all", lambda arm: _share(arm["all"]["toxic_share"], arm["all"]["toxic_share_error"])),
    ("expected maximum, all", lambda arm: _number(arm["all"]["expected_maximum"], ".3f")),
    ("any of n toxic, all", lambda arm: _number(arm["all"]["any_toxic"], ".3f")),
    ("own perplexity", lambda arm: _ratio(arm["all"]["own_perplexity"], arm["all"]["own_ratio"], ".1f")),
    ("clean perplexity", lambda arm: _ratio(arm["clean"]["perplexity"], arm["clean"]["ratio"], ".1f")),
    ("clean tokens cut", lambda arm: _number(arm["clean"]["cut_share"], ".2%")),
    ("dist-2", lambda arm: _ratio(arm["distinct"]["2"], arm["distinct_2_ratio"], ".3f")),
    ("n", lambda arm: str(arm["all"]["continuations"])),
    ("failures", lambda arm: str(arm["all"]["failures"])),
)


def markdown_table(report: dict[str, Any]) -> str:
    """The arms of an effect report, a line each; ratios are to the base model."""
    lines = [[name for name, _ in _COLUMNS], ["---"] * len(_COLUMNS)]
    lines += [[show(arm) for _, show in _COLUMNS] for arm in report["arms"]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _share(value: float | None, error: float | None) -> str:
    return _number(value, ".4f") + (f" ± {error:.4f}" if error is not None else "")


def _ratio(value: float | None, ratio: float | None, form: str) -> str:
    return _number(value, form) + (f" ({ratio:.3f}×)" if ratio is not None else "")


# ---------------------------------------------------------------------------------------------------------------------


def check_plot(path: str | Path) -> None:
    """Refuse a plot that could not be drawn, before anything is computed for it.

    Raises:
        InvalidArgumentError: matplotlib is missing, or it does not write files of this kind.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise InvalidArgumentError(
            f"plot is {str(path)!r}, and matplotlib is not installed: pip install 'rectify[plots]'"
        ) from error
    if Path(path).suffix.removeprefix(".") not in FigureCanvasAgg.filetypes:
        raise InvalidArgumentError(f"plot is {str(path)!r}: give the name of a .png, .pdf or .svg file")


def curves(report: dict[str, Any]) -> dict[str, list[tuple[float, float, float, float]]]:
    """The points of each rule family and risk model, by its parameter.

    Returns:
        For each family, of each of its arms: the parameter, the toxic share on toxic prompts (on all where none of them
        is toxic), and the own and the clean-text perplexity over the base model's. The base arm is the family `base`,
        at parameter 0.
    """
    found: dict[str, list[tuple[float, float, float, float]]] = {}
    for arm in report["arms"]:
        prompts = arm["toxic"] if arm["toxic"]["toxic_share"] is not None else arm["all"]
        known = [prompts["toxic_share"], prompts["own_ratio"], arm["clean"]["ratio"]]
        share, own, clean = (math.nan if figure is None else figure for figure in known)
        found.setdefault(arm["family"], []).append((arm["value"] or 0.0, share, own, clean))
    return {family: sorted(points) for family, points in found.items()}


def plot_curves(report: dict[str, Any], path: str | Path) -> None:
    """Draw toxic share against own perplexity (left) and against clean-text perplexity (right), a line a family.

    Raises:
        InvalidArgumentError: see `check_plot`.
    """
    check_plot(path)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    panels: Any = figure.subplots(1, 2)
    titles = ("own perplexity / base", "clean-text perplexity / base")
    for panel, title, place in zip(panels, titles, (2, 3), strict=True):
        for family, points in curves(report).items():
            style = {"marker": "*", "color": "black", "markersize": 12} if family == "base" else {"marker": "o"}
            panel.plot([point[1] for point in points], [point[place] for point in points], label=family, **style)
            for point in points if family != "base" else []:
                if math.isfinite(point[1]) and math.isfinite(point[place]):
                    offset = {"xytext": (4, 4), "textcoords": "offset points"}
                    panel.annotate(f"{point[0]:g}", (point[1], point[place]), fontsize=8, **offset)
        panel.axhline(1, color="grey", linewidth=0.5)
        panel.set_xlim(left=0)
        panel.set_xlabel("toxic share")
        panel.set_ylabel(title)
    panels[0].legend()
    settings = report["settings"]
    figure.suptitle(
        f"{settings['model']}, {settings['chosen_prompts']} prompts × {settings['num_return_sequences']}, "
        f"judge {settings['judge']}",
        fontsize=9,
    )
    figure.savefig(path, dpi=150)
