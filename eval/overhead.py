"""The cost of rectification over the base model: time, peak memory, which part costs what, and the same choices.

python eval/overhead.py --output overhead.json --plot overhead.png
python eval/overhead.py --device cuda --model_shape llama-1b --arms external shared --output overhead.json

All networks have random weights. The arms take turns within each repetition, and the figures are ratios of times in the
same repetition. The published algorithm encodes whole texts at every step and is measured where `--published_batches`
and `--published_lengths` say. The tables go to standard output, everything to the output file, which is written anew
after each measurement.
"""

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from rectify.command_line import Parser, execute, say
from rectify.errors import InvalidArgumentError
from rectify.evaluation.overhead import (
    ARMS,
    MODEL_SHAPES,
    Bench,
    Shape,
    cells,
    environment,
    time_arms,
)
from rectify.evaluation.overhead_display import (
    agreement_table,
    growth_lines,
    interval_lines,
    markdown_table,
    plot_ratios,
    profile_table,
    weight_lines,
)
from rectify.evaluation.overhead_memory import peak_memory
from rectify.evaluation.overhead_profile import agreement, profile
from rectify.evaluation.plotting import check_plot
from rectify.hub import DTYPES, available_device
from rectify.json_files import write_json

PARTS = ("time", "memory", "profile", "agreement")


def make_parser() -> Parser:
    parser = Parser(prog="overhead.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="beside base (default: all)")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 128, 512], help="new tokens")
    parser.add_argument("--published_batches", type=int, nargs="*", default=[1], help="of the batches (default: 1)")
    parser.add_argument("--published_lengths", type=int, nargs="*", default=[20, 256], help="default: 20 256")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--published_repetitions", type=int, default=3, help="at most (default: %(default)s)")
    parser.add_argument("--model_shape", choices=MODEL_SHAPES, default="gpt2")
    parser.add_argument("--q_layers", type=int, default=4, help="of the external and the published Q network's trunk")
    parser.add_argument("--q_width", type=int, default=256)
    parser.add_argument("--q_rank", type=int, default=64, help="of the external and the shared head")
    parser.add_argument("--shared_mlp_size", type=int, default=0, help="of the shared head (default: no MLP)")
    parser.add_argument("--rule", default="tilt", metavar="SPEC", help="tilt; tilt,beta=3,epsilon=0.1; cap …")
    parser.add_argument("--top_k", type=int, help="in all arms (default: none)")
    parser.add_argument("--top_p", type=float, help="in all arms (default: none)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--q_dtype", choices=DTYPES, help="of Q networks and heads (default: that of the model)")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--profile_tokens", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the ratios (needs matplotlib)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")
    return parser


def make_shape(arguments: argparse.Namespace) -> Shape:
    given = vars(arguments)
    device = str(available_device(arguments.device))
    dtype = arguments.dtype or ("float32" if device == "cpu" else "bfloat16")
    chosen = {field.name: given[field.name] for field in fields(Shape)}
    return Shape(**chosen | {"device": device, "dtype": dtype, "q_dtype": arguments.q_dtype or dtype})


def measurements(bench: Bench, part: str, arguments: argparse.Namespace) -> Iterator[list[dict[str, Any]]]:
    """The rows of a part of the report, as they are measured."""
    arms = [arm for arm in ARMS if arm == "base" or arm in arguments.arms]
    ours = [arm for arm in arms if arm in ("external", "shared")]
    grid = arguments.batches, arguments.lengths, arguments.published_batches, arguments.published_lengths
    if part == "time":
        for batch, length, some in cells(arms, *grid):
            repetitions = arguments.repetitions, arguments.published_repetitions
            yield [asdict(row) for row in time_arms(bench, some, batch, length, *repetitions)]
    elif part == "memory":
        for batch, length, some in cells(arms, *grid):
            yield peak_memory(bench.shape, some, batch, length)
    elif part == "profile":
        for batch in arguments.batches if ours else []:
            yield list(profile(bench, ours, batch, arguments.profile_tokens, arguments.repetitions))
    else:
        for arm in ours:
            yield [agreement(bench, arm)]


def show(row: dict[str, Any]) -> str:
    """A row of the report in a line, without what is long."""
    plain = {key: value for key, value in row.items() if not isinstance(value, list | dict)}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in plain.items()
    )


def run(arguments: argparse.Namespace) -> None:
    for name in ("batches", "lengths", "published_batches", "published_lengths"):
        if min(getattr(arguments, name), default=1) < 1:
            raise InvalidArgumentError(f"{name} hold {min(getattr(arguments, name))}: give 1 or more")
    for name, least in (("repetitions", 1), ("published_repetitions", 1), ("profile_tokens", 3)):
        if getattr(arguments, name) < least:
            raise InvalidArgumentError(f"{name} is {getattr(arguments, name)}: give {least} or more")
    shape = make_shape(arguments)
    if arguments.plot:
        check_plot(arguments.plot)
    bench = Bench(shape)
    report: dict[str, Any] = {"environment": environment(bench) | {"repetitions": arguments.repetitions}}
    report["environment"]["load_average"] = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    report |= {part: [] for part in PARTS}
    for part in arguments.parts:
        for rows in measurements(bench, part, arguments):
            report[part] += rows
            for row in rows:
                say(f"{part}: {show(row)}")
            if arguments.output:
                write_json(arguments.output, report)
    print_tables(report)
    if arguments.plot:
        plot_ratios(report, arguments.plot)


def print_tables(report: dict[str, Any]) -> None:
    """Markdown, of the parts that were measured."""
    if report["time"] or report["memory"]:
        print(markdown_table(report))
    for line in [*interval_lines(report), *growth_lines(report), *weight_lines(report)]:
        print(line)
    if report["profile"]:
        print(f"\n{profile_table(report)}")
    if report["agreement"]:
        print(f"\n{agreement_table(report)}", end="")


def main(argv=None) -> int:
    return execute(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
