"""The public texts that the pocket models learn from: one reader a folder, one split rule for all.

Only folders whose licence lets trained weights be shipped are read. Official test files, and records that the hash
rule marks as test, never leave this module.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rectify.splits import record_key, split_of

Split = Literal["train", "validation"]


@dataclass(frozen=True)
class LabelledText:
    """A text, whether people called it toxic (`None`: nobody was asked), and the folder it comes from."""

    text: str
    toxic: bool | None
    source: str
    split: Split


def pieces(texts: Iterable[str], longest: int, count: int, seed: int) -> list[str]:
    """Pieces of 3 to `longest` words, cut from texts one after the other; `count` of them at random."""
    rng = np.random.default_rng(seed)
    found = []
    for text in texts:
        words, place = text.split(), 0
        while place < len(words):
            length = int(rng.integers(3, longest + 1))
            found.append(" ".join(words[place : place + length]))
            place += length
    return [found[i] for i in rng.choice(len(found), size=min(len(found), count), replace=False)]


def _rows(path: Path, delimiter: str = ",") -> Iterator[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file, delimiter=delimiter)


def _json_lines(path: Path) -> Iterator[dict]:
    with path.open(encoding="utf-8") as file:
        yield from map(json.loads, file)


def _jigsaw_10k(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for record in _json_lines(folder / "jigsaw_10k.json"):
        yield record["text"], record["label"] == 0  # in this file 0 is toxic


def _jigsaw_dummy(folder: Path) -> Iterator[tuple[str, bool | None]]:
    kinds = ("toxic", "severe_toxic", "obscene", "threat", "insult", "identity_hate")
    for row in _rows(folder / "train.csv"):
        yield row["comment_text"], any(row[kind] == "1" for kind in kinds)


def _jigsaw_toxic_only(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for row in _rows(folder / "test_toxic.csv"):
        yield row["comment_text"], True


def _toxic_spans(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for name in ("tsd_train.csv", "tsd_trial.csv"):
        for row in _rows(folder / name):
            yield row["text"], True


def _spans(folder: Path) -> Iterator[tuple[str, set[int]]]:
    """Toxic comments of SemEval-2021 Task 5 (training part), and the places of their toxic characters."""
    for row in _rows(folder / "tsd_train.csv"):
        yield row["text"], set(json.loads(row["spans"]))


def _davidson(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for row in _rows(folder / "labeled_data.csv"):
        yield row["tweet"], row["class"] != "2"


def _hatexplain(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for row in _rows(folder / "092-HateXplain.csv"):
        yield row["text"], {"0": False, "1": True, "2": True}.get(row["category"])


def _stormfront(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for row in _rows(folder / "stormfront_merged.csv"):
        if row["split"] != "sampled_test":
            yield row["text"], row["label"] == "hate"


def _paradetox(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for row in _rows(folder / "paradetox.tsv", "\t"):
        yield row["toxic"], True
        for name in ("neutral1", "neutral2", "neutral3"):
            if row[name]:
                yield row[name], False


def _dynahate(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for row in _rows(folder / "db_dev.csv"):
        yield row["text"], row["label"] == "hate"


def _hh_rlhf(folder: Path) -> Iterator[tuple[str, bool | None]]:
    with gzip.open(folder / "test.jsonl.gz", "rt", encoding="utf-8") as file:
        for line in file:
            yield json.loads(line)["chosen"].strip(), None


def _wikitext(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for line in (folder / "valid.txt").read_text(encoding="utf-8").splitlines():
        if len(line) > 80:
            # undo the spaced punctuation and the @-@ marks of the distributed file
            line = re.sub(r" @(.)@ ", r"\1", line.strip())
            yield re.sub(r" ([,.;:!?)'])", r"\1", line).replace("( ", "("), False


def _nltk(folder: Path) -> Iterator[tuple[str, bool | None]]:
    for name in ("state_union", "inaugural", "masc_tagged"):
        with zipfile.ZipFile(folder / f"{name}.zip") as archive:
            for entry in archive.namelist():
                if not entry.endswith(".txt") or entry.endswith("categories.txt"):
                    continue
                with archive.open(entry) as binary:
                    text = io.TextIOWrapper(binary, encoding="utf-8", errors="replace").read()
                if name == "masc_tagged":  # word_TAG pairs
                    text = re.sub(r"_[^\s_]+(?=\s|$)", "", text)
                    text = re.sub(r" ([,.;:!?)'])", r"\1", text)
                for paragraph in re.split(r"\n\s*\n", text):
                    paragraph = " ".join(paragraph.split())
                    if len(paragraph) > 80:
                        yield paragraph, False


_READERS: dict[str, Callable[[Path], Iterator[tuple[str, bool | None]]]] = {
    "jigsaw_10k_airdecoding": _jigsaw_10k,
    "jigsaw_detoxify_dummy": _jigsaw_dummy,
    "jigsaw_toxic_only": _jigsaw_toxic_only,
    "toxic_spans": _toxic_spans,
    "davidson": _davidson,
    "hatexplain_mbib": _hatexplain,
    "stormfront": _stormfront,
    "paradetox": _paradetox,
    "dynahate": _dynahate,
    "hh_rlhf_harmless_test": _hh_rlhf,
    "wikitext2_valid_test": _wikitext,
    "nltk_corpora": _nltk,
}


def _realtoxicityprompts(folder: Path) -> Iterator[tuple[str, str]]:
    # the texts only: their Perspective scores are kept for judging
    for record in _json_lines(folder / "prompts.jsonl"):
        yield record["prompt"]["text"] + record["continuation"]["text"], record_key(record)


def read_fragments(data: Path, words: int = 12) -> Iterator[LabelledText]:
    """Pieces of toxic comments, toxic where they touch what people marked as toxic; training texts only."""
    for text, toxic in _spans(data / "toxic_spans"):
        if split_of(text.strip()) != "train" or not toxic:
            continue
        places = [match.span() for match in re.finditer(r"\S+", text)]
        for start in range(0, len(places), words):
            begin, end = places[start][0], places[min(start + words, len(places)) - 1][1]
            touched = not toxic.isdisjoint(range(begin, end))
            yield LabelledText(text[begin:end], touched, "toxic_spans", "train")


def read_texts(data: Path) -> Iterator[LabelledText]:
    """Every text that the pocket models may learn from, in a fixed order, without duplicates.

    Args:
        data: folder that holds one folder per data set, as its README lists them.

    Raises:
        FileNotFoundError: a data set is missing.
    """
    seen: set[str] = set()
    for text, key in _realtoxicityprompts(data / "realtoxicityprompts"):
        split = split_of(key)
        if split != "test" and text not in seen:
            yield LabelledText(text, None, "realtoxicityprompts", split)
        seen.add(text.strip())  # a test text must not come back through another folder
    for name, reader in _READERS.items():
        for text, toxic in reader(data / name):
            text = text.strip()
            split = split_of(text)
            if not text or text in seen or split == "test":
                continue
            seen.add(text)
            yield LabelledText(text, toxic, name, split)
