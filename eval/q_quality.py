"""How good a dead-end Q network is: on rollouts, on labelled texts, and on pairs that differ in their context only.

python eval/q_quality.py --q pocket-q --rollout_texts prompts.jsonl --labelled_texts jigsaw_10k.json --toxic_label 0 \\
    --rtp prompts.jsonl --pairs eval/data/counterfactual_pairs.jsonl --output q_quality.json

Each part is measured where its file is given. The tables go to standard output, everything to the output file.
"""

import argparse
import sys

import torch

from rectify.command_line import Parser, execute
from rectify.evaluation.q_quality import SPLITS, QQuality, QualitySettings, write_report
from rectify.evaluation.q_quality_display import markdown_tables


def make_parser() -> Parser:
    parser = Parser(prog="q_quality.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--q", default="pocket-q", help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--model", default="pocket", help="its language model (default: %(default)s)")
    parser.add_argument("--static", metavar="DIR", help="table of token risks to compare with")
    parser.add_argument("--output", metavar="FILE", help="write everything as JSON")
    parser.add_argument("--batch_size", type=int, default=64, help="texts at a time (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")

    rollouts = parser.add_argument_group("rollouts", "20 tokens after the first 20 of each text")
    rollouts.add_argument("--rollout_texts", nargs="+", default=[], metavar="FILE", help="JSON lines, .csv, or .txt")
    rollouts.add_argument("--rollout_text_column", default="text", metavar="NAME", help="default: %(default)s")
    rollouts.add_argument("--rollout_dir", metavar="DIR", help="keep the rollouts, and go on from those there")
    rollouts.add_argument("--reward_model", default="pocket-reward", help="labels them (default: %(default)s)")
    rollouts.add_argument("--num_rollouts", type=int, default=4000, help="default: %(default)s")
    rollouts.add_argument("--seed", type=int, default=0)

    labels = parser.add_argument_group("labelled texts", "finished texts with people's labels")
    labels.add_argument("--labelled_texts", metavar="FILE", help="JSON lines or .csv")
    labels.add_argument("--text_column", default="text", metavar="NAME", help="default: %(default)s")
    labels.add_argument("--label_column", default="label", metavar="NAME", help="default: %(default)s")
    labels.add_argument("--toxic_label", type=int, choices=(0, 1), default=1, help="default: %(default)s")
    labels.add_argument("--hash_split", choices=SPLITS, default="test", help="by the text's SHA-256")

    records = parser.add_argument_group("RealToxicityPrompts", "prompt and continuation, with Perspective's scores")
    records.add_argument("--rtp", metavar="FILE", help="the records, a JSON line each")
    records.add_argument("--split", choices=SPLITS, default="test")

    pairs = parser.add_argument_group("counterfactual pairs", "the same word after a harmless and a toxic prefix")
    pairs.add_argument("--pairs", metavar="FILE", help="eval/data/counterfactual_pairs.jsonl")
    return parser


def run(arguments: argparse.Namespace) -> None:
    given = vars(arguments)
    output, threads = given.pop("output"), given.pop("threads")
    settings = QualitySettings(**given | {"rollout_texts": tuple(arguments.rollout_texts)})
    if threads:
        torch.set_num_threads(threads)
    report = QQuality(settings).report()
    print(markdown_tables(report), end="", flush=True)
    if output:
        write_report(report, output)


def main(argv=None) -> int:
    return execute(run, make_parser(), argv, extras=["train"])


if __name__ == "__main__":
    sys.exit(main())
