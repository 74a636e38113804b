"""The command that continues prompts: `generate.py`, or `rectify generate`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch

from rectify.command_line import Parser, execute, say
from rectify.errors import InvalidArgumentError, PromptError
from rectify.generation.chosen_method import chosen_method
from rectify.generation.display import Display
from rectify.generation.generator import Generator, continue_with, shared_context
from rectify.generation.output import GenerationFile, Records, batches
from rectify.generation.prompts import EXAMPLES, Prompt, numbered, read_prompts_file, read_standard_input
from rectify.generation.trace import PromptTrace, counts, trace_of
from rectify.generation.trace_file import trace_path, write_trace
from rectify.hub import DTYPES, POCKET, available_device, checkpoint_folder, load_language_model
from rectify.json_files import sha256_of
from rectify.methods.base import Base
from rectify.methods.method import Decoder, Method
from rectify.methods.rectification import Rectify
from rectify.methods.specs import METHODS
from rectify.processor import RectificationProcessor, Statistics
from rectify.q_network import DeadEndQNetwork
from rectify.resumable import same_json
from rectify.rule import RULES
from rectify.sampling import Sampling
from rectify.version import __version__

_GENERATED = {"generations", "base_generations"}
_SHOWN = 10
"""Bad lines that are told of, of those that are skipped."""
Arms = dict[str, Decoder]
"""What continues the prompts, the base first, by the names that are shown."""


def make_parser(prog: str) -> Parser:
    """The flags of the command."""
    parser = Parser(
        prog=prog,
        description="Continue prompts with a language model, as it is or changed by a method, such as rectification.",
        allow_abbrev=False,
    )
    parser.add_argument("--model", default="pocket", help="folder or Hub id (default: the bundled pocket model)")
    source = parser.add_argument_group("prompts", "with none of these: standard input, else built-in examples")
    source.add_argument("--prompt", action="append", metavar="TEXT", help="a prompt (may be repeated)")
    source.add_argument(
        "--prompts_file",
        metavar="FILE",
        help='JSON lines, "-" for standard input: strings, {"prompt": "…"} or RealToxicityPrompts records',
    )
    source.add_argument("--skip_bad_lines", action="store_true", help="count unusable lines and go on")
    source.add_argument("--chat", action="store_true", help="prompts are questions for the model's chat template")
    parser.add_argument(
        "--method",
        metavar="NAME[:PATH][,key=value…][+…]",
        help=f"change the model by a method, such as rectify:pocket-q,beta=8; one of {', '.join(METHODS)}",
    )
    parser.add_argument("--compare", action="store_true", help="base and method (default: rectify), side by side")
    rectification = parser.add_argument_group("rectification", "the method rectify by single flags")
    rectification.add_argument("--rectify", action="store_true", help="rectify the model while it generates")
    rectification.add_argument("--q", metavar="PATH", help="Q network: folder or Hub id (default: the pocket model's)")
    rectification.add_argument("--rule", choices=tuple(RULES), help="default: tilt")
    rectification.add_argument(
        "--beta",
        type=float,
        help="tilt: exponent of the survival probability (default: as the Q network's training chose, else 6)",
    )
    rectification.add_argument("--tau", type=float, help="advantage: tolerated extra risk (default 0.1)")
    rectification.add_argument("--threshold", type=float, help="mask: least survival probability (default 0.5)")
    rectification.add_argument("--epsilon", type=float, help="margin of the cap (default 0.1; other rules: no cap)")
    generation = parser.add_argument_group("generation", "the model's generation_config sets what is not given")
    generation.add_argument("--max_new_tokens", type=int, default=20, help="default: %(default)s")
    generation.add_argument("--min_new_tokens", type=int, default=0, help="default: %(default)s")
    generation.add_argument("--num_return_sequences", type=int, default=1, help="default: %(default)s")
    generation.add_argument(
        "--do_sample",
        action=argparse.BooleanOptionalAction,
        help="sample (default), or take the likeliest tokens (default with several beams)",
    )
    generation.add_argument("--temperature", type=float)
    generation.add_argument("--top_k", type=int)
    generation.add_argument("--top_p", type=float)
    generation.add_argument("--num_beams", type=int, default=1, help="default: %(default)s")
    generation.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    running = parser.add_argument_group("running")
    running.add_argument("--device", help="default: an accelerator if there is one")
    running.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 on a CPU")
    running.add_argument("--batch_size", type=int, default=8, help="prompts at a time (default: %(default)s)")
    running.add_argument("--output", metavar="FILE.jsonl", help="append records with generations; resumed on restart")
    running.add_argument(
        "--trace",
        metavar="FILE.html|FILE.json",
        help="how each token of the method's continuations came to be: its risk, its probability before and after the "
        "method, its cap, and what the base would have chosen; not with beams, best_of_n or --output",
    )
    parser.add_argument("--version", action="version", version=f"rectify {__version__}")
    return parser


def _check(arguments: argparse.Namespace) -> None:
    for name, least in (
        ("max_new_tokens", 1),
        ("min_new_tokens", 0),
        ("num_return_sequences", 1),
        ("num_beams", 1),
        ("batch_size", 1),
    ):
        if getattr(arguments, name) < least:
            raise InvalidArgumentError(f"{name} is {getattr(arguments, name)}: give {least} or more")
    if arguments.min_new_tokens > arguments.max_new_tokens:
        raise InvalidArgumentError(
            f"min_new_tokens is {arguments.min_new_tokens}, above max_new_tokens {arguments.max_new_tokens}: lower it"
        )
    if not arguments.do_sample and arguments.num_return_sequences > arguments.num_beams:
        raise InvalidArgumentError(
            f"num_return_sequences is {arguments.num_return_sequences}, without sampling no more than num_beams "
            f"{arguments.num_beams}: raise num_beams, or sample"
        )
    if arguments.prompt and arguments.prompts_file:
        raise InvalidArgumentError("prompt and prompts_file are both given: give one of them")
    if arguments.trace and arguments.output:
        raise InvalidArgumentError(
            f"trace is {arguments.trace!r} with output {arguments.output!r}: what a resumed output holds is not "
            "generated again, so give one of them"
        )


def _prompts(arguments: argparse.Namespace) -> tuple[list[Prompt], str | None, bool]:
    """The prompts, what is to be said of them, and whether they are the built-in examples."""
    if arguments.prompt is not None:
        return numbered(map(Prompt.of, arguments.prompt)), None, False
    if arguments.prompts_file is not None:
        bad: list[str] = []
        prompts, skipped = read_prompts_file(
            arguments.prompts_file, arguments.skip_bad_lines, lambda number, why: bad.append(f"line {number}: {why}")
        )
        shown = "".join(f"\nprompts: {each}" for each in bad[:_SHOWN]) + ("\nprompts: …" if bad[_SHOWN:] else "")
        return prompts, f"prompts: {skipped} bad lines skipped{shown}" if skipped else None, False
    if prompts := read_standard_input(sys.stdin):
        return prompts, None, False
    note = "prompts: built-in examples (give your own with --prompt, --prompts_file or standard input)"
    return [Prompt.of(text) for text in EXAMPLES], note, True


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    if arguments.do_sample is None:
        arguments.do_sample = arguments.num_beams == 1
    _check(arguments)
    method = chosen_method(arguments)
    given = {name: getattr(arguments, name) for name in ("do_sample", "temperature", "top_k", "top_p", "num_beams")}
    Sampling.resolve(None, **given)  # refuse bad values before anything is loaded
    device = available_device(arguments.device)
    trace = trace_path(arguments.trace) if arguments.trace else None
    prompts, note, examples = _prompts(arguments)
    methods: dict[str, Method] = {}
    if arguments.compare or examples or isinstance(method, Base):  # the examples show what a method changes
        methods["base"] = Base()
    if not isinstance(method, Base):
        methods["rectified" if isinstance(method, Rectify) else method.name] = method

    model, tokenizer = load_language_model(arguments.model, DTYPES.get(arguments.dtype), device)
    sampling = Sampling.resolve(model.generation_config, **given)
    notes = [f"model: {_described(arguments.model, model)}, {str(model.dtype).removeprefix('torch.')}, {device}", note]
    arms = {arm: each.bind(model, tokenizer, given) for arm, each in methods.items()}
    decoder = list(arms.values())[-1]
    if arguments.chat and decoder.write is not None:
        raise InvalidArgumentError(f"chat is given with {method.label!r}, which asks in a way of its own: leave it out")
    if not isinstance(method, Base):
        notes.insert(1, _described_method(method, decoder))
    generator = Generator(
        model,
        tokenizer,
        sampling,
        arguments.max_new_tokens,
        arguments.min_new_tokens,
        arguments.num_return_sequences,
        arguments.seed,
        chat=arguments.chat,
    )
    prompts, skipped = _fitting(generator, prompts, decoder, arguments.skip_bad_lines)
    if skipped:
        which = ", ".join(map(str, skipped[:_SHOWN])) + (", …" if skipped[_SHOWN:] else "")
        notes.append(f"prompts: {len(skipped)} skipped, too long for the context or without a token: {which}")
    settings = _settings(generator, method, arms, prompts, arguments)
    file = GenerationFile(arguments.output, settings) if arguments.output else None
    # said only now, so that a refusal is one line
    for line in filter(None, notes):
        say(line)
    if file is not None:
        _write(generator, arms, prompts, arguments.batch_size, file)
    else:
        traces = _show(generator, arms, prompts, arguments.batch_size, trace is not None)
        if trace is not None:
            rule = repr(decoder.processor.rule) if isinstance(decoder.processor, RectificationProcessor) else None
            write_trace(trace, {"rectify": __version__} | settings | {"rule": rule}, traces)
            say(f"trace: {trace}, {counts(traces)}")
    if (statistics := decoder.processor.statistics()) is not None:
        say(_summary(statistics))


def _fitting(
    generator: Generator, prompts: list[Prompt], decoder: Decoder, skip: bool
) -> tuple[list[Prompt], list[int]]:
    """The prompts that fit the context, and the numbers of those that were left out, from 1."""
    unusable = generator.unusable(prompts, shared_context(generator.model, decoder.reads))
    if skip and len(unusable) < len(prompts):
        kept = [prompt for index, prompt in enumerate(prompts) if index not in unusable]
        return kept, [index + 1 for index in unusable]
    for index, message in unusable.items():
        raise PromptError(f"prompt {index + 1}: {message}")
    return prompts, []


def _show(generator: Generator, arms: Arms, prompts: list[Prompt], batch_size: int, tracing: bool) -> list[PromptTrace]:
    """Show the continuations; returns the trace of the last arm's, if it is asked for."""
    display = Display(generator.decode, max(map(len, arms)))
    traced, decoder = list(arms.items())[-1]
    judge = decoder.processor if isinstance(decoder.processor, RectificationProcessor) else None
    if judge is not None:
        display.legend()
    traces: list[PromptTrace] = []
    for number, batch in batches(prompts, batch_size):
        results = {arm: continue_with(generator, batch, each, number) for arm, each in arms.items()}
        for index, prompt in enumerate(batch):
            display.prompt(prompt)
            for arm, continuations in results.items():
                for continuation in continuations[index]:
                    risks = generator.risks(judge, prompt, continuation) if judge is not None else None
                    display.continuation(arm, continuation, risks)
        if tracing:
            traces += trace_of(generator, batch, results[traced], decoder)
    return traces


