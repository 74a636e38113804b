"""Random damage to folders of every kind that rectify loads: each is refused in one line, or works.

python eval/damaged_folders.py --count 2000 --seed 0

The folders are the bundled ones, and a table, a cascade, substitutions and a span detector made here. In each try one
file of a copy is spoilt: a value of its JSON is put in another's place or left out, or bytes are changed or cut off.
What loads is used on a text, and what it says must be a probability, or undefined.

The result goes to standard output as a line of JSON, and every fault as a line before it: an error that is not
rectify's, a message of several lines, a value out of range, a command that was run, more than ten seconds. The exit
code is 2 where there is one.
"""

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers.utils import logging as transformers_logging

from rectify import DeadEndQNetwork, RectifyError, load_language_model
from rectify.detectors import load_detector
from rectify.detectors.spans import SpanDetector
from rectify.hub import POCKET, checkpoint_folder
from rectify.rephrasing.sentences import Sentence
from rectify.rephrasing.substitutions import Substitutions
from rectify.scoring.cascade import CascadeConfig
from rectify.scoring.load import load_scorer
from rectify.static_risk import StaticRiskConfig, StaticTokenRisk

TEXT = "You are such a lovely person"
SLOW_S = 10.0


def values_for(marker: Path) -> list[Any]:
    """What is put in place of values."""
    numbers = [0, -1, 1, 2, 10**6, 2**31, 10**12, 10**30, 10**400, 0.5, -0.5, 1e308, float("nan"), float("inf")]
    words = ["", "x", "64", "../x", "/dev/zero", "\ud800", "a\0b", "a\nb", "x" * 3000, "torch.float32"]
    commands = [
        f"process:touch {marker}",
        f"__import__('os').system('touch {marker}')",
        "perspective",
        "someone/kernel",
    ]
    return [None, True, False, *numbers, *words, *commands, [], {}, [1], ["x"], {"x": 1}, [[]], [None]]


def make_folders(place: Path) -> dict[str, Path]:
    """Whole folders, by kind."""
    for name in POCKET:
        shutil.copytree(checkpoint_folder(name), place / name)
    StaticTokenRisk(np.linspace(0, 1, 8192), StaticRiskConfig(8192, 0.5, 20.0)).save_pretrained(place / "static")
    spec = f"pocket:{place / 'pocket-scorer'}"
    CascadeConfig(spec, spec, 0.8).save_pretrained(place / "cascade")
    sentence = Sentence("nobody here really gives a damn about it", ("nobody here really cares about it",))
    Substitutions.learn([sentence]).save_pretrained(place / "substitutions")
    torch.manual_seed(0)
    SpanDetector.from_backbone("pocket", max_length=24, overlap=4, lora_r=2).save_pretrained(place / "spans")
    return {path.name: path for path in sorted(place.iterdir())}


def use(kind: str, folder: Path) -> np.ndarray:
    """Load a folder and use it: what it says, which is to be from 0 to 1."""
    ids = torch.tensor([[5, 6, 7]])
    if kind == "pocket":
        model, tokenizer = load_language_model(str(folder))
        return model(torch.tensor([tokenizer(TEXT)["input_ids"]])).logits.softmax(-1).detach().numpy()
    if kind in ("pocket-q", "pocket-q-shared"):
        return -DeadEndQNetwork.from_pretrained(folder)(ids).detach().numpy()
    if kind == "static":
        return -StaticTokenRisk.from_pretrained(folder)(ids).numpy()
    if kind == "pocket-reward":
        return load_detector(folder).probabilities([TEXT])
    if kind == "spans":
        detector = SpanDetector.from_pretrained(folder)
        return np.concatenate(detector.token_scores(detector.encode([TEXT])))
    if kind == "substitutions":
        return np.exp(Substitutions.from_pretrained(folder).log_probability([], "damn", "gives a ", " about"))
    return load_scorer(f"{'cascade' if kind == 'cascade' else 'pocket'}:{folder}").score([TEXT]).values


def places_in(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of a JSON value are; of long lists and objects, in some parts only."""
    yield place
    parts = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
    for name, part in parts[:40]:
        yield from places_in(part, (*place, name))


def spoil(path: Path, draw: random.Random, values: list[Any]) -> str:
    """Damage a file; what was done."""
    text = path.read_bytes()
    if path.suffix in (".json", ".jsonl") and draw.random() < 0.9:
        value = json.loads(text)
        *above, name = draw.choice([place for place in places_in(value) if place])
        whole = value
        for step in above:
            whole = whole[step]
        if draw.random() < 0.12:
            del whole[name]
            done = "left out"
        else:
            whole[name] = draw.choice(values)
            done = repr(whole[name])[:40]
        path.write_text(json.dumps(value))
        return f"{'.'.join(map(str, (*above, name)))}: {done}"
    data = bytearray(text)
    for _ in range(draw.randint(1, 4)):
        data[draw.randrange(min(len(data), draw.choice([16, 400, len(data)])))] = draw.randrange(256)
    cut = len(data) if draw.random() < 0.7 else draw.randrange(len(data))
    path.write_bytes(bytes(data[:cut]))
    return "bytes" if cut == len(data) else f"cut to {cut}"


def outcome(attempt: Callable[[], np.ndarray]) -> tuple[str, str]:
    """What comes of using a folder, and what is wrong with that, if anything is."""
    try:
        found = attempt()
    except RectifyError as error:
        return "refused", "a message of several lines" if "\n" in str(error) else ""
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "raw", f"{type(error).__name__} at {where.filename}:{where.lineno}: {error}"
    if np.isnan(found).any():  # of finite weights whose products are not; decisions fail closed at these
        return "undefined", ""
    return "used", "" if ((found >= 0) & (found <= 1)).all() else "a value that is no probability"


def main(argv: list[str] | None = None) -> int:
    """Try, say what was found, and return the exit code."""
    parser = argparse.ArgumentParser(description="Load folders with random damage.")
    parser.add_argument("--count", type=int, default=2000, help="folders (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the damage (default: %(default)s)")
    arguments = parser.parse_args(argv)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    logging.disable()
    draw, tally, faults = random.Random(arguments.seed), Counter[str](), 0
    with tempfile.TemporaryDirectory() as name:
        place, marker = Path(name), Path(name) / "marker"
        folders, values = make_folders(place / "whole"), values_for(marker)
        for kind, folder in folders.items():
            assert outcome(lambda kind=kind, folder=folder: use(kind, folder)) == ("used", ""), kind
        for _ in range(arguments.count):
            kind = draw.choice(list(folders))
            folder = place / "damaged" / kind
            shutil.copytree(folders[kind], folder)
            path = draw.choice(sorted(path for path in folder.rglob("*") if path.is_file()))
            done = spoil(path, draw, values)
            begun = time.monotonic()
            result, wrong = outcome(lambda kind=kind, folder=folder: use(kind, folder))
            tally[result] += 1
            if time.monotonic() - begun > SLOW_S:
                wrong = f"{time.monotonic() - begun:.0f} s"
            if marker.exists():
                wrong = "a command was run"
                marker.unlink()
            if wrong:
                faults += 1
                print(f"{path.relative_to(place)}: {done}: {wrong}")
            shutil.rmtree(folder)
    print(json.dumps({"folders": arguments.count, "seed": arguments.seed, **tally, "faults": faults}))
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
