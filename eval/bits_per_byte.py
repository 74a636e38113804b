"""Bits per byte and nats per token of a causal language model on texts, and samples of what it writes.

python eval/bits_per_byte.py --model pocket --texts test.txt held_out.jsonl --samples prompts.txt

A .txt file is one document; JSON lines and .csv hold one a row. A document's first token is predicted after the
tokenizer's begin token (else its end token), so that every byte is paid for. Samples are not chosen: one is drawn for
each line, at temperature 1 and top-p 0.9.
"""

import argparse
import sys

import torch

from rectify.command_line import Parser, execute
from rectify.errors import InvalidArgumentError
from rectify.evaluation.language_model import (
    CodeLength,
    begin_token,
    code_length,
    model_context,
    read_documents,
    read_lines,
    sample,
)
from rectify.hub import load_language_model


def make_parser() -> Parser:
    parser = Parser(prog="bits_per_byte.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--model", default="pocket", help="folder or Hub id (default: %(default)s)")
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE", help=".txt, JSON lines, or .csv")
    parser.add_argument("--text_column", default="text", metavar="NAME", help="default: %(default)s")
    parser.add_argument("--context", type=int, help="tokens of a window (default: the model's own context)")
    parser.add_argument("--batch_size", type=int, default=8, help="windows at a time (default: %(default)s)")
    parser.add_argument("--samples", metavar="FILE", help="prompts, one a line; each is continued once")
    parser.add_argument("--max_new_tokens", type=int, default=40, help="of a sample (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    return parser


def line(name: str, found: CodeLength) -> str:
    figures = f"{found.bits_per_byte:13.4f}  {found.nats_per_token:14.4f}"
    return f"{figures}  {found.tokens:9}  {found.bytes:10}  {found.documents:9}  {name}"


def run(arguments: argparse.Namespace) -> None:
    if not arguments.texts and arguments.samples is None:
        raise InvalidArgumentError("texts and samples are not given: give one of them, or both")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    documents = {path: read_documents(path, arguments.text_column) for path in arguments.texts}
    prompts = read_lines(arguments.samples) if arguments.samples is not None else []
    model, tokenizer = load_language_model(arguments.model, device=arguments.device)
    if documents:
        context = model_context(model, arguments.context)
        begin = tokenizer.convert_ids_to_tokens(begin_token(tokenizer))
        print(f"{arguments.model}: windows of {context} tokens, stride {context // 2}, each document after {begin}")
        print("bits per byte  nats per token     tokens       bytes  documents")
    every = CodeLength(0.0, 0, 0, 0)
    for path, texts in documents.items():
        found = code_length(model, tokenizer, texts, context, arguments.batch_size)
        every += found
        print(line(path, found), flush=True)
    if len(documents) > 1:
        print(line("all", every))
    for prompt, continuation in zip(
        prompts, sample(model, tokenizer, prompts, arguments.seed, arguments.max_new_tokens), strict=True
    ):
        print(f"\n> {prompt.text}\n{continuation.text}", flush=True)


def main(argv=None) -> int:
    return execute(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
