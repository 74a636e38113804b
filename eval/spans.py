"""Character F1 of span detectors on annotated texts, as in SemEval-2021 Task 5, beside a word list and chance.

python eval/spans.py --texts tsd_test.csv --detector token=my-spans segment=my-segments --lexicon_texts tsd_train.csv

The table goes to standard output, everything to the output file.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from rectify.command_line import Parser, execute
from rectify.detectors.spans import SpanDetector
from rectify.evaluation.span_baselines import LexiconSpans, learnt_terms, random_spans
from rectify.evaluation.span_report import span_report, span_table
from rectify.hub import available_device
from rectify.json_files import write_json
from rectify.scoring.keywords import read_terms
from rectify.spec_pairs import named_places
from rectify.text_files import read_annotated_texts


def make_parser() -> Parser:
    parser = Parser(prog="spans.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--texts", nargs="+", required=True, metavar="FILE", help="of text and spans")
    parser.add_argument("--detector", nargs="+", default=[], metavar="NAME=FOLDER", help="of `rectify train spans`")
    parser.add_argument("--lexicon", metavar="FILE", help="a word list, a term a line")
    parser.add_argument("--lexicon_texts", nargs="+", metavar="FILE", help="annotated texts to learn a word list from")
    parser.add_argument("--seed", type=int, default=0, help="of chance and of the resamples (default: %(default)s)")
    parser.add_argument("--device", help="default: an accelerator if there is one")
    parser.add_argument("--threads", type=int, default=0, help="default: torch's own choice")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")
    return parser


def run(arguments: argparse.Namespace) -> None:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    places = named_places(arguments.detector, "detector", "NAME=FOLDER")
    rows = read_annotated_texts(arguments.texts)
    texts = [row.text for row in rows]
    predictions, about = {}, {}
    for name, folder in places.items():
        detector = SpanDetector.from_pretrained(folder, device=available_device(arguments.device))
        begin = time.perf_counter()
        predictions[name] = detector.find(texts)
        about[name] = {
            "texts_per_second": round(len(texts) / (time.perf_counter() - begin), 1),
            "base_model": detector.config.base_model,
            "head": detector.config.head,
            "threshold": detector.config.threshold,
            "training": detector.config.training,
        }
    if arguments.lexicon:
        predictions["word list"] = LexiconSpans(read_terms(Path(arguments.lexicon))).find(texts)
    if arguments.lexicon_texts:
        terms = learnt_terms(read_annotated_texts(arguments.lexicon_texts))
        predictions[f"{len(terms)} words of the training texts"] = LexiconSpans(terms).find(texts)
    predictions["every second word, by chance"] = random_spans(texts, arguments.seed)
    report = span_report(rows, predictions, arguments.seed)
    for name, facts in about.items():
        report["detectors"][name] |= facts
    print(f"{report['texts']} texts, {report['texts_with_spans']} with spans\n\n{span_table(report)}")
    if arguments.output:
        write_json(arguments.output, report)


def main(argv=None) -> int:
    return execute(run, make_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
