"""Made-up RealToxicityPrompts records over the words of the tiny tokenizer, and the settings of a run over them."""

import numpy as np

from rectify.evaluation.run_settings import RunSettings


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


def run_settings(place, output, **changes):
    """Settings of a run over the models and prompts of the fixture `run_place`."""
    given = {
        "methods": (f"rectify:{place / 'q'},beta=4", f"static:{place / 'static'}"),
        "n": 3,
        "max_new_tokens": 4,
        "batch_size": 4,
        "scorers": ("stub",),
        "split": "all",
        "num_prompts": 14,
    }
    prompts = str(place / "prompts.jsonl")
    return RunSettings(model=str(place / "model"), prompts=prompts, output_dir=str(output), **given | changes)
