"""A trace as a page for people: tokens coloured by risk, and what the base model would have chosen struck through."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise
from typing import Any

from rectify.generation.trace import Candidate, ContinuationTrace, PromptTrace, TokenTrace, counts

_LIMITS = (0.1, 0.2, 0.4, 0.6, 0.8)
"""From here on a risk has the next colour."""
# ColorBrewer's YlOrBr, told apart by lightness alone; on dark paper the highest risk is the lightest
_LIGHT = ("#fee391", "#fec44f", "#fe9929", "#c24702", "#8c2d04")
_DARK = ("#521d05", "#8c2d04", "#c24702", "#fe9929", "#fff7bc")
_BLACK, _WHITE = "#1b1b1b", "#ffffff"
_WIDENED, _DEAD_END = "⇔", "⊗"
# control characters by their pictures, so that they are seen and the page stays valid
_PICTURES = {code: chr(0x2400 + code) for code in range(32)} | {9: "⇥", 10: "⏎", 127: "␡"}


def _colours(colours: Sequence[str], inks: Sequence[str]) -> str:
    pairs = enumerate(zip(colours, inks, strict=True), start=1)
    return " ".join(f"--r{step}: {colour}; --i{step}: {ink};" for step, (colour, ink) in pairs)


_STYLE = f"""
:root {{ color-scheme: light dark; --ink: {_BLACK}; --paper: {_WHITE}; --line: #767676; --faint: #5c5c5c;
  {_colours(_LIGHT, (_BLACK, _BLACK, _BLACK, _WHITE, _WHITE))} }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #f2f2f2; --paper: #161616; --line: #9a9a9a; --faint: #a8a8a8;
  {_colours(_DARK, (_WHITE, _WHITE, _WHITE, _BLACK, _BLACK))} }} }}
* {{ box-sizing: border-box; }}
body {{ max-width: 60rem; margin: 0 auto; padding: 1.5rem 1rem; font: 1rem/1.6 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }}
h1 {{ font-size: 1.5rem; margin: 0 0 .5rem; }}
h2 {{ font-size: 1.1rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line);
  overflow-wrap: anywhere; }}
