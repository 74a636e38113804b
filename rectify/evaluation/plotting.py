"""What all plots share: whether they can be drawn."""

from __future__ import annotations

from pathlib import Path

from rectify.errors import InvalidArgumentError
from rectify.extras import has_extra, need_extra


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return has_extra("plots")


def check_plot(path: str | Path) -> None:
    """Refuse a plot that could not be drawn, before anything is computed for it.

    Raises:
        MissingExtraError: matplotlib is not installed.
        InvalidArgumentError: it does not write files of this kind.
    """
    need_extra("plots", f"plot is {str(path)!r}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if Path(path).suffix.removeprefix(".") not in FigureCanvasAgg.filetypes:
        raise InvalidArgumentError(f"plot is {str(path)!r}: give the name of a .png, .pdf or .svg file")
