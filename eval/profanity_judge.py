"""alt-profanity-check as a judge: JSON strings on standard input, a probability or `null` a line on standard output.

It runs in an environment of its own (`python -m venv judge && judge/bin/pip install alt-profanity-check==1.9.1`) and
imports nothing of rectify. Texts without a word are not judged (`null`).
"""

import json
import sys
from importlib.metadata import version
from itertools import islice

from profanity_check import predict_prob


def main() -> None:
    if sys.argv[1:] == ["--version"]:
        print(f"alt-profanity-check {version('alt-profanity-check')}, scikit-learn {version('scikit-learn')}")
        return
    while texts := [json.loads(line) for line in islice(sys.stdin, 4096)]:
        for text, probability in zip(texts, predict_prob(texts), strict=True):
            print(float(probability) if text.strip() else "null")


if __name__ == "__main__":
    main()
