"""The command that makes training data: `rectify build trajectories`, `rationales`, `spans` and `cmd`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

from rectify.builders import cmd_command, rationales_command, spans_command
from rectify.builders.selection import TRAIN, VALIDATION, sample_items
from rectify.builders.settings import KEEP, REWARDS, TrajectorySettings
from rectify.builders.trajectories import build_trajectories, label_trajectories
from rectify.command_line import Parser, execute, say
from rectify.errors import InvalidArgumentError, OutputError
from rectify.hub import DTYPES, available_device, load_language_model
from rectify.methods.specs import parse_method
from rectify.text_files import TEXT_COLUMN, read_labelled_texts, read_texts

_SETTINGS = TrajectorySettings()
_BOTH = {"validation_share", "seed"}  # settings that labelled texts share


def make_parser(prog: str) -> Parser:
    """The flags of the command, whose second word is the kind of data."""
    parser = Parser(prog=prog, description="Make training data.", allow_abbrev=False)
    what = (
        "trajectories: of the Q network; rationales: of the instruction-style detector; spans: of the span detector; "
        "cmd: of a model that detoxifies itself"
    )
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True, help=what)
    others = {"rationales": rationales_command, "spans": spans_command, "cmd": cmd_command}
    for other in others.values():
        other.add_parser(kinds)
    what = "Make trajectories for the Q network: sampled continuations scored by a reward model, or labelled texts."
    # flags that are not given are left out of the namespace, so that one without an effect can be refused
    trajectories = kinds.add_parser(
        "trajectories", description=what, allow_abbrev=False, argument_default=argparse.SUPPRESS
    )

    def setting(group: argparse._ArgumentGroup, name: str, text: str, **how: object) -> None:
        default = getattr(_SETTINGS, name)
        how.setdefault("type", type(default))
        group.add_argument(f"--{name}", help=f"{text} (default: {default})", **how)  # type: ignore[arg-type]

    data = trajectories.add_argument_group("data")
    data.add_argument("--texts", nargs="+", metavar="FILE", required=True, help="JSON lines, .csv, .tsv or .txt")
    data.add_argument(
        "--text_column",
        nargs="+",
        default=[TEXT_COLUMN],
        metavar="NAME",
        help=f"given once, or once for each file (default: {TEXT_COLUMN})",
    )
    data.add_argument("--num_texts", type=int, metavar="N", help="a random sample of the texts (default: all)")
    data.add_argument("--output_dir", metavar="DIR", required=True, help="gets train.jsonl and validation.jsonl")
    setting(data, "validation_share", "share of the prompts or texts for validation")
    setting(data, "seed", "of everything random")

    labels = trajectories.add_argument_group("labelled texts", "whole texts as they are, without a model")
    labels.add_argument(
        "--label_column", nargs="+", metavar="NAME", help="as text_column; holds 0, 1, true, false or a number between"
    )

    own = trajectories.add_argument_group("continuations", "of the beginnings of texts, for texts without labels")
    own.add_argument("--model", help="language model: folder, Hub id, or pocket")
    own.add_argument(
        "--method",
        metavar="NAME[:PATH][,key=value…][+…]",
        help="that continues the texts, such as rectify:my-q-network,beta=6 (default: the model as it is)",
    )
    own.add_argument("--reward_model", metavar="FOLDER", help="classifier that scores the continuations, each alone")
    setting(own, "prompt_tokens", "tokens of a text that make its prompt")
    setting(own, "n", "continuations a prompt")
    setting(own, "max_new_tokens", "of a continuation")
    setting(own, "min_new_tokens", "of a continuation")
    setting(own, "temperature", "of sampling")
    setting(own, "top_p", "of sampling")
    setting(own, "top_k", "of sampling, 0 for all tokens")
    own.add_argument("--batch_size", type=int, help="prompts at a time (default: 400 continuations' worth)")
    own.add_argument("--device", help="default: an accelerator if there is one")
    own.add_argument("--dtype", choices=("auto", *DTYPES), help="auto (default): float32 on a CPU")

    selection = trajectories.add_argument_group(
        "selection of continuations", "may be changed for a finished output_dir: nothing is generated again"
    )
    setting(selection, "keep", "the most and the least toxic of a prompt, all, or a random sample", choices=KEEP)
    setting(selection, "sample_size", "with --keep sample: continuations a prompt")
    setting(selection, "drop_clean", "share left out of the prompts without a toxic continuation")
    setting(selection, "reward", "soft: minus the probability of toxicity; hard: -1 from 0.5 on", choices=REWARDS)
    return parser


def run(arguments: argparse.Namespace) -> int | None:
    """Run the command. Returns the exit code, or `None` for 0.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    others: dict[str, Callable[[argparse.Namespace], int | None]] = {
        "rationales": rationales_command.run,
        "spans": spans_command.run,
        "cmd": cmd_command.run,
    }
    if arguments.kind in others:
        return others[arguments.kind](arguments)
    for name in (TRAIN, VALIDATION):
        place = Path(arguments.output_dir) / name
        if any(place.resolve() == Path(text).resolve() for text in arguments.texts):
            raise OutputError(f"output_dir {arguments.output_dir!r} gets a {name}, which texts name: give another")
    given = vars(arguments)
    chosen = {field.name: given[field.name] for field in fields(TrajectorySettings) if field.name in given}
    settings = TrajectorySettings(**chosen)
    num_texts = given.get("num_texts")
    sample_items([], num_texts, settings.seed)  # refuses a bad number before anything is read
    if "label_column" in given:
        for name in ("model", "method", "reward_model", "device", "dtype", *chosen):
            if name in given and name not in _BOTH:
                raise InvalidArgumentError(f"{name} is given with label_column, which needs no model: give one of them")
        labelled = read_labelled_texts(arguments.texts, arguments.text_column, arguments.label_column)
        labelled = sample_items(labelled, num_texts, settings.seed)
        say(str(label_trajectories(labelled, arguments.output_dir, settings.validation_share)))
        return None
    for name in ("model", "reward_model"):
        if name not in given:
            raise InvalidArgumentError(
                f"{name} is not given: name it, or give label_column for texts that come with labels"
            )
    if "sample_size" in given and settings.keep != "sample":
        raise InvalidArgumentError(f"sample_size is given, but keep is {settings.keep!r}: add --keep sample")
    method = parse_method(given["method"]) if "method" in given else None
    device = available_device(given.get("device"))
    texts = sample_items(read_texts(arguments.texts, arguments.text_column), num_texts, settings.seed)
    # only here, as labelled texts need no classifier
    from rectify.detectors.classifier import ToxicityClassifier

    classifier = ToxicityClassifier.from_pretrained(arguments.reward_model, device=device)
    model, tokenizer = load_language_model(arguments.model, DTYPES.get(given.get("dtype", "auto")), device)

    origin = {"model": arguments.model, "reward_model": arguments.reward_model}
    decoder = None
    if method is not None:
        origin["method"] = method.label
        sampling = {"do_sample": True, **{name: getattr(settings, name) for name in ("temperature", "top_p", "top_k")}}
        decoder = method.bind(model, tokenizer, sampling)
    score = classifier.probabilities
    say(str(build_trajectories(texts, model, tokenizer, score, settings, arguments.output_dir, origin, decoder)))
    return None


def main(argv: list[str] | None = None, prog: str = "rectify build") -> int:
    """The command as a function of its arguments. Returns the exit code."""
    return execute(run, make_parser(prog), argv)