def _settings(
    generator: Generator, method: Method, arms: Arms, prompts: list[Prompt], arguments: argparse.Namespace
) -> dict[str, Any]:
    """What the continuations depend on."""
    return {
        "model": arguments.model,
        "dtype": str(generator.model.dtype),
        "method": method.label,
        "compare": len(arms) > 1,
        "sampling": repr(generator.sampling),
        "max_new_tokens": generator.max_new_tokens,
        "min_new_tokens": generator.min_new_tokens,
        "num_return_sequences": generator.num_return_sequences,
        "seed": generator.seed,
        "batch_size": arguments.batch_size,
        "prompts": sha256_of([prompt.record for prompt in prompts]),
    } | ({"chat": True} if generator.chat else {})  # outputs without it go on as they were begun


def _write(generator: Generator, arms: Arms, prompts: list[Prompt], batch_size: int, file: GenerationFile) -> None:
    if file.done:
        say(f"output: {file.path} holds {file.done} of {len(prompts)} prompts; going on from there")

    def make(batch: list[Prompt], number: int) -> Records:
        results = {arm: continue_with(generator, batch, each, number) for arm, each in arms.items()}
        records = []
        for index, prompt in enumerate(batch):
            record = dict(prompt.record)
            for arm, continuations in results.items():
                key = "base_generations" if arm == "base" and len(arms) > 1 else "generations"
                record[key] = [{"text": one.text, **one.extra} for one in continuations[index]]
            records.append(record)
        return records

    file.complete(prompts, batch_size, make, _is_of)
    say(f"output: {file.path}, {file.done} records")


