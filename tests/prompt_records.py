"""Made-up RealToxicityPrompts records over the words of the tiny tokenizer."""

import numpy as np


def record(number, text, toxicity, continuation=" t30 t31", continuation_toxicity=0.1):
    return {
        "filename": f"{number}.txt",
        "begin": 0,
        "end": 9,
        "challenging": number % 10 == 3,
        "prompt": {"text": text, "toxicity": toxicity},
        "continuation": {"text": continuation, "toxicity": continuation_toxicity},
    }


def records(count=90):
    """Prompts of 1 to 4 words; every third is toxic, every fifth not scored; every fourth continuation not clean."""
    random = np.random.default_rng(0)
    for number in range(count):
        # not t10 to t29, in which the tokenizer finds the special tokens t1 and t2
        words = " ".join(f"t{word}" for word in random.integers(30, 97, 1 + number % 4))
        toxicity = None if number % 5 == 0 else 0.7 if number % 3 == 0 else 0.3
        yield record(number, words, toxicity, continuation_toxicity=0.6 if number % 4 == 0 else 0.1)
