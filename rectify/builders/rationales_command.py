"""The command `rectify build rationales`."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from rectify.builders.rationales import WORDINGS, write_rationales
from rectify.builders.selection import sample_items
from rectify.chat import CHATS, CachedChat, ReplyCache, make_chat
from rectify.command_line import EXIT_CODES, UNFINISHED, say
from rectify.detectors.templates import TEMPLATES
from rectify.json_files import write_records
from rectify.scoring.scores import Reason
from rectify.text_files import TEXT_COLUMN, one_a_file
from rectify.training.instruction_rows import read_instruction_rows


def add_parser(kinds: Any) -> None:
    """Add the flags of this kind of data."""
    parser = kinds.add_parser(
        "rationales",
        description="Have a teacher, who is told the label, write why each labelled text has it; rationales that argue "
        "against their label are dropped and counted. Killed, the same command goes on: replies are kept.",
        epilog=f"teachers: {'; '.join(f'{form}: {what}' for form, what in CHATS.items())}. {EXIT_CODES}",
        allow_abbrev=False,
    )
    parser.add_argument("--texts", nargs="+", metavar="FILE", required=True, help="tables or Alpaca records")
    parser.add_argument("--text_column", nargs="+", default=[TEXT_COLUMN], metavar="NAME", help="once or for each file")
    parser.add_argument("--label_column", nargs="+", default=["label"], metavar="NAME", help="once or for each file")
    parser.add_argument("--label_classes", default="", metavar="VALUE=LABEL,…", help="what labels mean")
    parser.add_argument("--template", default="toxic", choices=tuple(TEMPLATES), help="default: %(default)s")
    parser.add_argument("--teacher", metavar="SPEC", required=True, help="chat model, see below")
    parser.add_argument("--num_texts", type=int, metavar="N", help="a random sample of the texts (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample and of the teacher (default: %(default)s)")
    parser.add_argument("--tries", type=int, default=2, help="rationales asked for a text at most (default: 2)")
    parser.add_argument(
        "--check",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask the teacher what each rationale argues for, without text and label (default: yes)",
    )
    parser.add_argument("--output", metavar="FILE.jsonl", required=True, help="gets the rationales")
    parser.add_argument("--cache", metavar="FILE", help="replies that are not asked for again (default: beside output)")


def run(arguments: argparse.Namespace) -> int:
    """Run the command. Returns the exit code.

    Raises:
        RectifyError: something that was given cannot be used.
    """
    template = TEMPLATES[arguments.template]
    files, output = arguments.texts, Path(arguments.output)
    texts = one_a_file("text_column", arguments.text_column, len(files))
    labels = one_a_file("label_column", arguments.label_column, len(files))
    found = read_instruction_rows(files, template, texts, labels, arguments.label_classes)
    say(f"texts: {found}")
    rows = sample_items([(row.text, row.label) for row in found.rows], arguments.num_texts, arguments.seed)
    with ExitStack() as stack:
        cache = stack.enter_context(ReplyCache(arguments.cache or f"{output}.replies.sqlite"))
        chat = CachedChat(make_chat(arguments.teacher), cache)
        stack.callback(chat.close)
        say(f"teacher: {chat.name}")
        written = write_rationales(
            rows,
            chat,
            template,
            WORDINGS[arguments.template],
            seed=arguments.seed,
            tries=arguments.tries,
            check=arguments.check,
        )
        if chat.reused:
            say(f"cache: {chat.reused} replies were known")
    write_records((output, written.kept), (output.with_name(f"{output.name}.dropped"), written.dropped))
    say(f"rationales: {written}")
    if written.failures:
        say("those without a reply may get one another time: run the same command again")
    say(f"output: {output}; what was dropped: {output}.dropped")
    return UNFINISHED if any(Reason(reason).passing for reason in written.failures) else 0
