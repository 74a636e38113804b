"""Preferences between dialogues as records of questions and answers, for training and for test, split by prompt.

python eval/preference_pairs.py hh-rlhf-test.jsonl.gz --output_dir pairs
rectify train moderation --model_name_or_path MODEL --train_files pairs/train.jsonl --output_dir moderation
python eval/moderation.py --moderations pairs=moderation --records pairs/test.jsonl --output_dir run
"""

import argparse
import sys
from pathlib import Path

from rectify.command_line import Parser, execute, say
from rectify.evaluation.preference_pairs import preference_records
from rectify.json_files import write_records
from rectify.splits import split_by_hash
from rectify.training.moderation import prompt_key


def make_parser() -> Parser:
    parser = Parser(prog="preference_pairs.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON lines with chosen and rejected, also as .gz")
    parser.add_argument("--test_share", type=float, default=0.3, help="of the prompts, by hash (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True, help="gets train.jsonl and test.jsonl")
    return parser


def run(arguments: argparse.Namespace) -> None:
    records = list(preference_records(arguments.file))
    # by another hash than that which splits off validation pairs
    parts = split_by_hash(
        records, arguments.test_share, lambda record: f"test {prompt_key((record['prompt'], record['response']))}"
    )
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    for name, part in zip(("train", "test"), parts, strict=True):
        write_records((arguments.output_dir / f"{name}.jsonl", part))
        say(f"{name}: {len(part)} pairs, {len({record['prompt'] for record in part})} prompts")


def main(argv=None) -> int:
    return execute(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
