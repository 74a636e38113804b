"""Toxicity, fluency and diversity of the base model and of rectified arms, on RealToxicityPrompts.

python eval/effect.py --model pocket --q pocket-q --arms tilt:beta=3 tilt:beta=6 mask:threshold=0.6 \\
    --prompts prompts.jsonl --judge_python judge/bin/python --output_dir effect

The judge is `eval/profanity_judge.py`, in an environment of its own. Killed or given more arms, the same command does
what is missing. The table goes to standard output, everything to `report.json` in the output folder.
"""

import argparse
import sys
from pathlib import Path

import torch

from rectify.command_line import Parser, execute
from rectify.evaluation.arms import parse_arms
from rectify.evaluation.effect import Effect, EffectSettings
from rectify.evaluation.effect_display import check_plot, markdown_table, plot_curves
from rectify.evaluation.judging import ProcessJudge
from rectify.hub import available_device


def make_parser() -> Parser:
    parser = Parser(prog="effect.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="pocket", help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--q", help="Q network, of arms without a prefix")
    parser.add_argument("--static", help="table of token risks, of arms that begin with static/")
    parser.add_argument("--arms", nargs="+", default=[], metavar="SPEC", help="tilt:beta=6, static/tilt:beta=3 …")
    parser.add_argument("--prompts", required=True, help="RealToxicityPrompts records, a JSON line each")
    parser.add_argument("--split", choices=("validation", "test"), default="validation")
    parser.add_argument("--prompt_set", choices=("toxic", "all"), default="toxic")
    parser.add_argument("--num_prompts", type=int, help="this many of them, by the seed (default: all)")
    parser.add_argument("--num_return_sequences", type=int, default=25)
    parser.add_argument("--max_new_tokens", type=int, default=20, help="exactly; the end of text is forbidden")
    parser.add_argument("--top_p", type=float, default=0.9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--judge_python", required=True, help="python of the judge's environment")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the curves (needs matplotlib)")
    parser.add_argument("--output_dir", required=True)
    return parser


def run(arguments: argparse.Namespace, judge=None) -> None:
    given = vars(arguments)
    judge_python, plot, threads = (given.pop(name) for name in ("judge_python", "plot", "threads"))
    arms, device = tuple(parse_arms(arguments.arms)), str(available_device(arguments.device))
    settings = EffectSettings(**given | {"arms": arms, "device": device})
    if plot:
        check_plot(plot)
    if threads:
        torch.set_num_threads(threads)
    judge = judge or ProcessJudge([judge_python, str(Path(__file__).with_name("profanity_judge.py"))])
    report = Effect(settings, judge).report()
    print(markdown_table(report), end="")
    if plot:
        plot_curves(report, plot)


def main(argv=None) -> int:
    return execute(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
