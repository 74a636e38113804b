"""The baseline of `eval/scorer.py`: ridge regression of Perspective's scores on words and characters.

python eval/tfidf_ridge.py --prompts prompts.jsonl --split test --output tfidf.json

TF-IDF of words and pairs of words, and of 2 to 5 characters within words. It is fitted to the training records; its
penalty is that with the least squared error on the validation records. Needs the extra `rectify-lm[train]`.
"""

import argparse
import hashlib
import sys
from pathlib import Path

import numpy as np

from rectify.command_line import Parser, execute
from rectify.evaluation.agreement import agreement, agreement_table
from rectify.json_files import write_json
from rectify.scoring.score_tables import perspective_scores
from rectify.scoring.scores import ATTRIBUTES

PENALTIES = (0.3, 1.0, 3.0, 10.0)


def make_parser() -> Parser:
    parser = Parser(prog="tfidf_ridge.py", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--prompts", type=Path, required=True, help="RealToxicityPrompts records")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="by the hash rule")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write everything as JSON")
    return parser


def run(arguments: argparse.Namespace) -> None:
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import Ridge
    from sklearn.pipeline import make_union

    parts = {split: perspective_scores(arguments.prompts, split) for split in ("train", "validation", "test")}
    texts = {split: [text for text, _ in rows] for split, rows in parts.items()}
    truth = {split: np.array([scores for _, scores in rows]) for split, rows in parts.items()}
    features = make_union(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True, min_df=2),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), sublinear_tf=True, min_df=2),
    )
    matrices = {"train": features.fit_transform(texts["train"])}
    matrices |= {split: features.transform(texts[split]) for split in ("validation", arguments.split)}
    attributes, penalties = {}, {}
    for place, attribute in enumerate(ATTRIBUTES):
        known = {split: ~np.isnan(scores[:, place]) for split, scores in truth.items()}
        errors, found = {}, {}
        for penalty in PENALTIES:
            ridge = Ridge(alpha=penalty)
            ridge.fit(matrices["train"][known["train"]], truth["train"][known["train"], place])
            held = ridge.predict(matrices["validation"][known["validation"]])
            errors[penalty] = float(np.mean((held - truth["validation"][known["validation"], place]) ** 2))
            found[penalty] = ridge.predict(matrices[arguments.split]).clip(0, 1)
        penalties[attribute] = min(errors, key=errors.__getitem__)
        attributes[attribute] = agreement(found[penalties[attribute]], truth[arguments.split][:, place])
    chosen = texts[arguments.split]
    report = {
        "scorer": "tfidf-ridge",
        "split": arguments.split,
        "texts": len(chosen),
        "texts_sha256": hashlib.sha256("\n".join(chosen).encode()).hexdigest(),
        "features": matrices["train"].shape[1],
        "penalties": penalties,
        "attributes": attributes,
    }
    print(f"tfidf-ridge, {report['features']} features: {len(chosen)} {arguments.split} texts\n")
    print(agreement_table(attributes))
    if arguments.output:
        write_json(arguments.output, report)


def main(argv=None) -> int:
    return execute(run, make_parser(), argv, extras=["train"])


if __name__ == "__main__":
    sys.exit(main())
