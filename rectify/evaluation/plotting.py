"""What all plots share: whether they can be drawn."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from rectify.errors import InvalidArgumentError, install_line


def can_plot() -> bool:
    """Whether matplotlib is there."""
    return importlib.util.find_spec("matplotlib") is not None


def check_plot(path: str | Path) -> None:
    """Refuse a plot that could not be drawn, before anything is computed for it.

    Raises:
        InvalidArgumentError: matplotlib is missing, or it does not write files of this kind.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise InvalidArgumentError(
            f"plot is {str(path)!r}, and matplotlib is not installed: {install_line('plots')}"
        ) from error
    if Path(path).suffix.removeprefix(".") not in FigureCanvasAgg.filetypes:
        raise InvalidArgumentError(f"plot is {str(path)!r}: give the name of a .png, .pdf or .svg file")
