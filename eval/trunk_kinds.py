"""Every kind of causal model that transformers builds, in tiny form, as the trunk of a Q network.

    python eval/trunk_kinds.py [--kinds llama,mamba] [--seconds 60]

Each is made with random weights and put through what decoding asks: texts that grow, go back, change rows, are padded
and differ in length; a head on the generating model's own states; saving and loading. Whatever the memo answers is
compared with a run of the trunk over one text alone. A kind is right, right without a cache, refused with an error of
the one tree, or not built here; a difference above 1e-4 is wrong, any other error a crash, and then the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils import logging

from rectify.errors import RectifyError, first_line
from rectify.evaluation.trunk_kinds import Wrong, build, try_kind


class TooLong(BaseException):
    """The time of a kind is over."""


@contextmanager
def seconds_at_most(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(kind: str, seconds: int, verbose: bool = False) -> tuple[str, str]:
    """What came of a kind, and why."""
    try:
        with seconds_at_most(seconds):
            try:
                model = build(kind)
            except Exception as error:  # as many kinds as ways to refuse a size
                if verbose:
                    traceback.print_exc()
                return "not built", f"{type(error).__name__}: {first_line(error)}"
            count = sum(parameter.numel() for parameter in model.parameters())
            if count > 30e6:
                return "not built", f"{count / 1e6:.0f} million weights"
            try:
                return try_kind(kind, model), ""
            except Wrong as wrong:  # where rounding is enlarged, it is not in twice the digits
                return try_kind(kind, model.double()), f"in float64; in float32 {wrong}"
    except RectifyError as error:
        return "refused", first_line(error)
    except Wrong as error:
        return "WRONG", str(error)
    except TooLong:
        return "not built", f"takes more than {seconds} s"
    except Exception as error:  # a crash is what is looked for
        if verbose:
            traceback.print_exc()
        where = traceback.extract_tb(error.__traceback__)
        own = next(
            (f"{Path(each.filename).name}:{each.lineno}" for each in reversed(where) if "rectify" in each.filename), ""
        )
        return "CRASHED", f"{type(error).__name__}: {first_line(error)} ({own})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", help="model types, with commas between; all without it")
    parser.add_argument("--seconds", type=int, default=60, help="for each kind")
    parser.add_argument("--verbose", action="store_true", help="tracebacks of what is not built or crashes")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    kinds = arguments.kinds.split(",") if arguments.kinds else [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES]
    counts: Counter[str] = Counter()
    for kind in kinds:
        begin = time.perf_counter()
        what, why = outcome(kind, arguments.seconds, arguments.verbose)
        counts[what] += 1
        print(f"{kind:28} {what:22} {time.perf_counter() - begin:5.1f} s  {why}", flush=True)
    print(", ".join(f"{what}: {count}" for what, count in counts.most_common()), f"of {len(kinds)}")
    return int(bool(counts["WRONG"] or counts["CRASHED"]))


if __name__ == "__main__":
    sys.exit(main())
