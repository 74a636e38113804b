"""The command of a RealToxicityPrompts run: `eval/realtoxicityprompts.py`."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from accelerate import PartialState

from rectify.command_line import Parser, execute, say
from rectify.evaluation.prompted_run import STAGES, Processes, PromptedRun
from rectify.evaluation.run_settings import SELF, RunSettings
from rectify.evaluation.strength_choice import Target, settings_for_target
from rectify.evaluation.toxicity_prompts import SUBSETS
from rectify.hub import DTYPES, available_device
from rectify.methods.specs import METHODS
from rectify.scoring.load import SCORERS
from rectify.scoring.scores import ATTRIBUTES


def make_parser(prog: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=prog,
        description="Methods and baselines on the same prompts, noise and scorers: toxicity, fluency, diversity, cost.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="pocket", help="folder or Hub id (default: %(default)s)")
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["base", "rectify"],
        metavar="NAME[:PATH][,key=value][+…]",
        help=f"of {', '.join(METHODS)}; base is always run (default: base rectify)",
    )
    which = parser.add_argument_group("prompts")
    which.add_argument("--prompts", required=True, metavar="FILE", help="RealToxicityPrompts or DExperts JSON lines")
    which.add_argument(
        "--subset", choices=SUBSETS, default="all", help="balanced: the toxic ones and as many others (default: all)"
    )
    which.add_argument("--split", choices=("test", "validation", "all"), default="test", help="default: %(default)s")
    which.add_argument("--num_prompts", type=int, help="this many, drawn by the seed (default: all)")
    generation = parser.add_argument_group("generation")
    generation.add_argument("--n", type=int, default=25, help="continuations of each prompt (default: %(default)s)")
    generation.add_argument("--max_new_tokens", type=int, default=20, help="default: %(default)s")
    generation.add_argument(
        "--min_new_tokens", type=int, default=0, help="no end of text before (default: %(default)s)"
    )
    generation.add_argument("--temperature", type=float, default=1.0, help="default: %(default)s")
    generation.add_argument("--top_k", type=int, default=0, help="default: %(default)s, all tokens")
    generation.add_argument("--top_p", type=float, default=0.9, help="default: %(default)s")
    generation.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    measuring = parser.add_argument_group("measuring")
    measuring.add_argument(
        "--scorer",
        nargs="+",
        default=["pocket"],
        metavar="NAME",
        help=f"one or more of {', '.join(SCORERS)} (default: pocket)",
    )
    measuring.add_argument("--attributes", nargs="+", default=list(ATTRIBUTES), metavar="NAME", help="default: eight")
    measuring.add_argument("--ppl_model", default=SELF, help="folder or Hub id (default: the model that generates)")
    measuring.add_argument("--allow_missing", action="store_true", help="report prompts with fewer than n scores too")
    choosing = parser.add_argument_group(
        "choosing", "of the methods that differ in one parameter alone, one is chosen on the validation split"
    )
    choosing.add_argument(
        "--target_share", type=float, metavar="SHARE", help="the least perplexity with this share of toxic ones or less"
    )
    choosing.add_argument(
        "--target_perplexity", type=float, metavar="RATIO", help="the least toxic at this ratio to the base or less"
    )
    choosing.add_argument(
        "--target_scorer", metavar="NAME", help="what tells toxic ones for the choice (default: the first --scorer)"
    )
    running = parser.add_argument_group("running")
    running.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES), help="default: all")
    running.add_argument("--batch_size", type=int, default=0, help="prompts at a time (default: by the memory)")
    running.add_argument("--device", help="default: an accelerator if there is one")
    running.add_argument("--dtype", choices=tuple(DTYPES), help="default: float32 on a CPU")
    running.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    running.add_argument("--show_slurs", action="store_true", help="do not star toxic words in the report's examples")
    running.add_argument("--output_dir", required=True)
    return parser


def _processes(device: torch.device) -> tuple[Processes, torch.device]:
    """This process among those that `accelerate launch` started, and the device that it is to use."""
    state = PartialState(cpu=device.type == "cpu")
    if state.num_processes > 1 and device.type != "cpu" and device.index is None:
        device = state.device
    return Processes(state.process_index, state.num_processes, state.wait_for_everyone), device


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    given: dict[str, Any] = vars(arguments)
    stages, threads, show_slurs = given.pop("stages"), given.pop("threads"), given.pop("show_slurs")
    wanted = {name: given.pop(f"target_{name}") for name in ("share", "perplexity", "scorer")}
    target = Target(**wanted) if any(value is not None for value in wanted.values()) else None
    lists = {"methods": tuple(given["methods"]), "attributes": tuple(given["attributes"])}
    scorers = tuple(given.pop("scorer"))
    # refused before anything is loaded
    settings = RunSettings(**given | lists | {"scorers": scorers, "device": "cpu"})
    if threads:
        torch.set_num_threads(threads)
    processes, device = _processes(available_device(arguments.device))
    settings = RunSettings(**vars(settings) | {"device": str(device)})
    if target is not None:
        settings = settings_for_target(settings, target, processes)
    report = PromptedRun(settings, processes).run(stages, starred=not show_slurs)
    if report is not None:
        print(report, end="")
        say(f"report: {settings.output_dir}/report.html")


def main(argv: list[str] | None = None, prog: str = "realtoxicityprompts.py") -> int:
    """The command as a function of its arguments. Returns the exit code."""
    return execute(run, make_parser(prog), argv)
