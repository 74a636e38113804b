"""How well toxic sentences are rewritten, by masking what is toxic and filling the masks, beside people's rewrites.

python eval/rewrite.py --sentences paradetox.tsv --num_sentences 500 --span_detector my-spans \\
    --scorer detector:my-scorer --encoder sentence-transformers/all-MiniLM-L6-v2 --output rewrite.json

Three systems on the same sentences: the sentence copied, what is masked deleted, and what is masked filled. The judge
counts those that are safe; chrF and cosine are to the nearest human rewrite. The table goes to standard output.
"""

import argparse
import sys
from pathlib import Path

from rectify.builders.cmd_stages import score_with
from rectify.builders.selection import sample_items
from rectify.command_line import Parser, execute, say
from rectify.detectors.spans import SpanDetector
from rectify.evaluation.rewriting import as_json, measure_rewrites, rewrite, table
from rectify.hub import available_device, load_language_model
from rectify.json_files import write_json
from rectify.rephrasing.load import FILLERS, load_filler
from rectify.rephrasing.sentences import read_sentences
from rectify.scoring.load import load_scorer
from rectify.sentence_encoder import SentenceEncoder


def make_parser() -> Parser:
    parser = Parser(prog="rewrite.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--sentences", metavar="FILE", required=True, help="columns toxic, neutral1, neutral2 …")
    parser.add_argument("--num_sentences", type=int, metavar="N", help="a random sample (default: all)")
    parser.add_argument(
        "--span_detector", metavar="FOLDER", required=True, help="of `rectify train spans`, or a Hub id"
    )
    parser.add_argument("--scorer", required=True, help="says what is safe while masking and filling")
    parser.add_argument("--filler", default="causal:pocket", help=f"{'; '.join(FILLERS)} (default: %(default)s)")
    parser.add_argument("--fill_method", default="rectify:pocket-q", help="of a causal filler (default: %(default)s)")
    parser.add_argument("--reward_model", default="pocket-reward", help="of a causal filler (default: %(default)s)")
    parser.add_argument("--attempts", type=int, default=4, help="fillings tried (default: %(default)s)")
    parser.add_argument("--judge", default="pocket", help="scorer that judges the results (default: %(default)s)")
    parser.add_argument("--encoder", metavar="ID", help="sentence encoder, for the cosine")
    parser.add_argument("--ppl_model", default="pocket", help="whose perplexity is measured (default: %(default)s)")
    parser.add_argument("--output", metavar="FILE", help="write figures and texts as JSON")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    return parser


def run(arguments: argparse.Namespace) -> None:
    device, seed = available_device(arguments.device), arguments.seed
    sentences = sample_items(read_sentences(arguments.sentences), arguments.num_sentences, seed)
    find = SpanDetector.from_pretrained(arguments.span_detector, device=device).find
    filler = load_filler(
        arguments.filler,
        method=arguments.fill_method,
        reward_model=arguments.reward_model,
        device=device,
        seed=seed,
    )
    made = rewrite(sentences, find, filler, score_with(load_scorer(arguments.scorer)), arguments.attempts)
    model, tokenizer = load_language_model(arguments.ppl_model, device=device)
    encoder = SentenceEncoder.from_pretrained(arguments.encoder, device=device) if arguments.encoder else None
    systems = {"copied": made.copied, "deleted": made.deleted, "filled": made.filled}
    figures = measure_rewrites(sentences, systems, load_scorer(arguments.judge), model, tokenizer, encoder)
    print(table(figures), end="", flush=True)
    failed = ", ".join(f"{count} {reason}" for reason, count in sorted(made.failures.items())) or "none"
    say(f"sentences: {len(sentences)}; without a rewrite: {failed}")
    if arguments.output:
        write_json(Path(arguments.output), as_json(sentences, made, figures))


def main(argv=None) -> int:
    return execute(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
