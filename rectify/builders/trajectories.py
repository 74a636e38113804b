"""Trajectories for the dead-end Q network: a model's own continuations with rewards, or people's texts with labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.builders.selection import TOXIC, TRAIN, Counts, compile_trajectories, reward_of, write_split
from rectify.builders.settings import TrajectorySettings, check_share
from rectify.errors import InvalidArgumentError
from rectify.generation.generator import Generator, continue_with, shared_context
from rectify.generation.output import GenerationFile, Records
from rectify.generation.prompts import Prompt
from rectify.json_files import sha256_of
from rectify.methods.method import Decoder
from rectify.text_files import LabelledText

GENERATIONS = "generations.jsonl"
_CHUNK = 1024  # texts a call of the tokenizer

Score = Callable[[Sequence[str]], np.ndarray]
"""From texts to the probability that each is toxic, `[N]` from 0 to 1, NaN where it cannot tell."""


def build_trajectories(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    score: Score,
    settings: TrajectorySettings,
    output_dir: str | Path,
    origin: Mapping[str, str] | None = None,
    decoder: Decoder | None = None,
) -> Counts:
    """Write `train.jsonl` and `validation.jsonl`: the beginnings of texts as continued by a model, with rewards.

    Every continuation and its score is kept in `generations.jsonl`, from which an interrupted build goes on, and from
    which another selection or reward is made without generating again. The result depends on the arguments alone. A
    record is `{"prompt": "…", "continuation": "…", "reward": [r]}`, r from −1 to 0.

    Args:
        texts: those that make the same prompt count as one.
        model: writes the continuations.
        tokenizer: the model's, padding on the left.
        score: judges continuations alone, without their prompt and surrounding space.
        settings: how.
        output_dir: made where it is missing.
        origin: names of what the generations come from, such as `{"model": …, "reward_model": …}`; a folder begun with
            other names is refused.
        decoder: the method that continues them; `None` for the model as it is. Trajectories of a rectified policy show
            where it still ends badly.

    Raises:
        InvalidArgumentError: no text makes a prompt, prompts do not fit the model's context, scores are no
            probabilities, or the folder cannot be made or holds something else.
    """
    folder = made_folder(output_dir)
    if (folder / TRAIN).exists() and not (folder / GENERATIONS).exists():
        raise InvalidArgumentError(f"output_dir {str(folder)!r} holds another {TRAIN}: give another folder")
    counts = Counts(texts=len(texts))
    prompts = _prompts(texts, model, tokenizer, settings, counts)
    file = GenerationFile(
        folder / GENERATIONS,
        {
            **(origin or {}),
            "dtype": str(model.dtype),
            "sampling": repr(settings.sampling),
            "n": settings.n,
            "prompt_tokens": settings.prompt_tokens,
            "max_new_tokens": settings.max_new_tokens,
            "min_new_tokens": settings.min_new_tokens,
            "seed": settings.seed,
            "batch_size": settings.prompts_a_batch,
            "prompts": sha256_of([prompt.text for prompt in prompts]),
        },
    )
    generator = Generator(
        model,
        tokenizer,
        settings.sampling,
        settings.max_new_tokens,
        settings.min_new_tokens,
        settings.n,
        settings.seed,
    )

    def make(batch: list[Prompt], number: int) -> Records:
        rows = continue_with(generator, batch, decoder, number) if decoder else generator.continue_batch(batch, number)
        texts = [[one.text for one in row] for row in rows]
        scores = iter(_scores(score, [text for row in texts for text in row]))
        return [
            {**prompt.record, "generations": [{"text": text, "toxicity": next(scores)} for text in row]}
            for prompt, row in zip(batch, texts, strict=True)
        ]

    file.complete(
        prompts,
        settings.prompts_a_batch,
        make,
        lambda record, prompt: record["prompt"] == prompt.record["prompt"] and len(record["generations"]) == settings.n,
    )
    compile_trajectories(file.path, settings, counts)
    return counts


def label_trajectories(
    texts: Sequence[LabelledText], output_dir: str | Path, validation_share: float = TrajectorySettings.validation_share
) -> Counts:
    """Write `train.jsonl` and `validation.jsonl` from labelled texts: `{"text": "…", "reward": [−label]}`.

    Args:
        texts: blank ones are left out.
        output_dir: made where it is missing.
        validation_share: the share of texts for validation, from 0 up to 1; by hash.

    Raises:
        InvalidArgumentError: the share is out of range, or the folder cannot be made or holds generations.
    """
    check_share(validation_share)
    folder = made_folder(output_dir)
    if (folder / GENERATIONS).exists():
        raise InvalidArgumentError(f"output_dir {str(folder)!r} holds {GENERATIONS} of a model: give another folder")
    known = [text for text in texts if text.text.strip()]
    counts = Counts(texts=len(texts), short=len(texts) - len(known))
    counts.toxic = sum(text.label >= TOXIC for text in known)
    records = [(text.text, {"text": text.text, "reward": [reward_of(text.label, "soft")]}) for text in known]
    write_split(folder, records, validation_share, counts)
    return counts


def made_folder(output_dir: str | Path) -> Path:
    """The folder, made where it is missing.

    Raises:
        InvalidArgumentError: it cannot be made.
    """
    folder = Path(output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidArgumentError(
            f"output_dir {str(folder)!r} cannot be made ({error.strerror or error}): give another folder"
        ) from error
    return folder


def _prompts(
    texts: Sequence[str],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrajectorySettings,
    counts: Counts,
) -> list[Prompt]:
    """The prompts that texts make, the longest first, so that a batch holds similar lengths."""
    lengths: dict[str, int] = {}
    for start in range(0, len(texts), _CHUNK):
        cut = []
        for ids in tokenizer(list(texts[start : start + _CHUNK]), add_special_tokens=False, verbose=False)["input_ids"]:
            prompt = str(tokenizer.decode(ids[: settings.prompt_tokens], clean_up_tokenization_spaces=False))
            prompt = prompt.rstrip("\ufffd")  # a character that the cut has split
            if len(ids) < 2 or not prompt.strip():
                counts.short += 1
            else:
                cut.append(prompt)
        if cut:
            for prompt, ids in zip(cut, tokenizer(cut)["input_ids"], strict=True):
                counts.repeated += prompt in lengths
                lengths[prompt] = len(ids)
    if not lengths:
        raise InvalidArgumentError(f"texts: none of {len(texts)} has 2 tokens: give longer ones")
    context = shared_context(model)
    longest = max(lengths.values())
    if context is not None and longest + settings.max_new_tokens > context:
        raise InvalidArgumentError(
            f"prompt_tokens is {settings.prompt_tokens}: a prompt of {longest} tokens and {settings.max_new_tokens} "
            f"new ones exceed the context of {context}: lower it, or max_new_tokens"
        )
    counts.prompts = len(lengths)
    return [Prompt.of(prompt) for prompt in sorted(lengths, key=lengths.__getitem__, reverse=True)]


def _scores(score: Score, texts: Sequence[str]) -> list[float | None]:
    """The probability that each text is toxic; `None` for blank ones and where it is not known."""
    places = [index for index, text in enumerate(texts) if text.strip()]
    given = score([texts[index].strip() for index in places]) if places else ()
    values = np.asarray(given, dtype=np.float64)
    if values.shape != (len(places),):
        raise InvalidArgumentError(f"score gives shape {values.shape} for {len(places)} texts: give one number a text")
    if (wrong := values[(values < 0) | (values > 1)]).size:
        raise InvalidArgumentError(f"score gives {wrong[0]:g}: give probabilities from 0 to 1")
    known = {place: round(float(value), 6) for place, value in zip(places, values, strict=True) if value == value}
    return [known.get(index) for index in range(len(texts))]
