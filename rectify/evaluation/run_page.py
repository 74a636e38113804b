"""A run's report as a page that needs nothing beside it."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from rectify.errors import install_line
from rectify.evaluation.examples import Example
from rectify.evaluation.run_tables import Table

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td { white-space: nowrap; } td.long { white-space: normal; min-width: 20rem; }
thead th { border-bottom-width: 2px; } tbody tr:hover { background: var(--soft); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.note { opacity: .8; max-width: 60rem; } .warning { border-left: 4px solid #d55e00; padding: .3rem .8rem; }
figure { margin: 1rem 0; } img { max-width: 100%; background: white; padding: .5rem; border-radius: .3rem; }
details { border: 1px solid var(--line); border-radius: .3rem; padding: .4rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; } blockquote { margin: .5rem 0; font-weight: 600; }
"""
_LONG = 60  # characters: cells beyond this may be wrapped


def page(
    title: str,
    facts: Sequence[tuple[str, str]],
    warnings: Sequence[str],
    tables: Sequence[Table],
    pictures: Sequence[tuple[str, str]],
    examples: Sequence[Example],
) -> str:
    """The page as HTML.

    Args:
        title: of the page.
        facts: what the figures are of.
        warnings: shown before the figures.
        tables: the first one stands before the pictures.
        pictures: descriptions and SVG documents; none where they could not be drawn.
        examples: behind a click each.
    """
    parts = [f"<h1>{escape(title)}</h1>"]
    parts += [f'<p class="warning">{escape(warning)}</p>' for warning in warnings]
    parts += [_table(table) for table in tables[:1]]
    parts += [_picture(*each) for each in pictures]
    if not pictures:
        parts.append(f"<p class=note>Pictures need matplotlib: <code>{install_line('plots')}</code></p>")
    parts += [_table(table) for table in tables[1:]]
    if examples:
        parts.append(
            "<h2>Examples</h2><p class=note>Prompts drawn by the seed, and the most toxic continuation of each by each "
            "method. They can be offensive.</p>"
        )
        parts += map(_example, examples)
    parts.append("<h2>What was run</h2><dl>")
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts]
    parts.append("</dl>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}<style>{_STYLE}</style></head>\n<body>\n' + "\n".join(
        [*parts, "</body></html>\n"]
    )


def _table(table: Table) -> str:
    header = "".join(f"<th scope=col>{escape(cell)}</th>" for cell in table.header)
    rows = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in table.rows)
    note = f"<p class=note>{escape(table.note)}</p>" if table.note else ""
    return (
        f"<h2>{escape(table.title)}</h2><div class=wide><table><thead><tr>{header}</tr></thead>"
        f"<tbody>{rows}</tbody></table></div>{note}"
    )


def _cell(text: str) -> str:
    return f"<td{' class=long' if len(text) > _LONG else ''}>{escape(text)}</td>"


def _picture(description: str, svg: str) -> str:
    # as an image, so that the names inside one picture do not meet those of another
    data = base64.b64encode(svg.encode()).decode()
    return (
        f'<figure><img alt="{escape(description)}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption class=note>{escape(description)}</figcaption></figure>"
    )


def _example(example: Example) -> str:
    rows = "".join(
        f"<tr><td>{escape(one.method)}</td><td>{'–' if one.score is None else f'{one.score:.2f}'}</td>"
        f"<td class=long>{escape(one.text)}</td></tr>"
        for one in example.shown
    )
    kind = "toxic prompt" if example.toxic else "prompt"
    return (
        f"<details><summary>{kind}: {escape(example.prompt[:80])}</summary><blockquote>{escape(example.prompt)}"
        "</blockquote><div class=wide><table><thead><tr><th scope=col>method</th><th scope=col>score</th>"
        f"<th scope=col>continuation</th></tr></thead><tbody>{rows}</tbody></table></div></details>"
    )