article {{ margin: 1rem 0 1.5rem; }}
.text {{ font-size: 1.1rem; line-height: 2; margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }}
.prompt, summary, dt, .note {{ color: var(--faint); }}
.token {{ cursor: help; }}
.token, ins {{ border-radius: 3px; padding: .1em .06em; }}
.changed {{ padding: 0; }}
.token:hover {{ outline: 2px solid var(--line); }}
ins {{ text-decoration: none; border-bottom: 2px solid var(--ink); border-radius: 3px 3px 0 0; }}
del {{ font-size: .75em; text-decoration: line-through; border-radius: 3px; padding: .1em .2em; margin-right: .2em; }}
sup {{ font-weight: 700; margin-left: .1em; line-height: 1; }}
.special {{ font: .75em ui-monospace, monospace; border: 1px solid var(--line); padding: .1em .3em; }}
{" ".join(f".r{step} {{ background: var(--r{step}); color: var(--i{step}); }}" for step in range(1, len(_LIMITS) + 1))}
ul {{ list-style: none; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .35rem 1.25rem; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: .5rem 0; }}
dd {{ margin: 0; overflow-wrap: anywhere; }}
summary {{ cursor: pointer; font-size: .9rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; margin-top: .5rem; }}
th, td {{ text-align: left; padding: .15rem .6rem .15rem 0; border-bottom: 1px solid var(--line); white-space: pre; }}
:focus-visible {{ outline: 3px solid #1a6fd4; outline-offset: 2px; }}
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rectify: a trace</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<h1>How the tokens came to be</h1>
<p>{counts}</p>
{legend}
<details>
<summary>Settings</summary>
<dl>
{settings}
</dl>
</details>
{prompts}
</main>
</body>
</html>
"""

_CONTINUATION = """<article>
<p class="text"><span class="prompt">{prompt}</span>{text}</p>
<details>
<summary>Numbers</summary>
<div class="wide"><table>
<thead>
<tr><th colspan="8" scope="colgroup">generated</th>
<th colspan="4" scope="colgroup">the base model would have chosen</th></tr>
<tr>{heads}</tr>
</thead>
<tbody>
{rows}
</tbody>
</table></div>
</details>
</article>"""
_COLUMNS = ("token", "risk", "base", "method")
_HEADS = "".join(f'<th scope="col">{name}</th>' for name in ("", *_COLUMNS, "cap", "moved", "", *_COLUMNS))


def trace_page(settings: dict[str, Any], traces: Sequence[PromptTrace]) -> str:
    """The page as one HTML document, which needs nothing from elsewhere and runs nothing.

    Args:
        settings: what the continuations depend on, by name.
        traces: of every prompt.
    """
    return _PAGE.format(
        style=_STYLE,
        counts=escape(counts(traces)),
        legend=_legend(traces),
        settings="\n".join(
            f"<dt>{_plain(name)}</dt><dd>{_plain(_value(value))}</dd>" for name, value in settings.items()
        ),
        prompts="\n".join(map(_prompt, traces)),
    )


def _legend(traces: Sequence[PromptTrace]) -> str:
    lines = []
    if any(token.risk is not None for trace in traces for token in trace.tokens):
        edges = (0, *_LIMITS, 1)
        spans = [
            f'<span class="token r{step}">{low:g}–{high:g}</span>' for step, (low, high) in enumerate(pairwise(edges))
        ]
        lines.append(f"risk {' '.join(spans)}")
    lines += [
        "<del>this</del><ins>that</ins> the base model would have chosen the struck-through token here",
        f"<sup>{_WIDENED}</sup> widening: no policy under the rule within top-k and top-p, so others were let in",
        f"<sup>{_DEAD_END}</sup> dead end: no policy under the rule at all, so no cap was kept",
    ]
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<ul>{items}</ul>\n<p class="note">Point at a token for its numbers, or open its continuation\'s table.</p>'


def _prompt(trace: PromptTrace) -> str:
    articles = "\n".join(_continuation(trace.prompt, one) for one in trace.continuations)
    return f"<section>\n<h2>{_plain(trace.prompt)}</h2>\n{articles}\n</section>"


def _continuation(prompt: str, continuation: ContinuationTrace) -> str:
    text = "".join(map(_token, continuation.tokens))
    rows = "\n".join(_row(number, token) for number, token in enumerate(continuation.tokens, start=1))
    return _CONTINUATION.format(prompt=_plain(prompt), text=text, heads=_HEADS, rows=rows)


def _token(token: TokenTrace) -> str:
    text, space = _shown(token), " " if token.text[:1] == " " and token.text.strip(" ") else ""
    if token.base_choice is not None:
        instead = token.base_choice
        text = f'<del class="{_classes(instead)}">{_shown(instead)}</del><ins class="{_classes(token)}">{text}</ins>'
    sign = _sign(token)
    mark = f"<sup>{sign}</sup>" if sign else ""
    classes = "token changed" if token.base_choice is not None else f"token {_classes(token)}"
    after = "\n" * token.text.count("\n")  # a new line is shown, and made
    return f'{space}<span class="{classes}" title="{escape(_title(token))}">{text}{mark}</span>{after}'


def _row(number: int, token: TokenTrace) -> str:
    instead = token.base_choice
    held = " (held)" if token.capped else ""
    cells = [
        str(number), _quoted(token), _number(token.risk), _number(token.base_probability), _number(token.probability),
        _number(token.cap) + held, _number(token.moved), _sign(token),
    ]  # fmt: skip
    if instead is not None:
        values = (instead.risk, instead.base_probability, instead.probability)
        cells += [_quoted(instead), *map(_number, values)]
    else:
        cells += [""] * 4
    return "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"


def _title(token: TokenTrace) -> str:
    lines = [_described(token)]
    if token.base_choice is not None:
        lines.append(f"The base model would choose {_described(token.base_choice)}")
    lines.append(f"Probability moved in this state: {token.moved:.3f}")
    lines += ["A widening"] * token.widened + ["A dead end"] * token.dead_end
    return "\n".join(lines)


def _described(candidate: Candidate) -> str:
    parts = [f"{_quoted(candidate)}, id {candidate.id}"]
    if candidate.risk is not None:
        parts.append(f"risk {_number(candidate.risk)}")
    parts.append(f"probability {_number(candidate.base_probability)} → {_number(candidate.probability)}")
    if candidate.cap is not None:
        parts.append(f"cap {_number(candidate.cap)}" + ", which holds it" * bool(candidate.capped))
    return "; ".join(parts)


# ---------------------------------------------------------------------------------------------------------------------


def _classes(candidate: Candidate) -> str:
    step = 0 if candidate.risk is None else sum(candidate.risk >= limit for limit in _LIMITS)
    return f"r{step}" if candidate.text else f"r{step} special"


def _shown(candidate: Candidate) -> str:
    """A token without the space before it; by its name in the vocabulary where it has no text."""
    text = candidate.text.lstrip(" ") or candidate.text.replace(" ", "␣") or candidate.token
    return _plain(text)


def _quoted(candidate: Candidate) -> str:
    return f"“{candidate.text.translate(_PICTURES)}”" if candidate.text else candidate.token


def _sign(token: TokenTrace) -> str:
    return _WIDENED if token.widened else _DEAD_END if token.dead_end else ""


def _plain(text: str) -> str:
    return escape(text.translate(_PICTURES))


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _value(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else "–" if value is None else str(value)
