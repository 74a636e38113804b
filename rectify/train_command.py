"""The command `rectify train KIND …`."""

from __future__ import annotations

from rectify.command_line import Parser
from rectify.command_table import Command

KINDS = {
    "detector": Command("rectify.training.detector_command", "a toxicity classifier, from labelled texts"),
    "moderation": Command(
        "rectify.training.moderation_command",
        "a moderation of questions with their answers in categories of harm, from judged pairs",
    ),
    "gate": Command(
        "rectify.training.gate_command", "a gate that weights detectors of several platforms for each text"
    ),
    "scorer": Command("rectify.training.scorer_command", "a scorer in place of Perspective, from texts with scores"),
    "instruction": Command(
        "rectify.training.instruction_command",
        "a detector that answers, and may explain itself, from labelled texts and rationales",
    ),
    "cascade": Command(
        "rectify.training.cascade_command",
        "a cascade of a small detector and a larger one, from labelled validation texts",
    ),
    "spans": Command("rectify.training.spans_command", "a detector of toxic spans, from texts with spans"),
    "experts": Command(
        "rectify.training.experts_command",
        "the expert and the anti-expert of DExperts, from labelled texts; a baseline",
    ),
    "q": Command("rectify.training.q_command", "a dead-end Q network, from trajectories; the same as train_q.py"),
    "cmd": Command("rectify.training.cmd_command", "a model that detoxifies itself, from chains"),
    "substitutions": Command(
        "rectify.training.substitutions_command",
        "what to put in place of toxic words, from people's rewrites of toxic sentences",
    ),
    "static": Command(
        "rectify.training.static_command", "a context-free table of token risks, from trajectories; a baseline"
    ),
}


def main(argv: list[str] | None = None, prog: str = "rectify train") -> int:
    """Run the training of a kind; returns its exit code."""
    argv = argv or []
    kinds = ", ".join(f"{kind} ({command.what})" for kind, command in KINDS.items())
    parser = Parser(
        prog=prog, usage=f"{prog} KIND …", description="Train a model.", epilog=f"{prog} KIND --help says more."
    )
    parser.add_argument("kind", metavar="KIND", choices=tuple(KINDS), help=kinds)
    kind = parser.parse_args(argv[:1]).kind
    return KINDS[kind].run(argv[1:], prog=f"{prog} {kind}")
