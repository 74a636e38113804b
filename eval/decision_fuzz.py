"""Random decisions, hostile ones among them: is every answer a policy, under its caps, and never unprotected silently?

python eval/decision_fuzz.py --decisions 20000 --seed 0

All rules go through `rectify`, `rectify_support`, `rectify_candidates` and the processor, on scores of scales from 1e-3
to 1e30 with bans of every kind, NaN and infinities, and risks that are no numbers; what is finite is compared with a
float64 reference. Ends with status 1 on a fault.
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

from rectify.command_line import Parser, execute, say
from rectify.evaluation.decision_fuzz import CLOSE, OVER, fuzz


def make_parser() -> Parser:
    parser = Parser(prog="decision_fuzz.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--decisions", type=int, default=20_000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    return parser


def run(arguments: Namespace) -> int:
    found = fuzz(arguments.decisions, arguments.seed)
    for name, count in found.counts.items():
        print(f"{name}: {count:,}")
    print(f"most above a cap: {found.over:.2g} (allowed: {OVER:g})")
    print(f"farthest from the reference: {found.gap:.2g} (allowed: {CLOSE:g})")
    print(f"faults: {len(found.faults)}")
    for fault in found.faults[:20]:
        say(fault)
    return 1 if found.faults else 0


def main(argv: Sequence[str] | None = None) -> int:
    return execute(run, make_parser(), None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
