"""The command `rectify build cmd`."""

from __future__ import annotations

import argparse
from dataclasses import fields
from functools import cache
from typing import Any

from rich.console import Console
from rich.table import Table

from rectify.builders.cmd import STAGES, CmdBuild, CmdTools, StageCounts, contrast
from rectify.builders.cmd_settings import CmdSettings
from rectify.builders.selection import sample_items
from rectify.command_line import say
from rectify.errors import InvalidArgumentError
from rectify.hub import DTYPES, available_device
from rectify.rephrasing.load import FILLERS, check_filler, load_filler
from rectify.text_files import TEXT_COLUMN, read_texts

_SETTINGS = CmdSettings()
_JUDGES_ONLY = ("pocket", "pocket:pocket-scorer")


def add_parser(kinds: Any) -> None:
    """Add the kind `cmd` to the kinds of data of `rectify build`."""
    parser = kinds.add_parser(
        "cmd",
        description="Make the data by which a model learns to detoxify itself: prompts are masked, rephrased and "
        f"continued, in the stages {', '.join(STAGES)}.",
        allow_abbrev=False,
        epilog="Train on OUTPUT_DIR with `rectify train cmd`.",
    )

    def setting(group: argparse._ArgumentGroup, name: str, text: str) -> None:
        default = getattr(_SETTINGS, name)
        group.add_argument(f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})")

    data = parser.add_argument_group("data")
    data.add_argument("--texts", nargs="+", metavar="FILE", help="prompts: JSON lines, .csv, .tsv or .txt")
    data.add_argument(
        "--text_column",
        nargs="+",
        default=[TEXT_COLUMN],
        metavar="NAME",
        help=f"once or a file (default: {TEXT_COLUMN})",
    )
    data.add_argument("--num_texts", type=int, metavar="N", help="a random sample of the texts (default: all)")
    data.add_argument("--output_dir", metavar="DIR", required=True, help="gets a file for each stage")
    data.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE", help="default: all")
    setting(data, "validation_share", "share of the prompts for validation")
    setting(data, "batch_size", "prompts at a time")
    setting(data, "seed", "of everything random")

    judging = parser.add_argument_group("toxicity")
    judging.add_argument("--scorer", help="what judges all texts, as in `rectify score`")
    judging.add_argument("--span_detector", metavar="FOLDER", help="of `rectify train spans`, or a Hub id")

    filling = parser.add_argument_group("rephrasing")
    filling.add_argument("--filler", default="causal:pocket", help=f"{'; '.join(FILLERS)} (default: %(default)s)")
    filling.add_argument(
        "--fill_method",
        metavar="NAME[:PATH][,key=value…]",
        default="rectify:pocket-q",
        help="of a causal filler (default: %(default)s)",
    )
    filling.add_argument(
        "--reward_model", metavar="FOLDER", default="pocket-reward", help="of a causal filler (default: %(default)s)"
    )
    setting(filling, "attempts", "fillings that are tried until one is safe")
    filling.add_argument("--similarity_model", metavar="ID", help="a sentence encoder (default: no gate)")
    setting(filling, "min_similarity", "with a similarity_model: least cosine of prompt and rephrased text")

    continuing = parser.add_argument_group("continuations of the safe prompts")
    continuing.add_argument("--model", help="the model that is to learn: folder, Hub id, or pocket")
    setting(continuing, "n", "a prompt")
    setting(continuing, "max_new_tokens", "of a continuation")
    setting(continuing, "min_new_tokens", "of a continuation")
    setting(continuing, "temperature", "of sampling")
    setting(continuing, "top_p", "of sampling")
    setting(continuing, "top_k", "of sampling, 0 for all tokens")
    setting(continuing, "positive", "greatest toxicity of the continuation to seek")
    setting(continuing, "negative", "continuations above this toxicity are shunned")

    running = parser.add_argument_group("running")
    running.add_argument("--device", help="default: an accelerator if there is one")
    running.add_argument("--dtype", choices=("auto", *DTYPES), default="auto", help="auto: float32 on a CPU")


def run(arguments: argparse.Namespace) -> None:
    """Run the command.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    given = vars(arguments)
    settings = CmdSettings(**{field.name: given[field.name] for field in fields(CmdSettings)})
    stages = set(arguments.stages)
    needs = {
        "texts": {"prompts"},
        "scorer": {"prompts", "mask", "rephrase", "score"},
        "span_detector": {"spans", "mask"},
        "model": {"continue"},
    }
    for name, users in needs.items():
        if given[name] is None and (wanting := users & stages):
            stage = next(stage for stage in STAGES if stage in wanting)
            raise InvalidArgumentError(f"{name} is not given, and the stage {stage} needs it: name it")
    if arguments.min_similarity != _SETTINGS.min_similarity and arguments.similarity_model is None:
        raise InvalidArgumentError("min_similarity is given without similarity_model: name a sentence encoder")
    check_filler(arguments.filler, arguments.fill_method)
    texts = None
    if "prompts" in stages:
        read = read_texts(arguments.texts, arguments.text_column)
        texts = sample_items([text for text in read if text.strip()], arguments.num_texts, settings.seed)
    if arguments.scorer in _JUDGES_ONLY:
        say("scorer: the bundled pocket scorer is to judge only; what is built with it cannot be judged by it")
    build = CmdBuild(arguments.output_dir, _tools(arguments, settings), settings, texts)
    counts = build.run([stage for stage in STAGES if stage in stages])
    Console().print(stage_table(counts))
    if "examples" in stages:
        for name, (able, count) in contrast(build.folder).items():
            say(f"{name} prompts for training: {count}, {able} of them with continuations to shun")


def stage_table(counts: list[StageCounts]) -> Table:
    """What each stage was given and handed on."""
    table = Table(box=None, pad_edge=False)
    for name, justify in (("stage", "left"), ("in", "right"), ("out", "right"), ("dropped", "left")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    for one in counts:
        dropped = ", ".join(f"{count} {reason}" for reason, count in sorted(one.dropped.items()))
        table.add_row(one.stage, str(one.read), str(one.kept), dropped or "–")
    return table


def _tools(arguments: argparse.Namespace, settings: CmdSettings) -> CmdTools:
    device, dtype = available_device(arguments.device), DTYPES.get(arguments.dtype)

    # each is imported and loaded by the stage that needs it
    @cache
    def scorer() -> Any:
        from rectify.scoring.cascade import load_part

        return load_part(arguments.scorer, arguments.device)

    @cache
    def find() -> Any:
        from rectify.detectors.spans import SpanDetector

        return SpanDetector.from_pretrained(arguments.span_detector, device=device).find

    def filler() -> Any:
        return load_filler(
            arguments.filler,
            method=arguments.fill_method,
            reward_model=arguments.reward_model,
            device=device,
            dtype=dtype,
            seed=settings.seed,
        )

    def generator() -> Any:
        from rectify.generation.generator import Generator
        from rectify.hub import load_language_model

        model, tokenizer = load_language_model(arguments.model, dtype, device)
        return Generator(
            model,
            tokenizer,
            settings.sampling,
            settings.max_new_tokens,
            settings.min_new_tokens,
            settings.n,
            settings.seed,
        )

    def similarity() -> Any:
        from rectify.sentence_encoder import SentenceEncoder

        return SentenceEncoder.from_pretrained(arguments.similarity_model, device=device).similarity

    names = {"find": arguments.span_detector, "filler": arguments.filler, "model": arguments.model}
    gate = arguments.similarity_model
    return CmdTools(
        scorer,
        find,
        filler,
        generator,
        similarity if gate else None,
        names | {"similarity": arguments.similarity_model},
    )
