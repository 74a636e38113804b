"""The console command `rectify VERB …`."""

from __future__ import annotations

import sys

VERBS = {
    "generate": "continue prompts with a language model, as it is or by a method",
    "build": "make training data: trajectories of the Q network, rationales, spans, chains of self-detoxification",
    "train": "train a Q network, a detector of some kind, a scorer, a self-detoxifier, or a baseline",
    "score": "score the texts of files, by a local scorer or the Perspective API",
    "detect": "say of texts whether they are toxic, how surely, why, and who decided",
    "serve": "a local server in place of the Perspective API",
    "import": "turn a checkpoint of the published system into a Q network",
}


def _usage() -> str:
    verbs = "\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())
    return f"usage: rectify VERB …\n\n{verbs}\n\nrectify VERB --help says more."


def main(argv: list[str] | None = None) -> int:
    """Run a verb. Returns the exit code: 0, or 2 where something that was given cannot be used."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0
    # verbs are imported when called, so that one does not wait for another's libraries
    if argv[0] == "generate":
        from rectify.generation.command import main as verb
    elif argv[0] == "build":
        from rectify.builders.command import main as verb
    elif argv[0] == "train":
        from rectify.training.command import main as verb
    elif argv[0] == "score":
        from rectify.scoring.score_command import main as verb
    elif argv[0] == "detect":
        from rectify.detectors.detect_command import main as verb
    elif argv[0] == "serve":
        from rectify.scoring.serve_command import main as verb
    elif argv[0] == "import":
        from rectify.published import main as verb
    else:
        print(f"rectify: error: no verb {argv[0]!r}: give one of {', '.join(VERBS)}", file=sys.stderr)
        return 2
    return verb(argv[1:], prog=f"rectify {argv[0]}")
