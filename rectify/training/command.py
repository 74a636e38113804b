"""The command `rectify train KIND …`."""

from __future__ import annotations

from rectify.command_line import Parser

KINDS = {
    "detector": "a toxicity classifier, from labelled texts",
    "moderation": "a moderation of questions with their answers in categories of harm, from judged pairs",
    "gate": "a gate that weights detectors of several platforms for each text",
    "scorer": "a scorer in place of Perspective, from texts with scores",
    "instruction": "a detector that answers, and may explain itself, from labelled texts and rationales",
    "cascade": "a cascade of a small detector and a larger one, from labelled validation texts",
    "spans": "a detector of toxic spans, from texts with spans",
    "experts": "the expert and the anti-expert of DExperts, from labelled texts; a baseline",
    "q": "a dead-end Q network, from trajectories; the same as train_q.py",
    "cmd": "a model that detoxifies itself, from chains",
    "substitutions": "what to put in place of toxic words, from people's rewrites of toxic sentences",
    "static": "a context-free table of token risks, from trajectories; a baseline",
}


def main(argv: list[str] | None = None, prog: str = "rectify train") -> int:
    """Run the training of a kind; returns its exit code."""
    argv = argv or []
    kinds = ", ".join(f"{kind} ({what})" for kind, what in KINDS.items())
    parser = Parser(
        prog=prog, usage=f"{prog} KIND …", description="Train a model.", epilog=f"{prog} KIND --help says more."
    )
    parser.add_argument("kind", metavar="KIND", choices=tuple(KINDS), help=kinds)
    kind = parser.parse_args(argv[:1]).kind
    # kinds are imported when called, as verbs are
    if kind == "detector":
        from rectify.training.detector_command import main as train
    elif kind == "moderation":
        from rectify.training.moderation_command import main as train
    elif kind == "gate":
        from rectify.training.gate_command import main as train
    elif kind == "scorer":
        from rectify.training.scorer_command import main as train
    elif kind == "instruction":
        from rectify.training.instruction_command import main as train
    elif kind == "cascade":
        from rectify.training.cascade_command import main as train
    elif kind == "spans":
        from rectify.training.spans_command import main as train
    elif kind == "experts":
        from rectify.training.experts_command import main as train
    elif kind == "q":
        from rectify.training.q_command import main as train
    elif kind == "cmd":
        from rectify.training.cmd_command import main as train
    elif kind == "substitutions":
        from rectify.training.substitutions_command import main as train
    else:
        from rectify.training.static_command import main as train
    return train(argv[1:], prog=f"{prog} {kind}")