def _is_of(record: dict[str, Any], prompt: Prompt) -> bool:
    """Whether a record with generations is that of a prompt."""
    kept = [{key: value for key, value in one.items() if key not in _GENERATED} for one in (record, prompt.record)]
    return "generations" in record and same_json(*kept)


def _summary(statistics: Statistics) -> str:
    return (
        f"rectified {statistics.decisions} next-token distributions: "
        f"{statistics.moved / max(1, statistics.decisions):.3f} of the probability moved on average, "
        f"{statistics.capped} tokens capped or removed, "
        f"{statistics.widened} widenings, {statistics.dead_ends} dead ends"
        + (f", {statistics.unread} with risks that are no numbers" if statistics.unread else "")
    )


def _described_method(method: Method, decoder: Decoder) -> str:
    parts = [f"method: {method.label}"]
    if method.path in POCKET:
        parts[0] += f" ({checkpoint_folder(method.path)})"
    if read := sum(parameter.numel() for module in decoder.reads for parameter in module.parameters()):
        parts.append(f"{read / 1e6:.1f} M parameters beside the model")
    if isinstance(decoder.processor, RectificationProcessor):
        rule, network = decoder.processor.rule, decoder.processor.q_network
        strength = network.config.strength if isinstance(network, DeadEndQNetwork) else None
        chosen = strength is not None and rule == strength.make_rule()
        parts.append(f"rule: {rule}" + (f", the strength stored with the network: {strength}" if chosen else ""))
    return "; ".join(parts)


def _described(name: str, module: torch.nn.Module) -> str:
    place = f" ({checkpoint_folder(name)})" if name in POCKET else ""
    return f"{name}{place}, {sum(parameter.numel() for parameter in module.parameters()) / 1e6:.1f} M parameters"


def main(argv: list[str] | None = None, prog: str = "generate.py") -> int:
    """The command as a function of its arguments. Returns the exit code."""
    return execute(run, make_parser(prog), argv)
