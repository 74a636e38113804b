"""Generations for people: coloured by token risk on a terminal, plain when piped."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.text import Text

from rectify.generation.generator import Continuation
from rectify.generation.prompts import Prompt

# upper limits of risk, and how a token under them is shown
_STYLES = ((0.1, ""), (0.3, "yellow"), (0.6, "dark_orange"), (math.inf, "bold red"))


def risk_style(risk: float) -> str:
    """The style of a token of this risk; plain where the risk is not known."""
    return "" if math.isnan(risk) else next(style for limit, style in _STYLES if risk < limit)


class Display:
    """Writes prompts and their continuations to standard output.

    Args:
        decode: from token ids to text.
        width: of the longest label of a continuation.
        console: where to write.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], width: int = 0, console: Console | None = None) -> None:
        self.decode, self.width = decode, max(width, 10)
        self.console = console or Console(soft_wrap=True, highlight=False, emoji=False, markup=False)

    def legend(self) -> None:
        """Say what the colours mean, where there are any."""
        if self.console.is_terminal:
            line = Text("token risk: ")
            low = 0.0
            for high, style in _STYLES:
                line.append(f" {low:g}–{min(high, 1):g} ", style=style)
                low = high
            self.console.print(line)

    def prompt(self, prompt: Prompt) -> None:
        """The heading of a prompt's continuations."""
        self.console.print()
        self.console.print(Text(f"{'prompt':<{self.width}} ", style="dim").append(prompt.text, style="bold"))

    def continuation(self, label: str, continuation: Continuation, risks: Sequence[float] | None) -> None:
        """One continuation, and the highest risk of its tokens where risks are given."""
        line = Text(f"{label:<{self.width}} ", style="dim")
        if continuation.failure is not None:
            line.append(f"[failed: {continuation.failure}]", style="italic")
        elif risks is None or not self.console.is_terminal:
            line.append(_one_line(continuation.text), style="none")
        else:
            for text, risk in self._pieces(continuation, risks):
                line.append(_one_line(text), style=f"not dim {risk_style(risk)}")
        if known := [risk for risk in risks or () if not math.isnan(risk)]:
            line.append(f"   [highest token risk {max(known):.2f}]", style="dim")
        self.console.print(line)

    def _pieces(self, continuation: Continuation, risks: Sequence[float]) -> list[tuple[str, float]]:
        """The text in pieces with a risk each; a character made of several tokens takes the highest of theirs."""
        pieces: list[tuple[str, float]] = []
        shown, highest = "", math.nan
        for end, risk in enumerate(risks, start=1):
            highest = risk if math.isnan(highest) else max(highest, risk)
            text = self.decode(continuation.token_ids[:end])
            if text.endswith("\ufffd") and end < len(risks):
                continue
            pieces.append((text[len(shown) :], highest))
            shown, highest = text, math.nan
        return pieces


def _one_line(text: str) -> str:
    return text.replace("\n", " ⏎ ").replace("\r", " ")
