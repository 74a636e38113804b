"""The page of the server on which a text is tried by hand; it needs nothing from elsewhere."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #767676; --heat: #ff7a6b; }
@media (prefers-color-scheme: dark) { :root { --ink: #f2f2f2; --paper: #161616; --line: #9a9a9a; --heat: #a3261a; } }
* { box-sizing: border-box; }
body { max-width: 46rem; margin: 0 auto; padding: 1.5rem 1rem; font: 1rem/1.6 system-ui, sans-serif;
  color: var(--ink); background: var(--paper); }
label { display: block; font-weight: 600; margin-top: 1rem; }
textarea, input, select, button { font: inherit; color: inherit; background: var(--paper);
  border: 1px solid var(--line); border-radius: 4px; padding: .5rem; }
textarea, input { width: 100%; }
button { margin-top: 1rem; padding: .5rem 1.25rem; font-weight: 600; cursor: pointer; }
:focus-visible { outline: 3px solid #1a6fd4; outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; margin-top: 1rem; }
caption { text-align: left; font-weight: 600; }
th, td { text-align: left; font-weight: inherit; padding: .25rem .5rem; border-bottom: 1px solid var(--line); }
td { font-variant-numeric: tabular-nums; }
meter { width: 100%; }
meter::-webkit-meter-optimum-value { background: var(--heat); }
meter::-moz-meter-bar { background: var(--heat); }
#marked { white-space: pre-wrap; overflow-wrap: anywhere; border: 1px solid var(--line); border-radius: 4px;
  padding: .75rem; }
mark { color: inherit; background: color-mix(in srgb, var(--heat) var(--share), transparent); border-radius: 2px; }
mark small { font-variant-numeric: tabular-nums; padding: 0 .2rem; user-select: none; }
"""

_SCRIPT = """
"use strict";
const form = document.querySelector("form");
const [text, key, shown, button] = ["text", "key", "shown", "score"].map((id) => document.getElementById(id));
const [status, result, marked] = ["status", "result", "marked"].map((id) => document.getElementById(id));
const rows = [...document.querySelectorAll("tr[data-attribute]")];
let answered = null;

function draw() {
  const scores = answered.scores[shown.value];
  marked.replaceChildren();
  for (const span of scores ? scores.spanScores : []) {
    const mark = document.createElement("mark");
    const value = span.score.value;
    mark.style.setProperty("--share", Math.round(100 * value) + "%");
    const number = document.createElement("small");
    number.textContent = value.toFixed(2);
    const part = answered.text.slice(span.begin, span.end), words = part.trimEnd();
    mark.append(words, number);
    marked.append(mark, part.slice(words.length));
  }
}

form.addEventListener("submit", async (event) => {
  event.preventDefault();
  const names = rows.map((row) => row.dataset.attribute);
  const given = text.value;
  const body = { comment: { text: given }, doNotStore: true, spanAnnotations: true,
    requestedAttributes: Object.fromEntries(names.map((name) => [name, {}])) };
  const headers = { "Content-Type": "application/json" };
  if (key) headers["X-Goog-Api-Key"] = key.value;
  button.disabled = true;
  status.textContent = "Scoring …";
  try {
    const response = await fetch("v1alpha1/comments:analyze", { method: "POST", headers, body: JSON.stringify(body) });
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error.message);
    answered = { text: given, scores: answer.attributeScores || {} };
    for (const row of rows) {
      const scores = answered.scores[row.dataset.attribute];
      row.querySelector("output").value = scores ? scores.summaryScore.value.toFixed(3) : "no score";
      row.querySelector("meter").value = scores ? scores.summaryScore.value : 0;
    }
    draw();
    result.hidden = false;
    const first = answered.scores[names[0]];
    status.textContent = "Scored" + (first ? ": " + names[0] + " " + first.summaryScore.value.toFixed(3) : "") + ".";
  } catch (error) {
    result.hidden = true;
    status.textContent = "No score: " + error.message;
  } finally {
    button.disabled = false;
  }
});
shown.addEventListener("change", draw);
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>rectify: score a text</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<main>
<h1>Score a text</h1>
<p>Scorer: {scorer}. This server keeps no text.</p>
<form>
{key}<label for="text">Text</label>
<textarea id="text" rows="6" required></textarea>
<button id="score" type="submit">Score</button>
</form>
<p id="status" role="status"></p>
<section id="result" aria-label="Scores" hidden>
<table>
<caption>The whole text, from 0 to 1</caption>
<thead><tr><th scope="col">Attribute</th><th scope="col">Score</th><th scope="col">On a scale</th></tr></thead>
<tbody>
{rows}
</tbody>
</table>
<label for="shown">Sentences by</label>
<select id="shown">
{options}
</select>
<p id="marked"></p>
</section>
<noscript><p>This page needs JavaScript; the server itself does not.</p></noscript>
</main>
<script>{script}</script>
</body>
</html>
"""

_ROW = (
    '<tr data-attribute="{name}"><th scope="row">{name}</th><td><output></output></td>'
    '<td><meter min="0" max="1" value="0" aria-label="{name}"></meter></td></tr>'
)
_KEY = '<label for="key">API key</label>\n<input id="key" type="password" autocomplete="off" required>\n'


def _source(content: str) -> str:
    """How a policy names a script or style that it lets pass."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


PAGE_POLICY = "; ".join(
    [
        "default-src 'none'",
        f"script-src {_source(_SCRIPT)}",
        f"style-src {_source(_STYLE)}",
        "img-src data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
"""The Content-Security-Policy that the page is to be sent with."""


def page(scorer: str, attributes: Sequence[str], needs_key: bool) -> str:
    """The page as HTML.

    Args:
        scorer: how it is called.
        attributes: those that are shown.
        needs_key: whether to ask for an API key.
    """
    names = [escape(name) for name in attributes]
    return _PAGE.format(
        style=_STYLE,
        script=_SCRIPT,
        scorer=escape(scorer),
        key=_KEY if needs_key else "",
        rows="\n".join(_ROW.format(name=name) for name in names),
        options="\n".join(f"<option>{name}</option>" for name in names),
    )
