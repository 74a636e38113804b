"""The console command `rectify VERB …`."""

from __future__ import annotations

import sys
from contextlib import suppress

from rectify.command_line import leave_standard_output
from rectify.command_table import Command
from rectify.version import __version__

VERBS = {
    "generate": Command(
        "rectify.generation.command", "continue prompts with a language model, as it is or by a method"
    ),
    "build": Command(
        "rectify.builders.command",
        "make training data: trajectories of the Q network, rationales, spans, chains of self-detoxification",
    ),
    "train": Command(
        "rectify.train_command",
        "train a Q network, a detector of some kind, a scorer, a self-detoxifier, or a baseline",
    ),
    "score": Command(
        "rectify.scoring.score_command", "score the texts of files, by a local scorer or the Perspective API"
    ),
    "detect": Command(
        "rectify.detectors.detect_command", "say of texts whether they are toxic, how surely, why, and who decided"
    ),
    "serve": Command("rectify.scoring.serve_command", "a local server in place of the Perspective API"),
    "import": Command("rectify.published", "turn a checkpoint of the published system into a Q network"),
}


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<10} {command.what}" for verb, command in VERBS.items())
    return f"usage: rectify VERB …\n\n{verbs}\n\nrectify VERB --help says more; rectify --version says which it is."


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Returns the exit code: 0, or 2 where something that was given cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "--version"):
        with suppress(BrokenPipeError):  # whoever reads it may stop reading
            print(f"rectify {__version__}" if argv[:1] == ["--version"] else _usage())
        leave_standard_output()
        return 0
    if argv[0] not in VERBS:
        print(f"rectify: error: no verb {argv[0]!r}: give one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return VERBS[argv[0]].run(argv[1:], prog=f"rectify {argv[0]}")
