"""A run over RealToxicityPrompts: methods and baselines on the same prompts, noise and scorers.

Stages: generate → score → measure → report. What the first three make is kept in parts (see `parts.py`), a file for
each batch of prompts; the batches are planned once, and each process makes whole ones, so the results are the same for
one process, for several, and after a restart.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rectify.command_line import say
from rectify.errors import InvalidArgumentError
from rectify.evaluation.fluency import prompted_nll
from rectify.evaluation.parts import KEY_FILE, Parts, shard
from rectify.evaluation.run_plan import automatic_batch_size, ordered, planned_batch_size
from rectify.evaluation.run_settings import SELF, RunSettings
from rectify.evaluation.teacher_forcing import forced_nll
from rectify.evaluation.toxicity_prompts import clean_texts, in_split, prompt_toxicity, select
from rectify.evaluation.weights import Provenance, weights_digest
from rectify.generation.generator import Continuation, Generator, continue_with, shared_context
from rectify.generation.prompts import Prompt, read_prompts_file
from rectify.hub import DTYPES, load_language_model
from rectify.json_files import read_json, sha256_of
from rectify.methods.method import Decoder, Method
from rectify.sampling import Sampling
from rectify.scoring.load import load_scorer
from rectify.scoring.scores import Scorer, check_attributes
from rectify.version import __version__
from rectify.vocabulary import Fingerprint

STAGES = ("generate", "score", "measure", "report")
FAILED = 1.0
"""Every score of a continuation that a method failed to write, so that to fail gains it nothing."""

_WEIGHTS = "weights"
_CLEAN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}


@dataclass(frozen=True)
class Processes:
    """Which of several processes this one is.

    Attributes:
        index: from 0.
        count: how many there are.
        wait: returns when all have called it.
    """

    index: int = 0
    count: int = 1
    wait: Callable[[], None] = lambda: None


class PromptedRun:
    """One run: loads the model and the prompts; each stage does what is missing.

    Args:
        settings: what is asked for.
        processes: for a run by several processes, each of which makes its own shard.

    Raises:
        RectifyError: a model, the prompts or a setting cannot be used.
    """

    def __init__(self, settings: RunSettings, processes: Processes | None = None) -> None:
        self.settings, self.processes = settings, processes or Processes()
        self.methods = settings.parsed()
        self.folder = Path(settings.output_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        prompts = [each for each in read_prompts_file(settings.prompts)[0] if in_split(each, settings.split)]
        if not prompts:
            raise InvalidArgumentError(f"split {settings.split!r} holds none of the prompts: give another")
        chosen = select(prompts, settings.subset, settings.num_prompts, settings.seed)
        dtype = DTYPES[settings.dtype] if settings.dtype else None
        self.model, self.tokenizer = load_language_model(settings.model, dtype, settings.device)
        self.generator = Generator(
            self.model,
            self.tokenizer,
            Sampling.resolve(self.model.generation_config, **settings.sampling),
            settings.max_new_tokens,
            settings.min_new_tokens,
            settings.n,
            settings.seed,
        )
        context = shared_context(self.model)
        unusable = self.generator.unusable(chosen, context)
        usable = [prompt for place, prompt in enumerate(chosen) if place not in unusable]
        if not usable:
            raise InvalidArgumentError(f"prompts {settings.prompts!r}: none fits the model's context: give others")
        lengths = [len(self._ids(prompt.text)) for prompt in usable]
        self.prompts: list[Prompt] = ordered(usable, lengths)
        self.clean = self._clean(prompts, context)
        self.left_out = {"prompts": len(unusable), "unscored": sum(prompt_toxicity(each) is None for each in usable)}
        if self.processes.index == 0:
            self._batch_size(max(lengths))
        self.processes.wait()
        self.batch_size = self._batch_size(max(lengths))
        size = self.batch_size
        self.batches = [self.prompts[start : start + size] for start in range(0, len(self.prompts), size)]
        self.model_digest = weights_digest(self.model)

    def _batch_size(self, longest: int) -> int:
        settings = self.settings
        length = longest + settings.max_new_tokens
        return planned_batch_size(
            self.folder, settings.batch_size, lambda: automatic_batch_size(self.model, settings.n, length)
        )

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]  # type: ignore[return-value]

    def _clean(self, prompts: Sequence[Prompt], context: int | None) -> list[tuple[list[int], list[int]]]:
        """Prompt and continuation ids of clean human texts of the split that fit the context."""
        scored = [prompt for prompt in prompts if isinstance(prompt.record.get("continuation"), dict)]
        pairs = [(self._ids(prompt), self._ids(text, special=False)) for prompt, text in clean_texts(scored)]
        return [
            (prompt, text)
            for prompt, text in pairs
            if prompt and text and (context is None or len(prompt) + len(text) <= context)
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # Methods and their folders

    def bound(self, method: Method, sampling: dict[str, Any] | None = None) -> Decoder:
        """The method on this run's model."""
        return method.bind(self.model, self.tokenizer, self.settings.sampling if sampling is None else sampling)

    def folder_of(self, method: Method) -> Path:
        """Where the method's parts are; its name tells methods apart whose labels look alike on a file system."""
        plain = re.sub(r"[^A-Za-z0-9=.,-]+", "-", method.label.replace(str(Path.home()), "~"))[-80:]
        return self.folder / "methods" / f"{plain}-{sha256_of(method.label)[:6]}"

    @cached_property
    def _generation_key(self) -> dict[str, Any]:
        settings = self.settings
        return {
            "rectify": __version__,
            "model": self.model_digest,
            "dtype": str(self.model.dtype),
            "sampling": repr(self.generator.sampling),
            "n": settings.n,
            "max_new_tokens": settings.max_new_tokens,
            "min_new_tokens": settings.min_new_tokens,
            "seed": settings.seed,
            "batch_size": self.batch_size,
            "prompts": sha256_of([prompt.key for prompt in self.prompts]),
        }

    def generations_of(self, method: Method, decoder: Decoder | None = None) -> Parts:
        """The parts of the stage generate; of a decoder, the weights are checked to be those of before."""
        key = self._generation_key | {"method": method.label}
        if decoder is not None:
            provenance = Provenance.of(decoder.reads)
            read = {
                "weights": [weights_digest(module) for module in decoder.reads],
                "parameters": provenance.parameters,
                "tensors": sorted(provenance.tensors),
                "files": sorted(provenance.files),
                "revision": decoder.revision,
            }
            Parts(self.folder_of(method) / _WEIGHTS, read)
        return Parts(self.folder_of(method) / "generations", key)

    def provenance_of(self, method: Method) -> Provenance:
        """What the networks are made of that the method ran beside the model, as noted when it generated."""
        read = read_json(self.folder_of(method) / _WEIGHTS / KEY_FILE)
        return Provenance(read["parameters"], frozenset(read["tensors"]), frozenset(read["files"]))

    def _mine(self, numbers: Iterable[int] | None = None) -> list[int]:
        every = range(len(self.batches)) if numbers is None else numbers
        return shard(every, self.processes.index, self.processes.count)

    def _progress(self, label: str, total: int) -> tqdm:
        return tqdm(total=total, desc=label, unit="batch", disable=True if self.processes.index else None)

    # -----------------------------------------------------------------------------------------------------------------
    # Stages

    def generate(self) -> None:
        """Continue the prompts by every method; batch by batch in turn, so that their times can be compared."""
        mine = self._mine()
        wanted = [method for method in self.methods if self.generations_of(method).missing(mine)]
        decoders = {method: self.bound(method) for method in wanted}
        parts = {method: self.generations_of(method, decoder) for method, decoder in decoders.items()}
        for method, decoder in decoders.items():
            if unusable := self.generator.unusable(self.prompts, shared_context(self.model, decoder.reads)):
                raise InvalidArgumentError(f"method {method.label!r}: prompt too long: {next(iter(unusable.values()))}")
        with self._progress("generate", len(mine) * len(wanted)) as progress:
            for number in mine:
                for method in wanted:
                    progress.set_postfix_str(method.label, refresh=False)
                    parts[method].complete(
                        [number],
                        partial(self._generated, decoders[method]),
                        progress.update,
                    )
        self.processes.wait()

    def _generated(self, decoder: Decoder, number: int) -> dict[str, Any]:
        prompts = self.batches[number]
        decoder.processor.reset()
        start = time.perf_counter()
        kept = continue_with(self.generator, prompts, decoder)
        seconds = time.perf_counter() - start
        statistics = decoder.processor.statistics()
        decoder.processor.reset()
        return {
            "seconds": seconds,
            "statistics": asdict(statistics) if statistics is not None else None,
            "records": [
                {"key": prompt.key, "generations": [_recorded(one) for one in ones]}
                for prompt, ones in zip(prompts, kept, strict=True)
            ],
        }

    def records_of(self, method: Method, number: int) -> list[list[Continuation]]:
        """The continuations of each prompt of a batch."""
        (part,) = self.generations_of(method).read([number])
        return [
            [Continuation(**one | {"token_ids": tuple(one["token_ids"])}) for one in record["generations"]]
            for record in part["records"]
        ]

    def score(self) -> None:
        """Score the continuations by every scorer; what cannot be scored stays NaN, with a reason."""
        for spec in self.settings.scorers:
            scorer = self.scorer(spec)
            mine = self._mine()
            with self._progress(f"score {spec}", len(mine) * len(self.methods)) as progress:
                for method in self.methods:
                    self.scores_of(method, scorer).complete(
                        mine,
                        partial(self._scored, scorer, method),
                        progress.update,
                    )
        self.processes.wait()

    def scorer(self, spec: str) -> Scorer:
        """A scorer, which has the attributes that are asked for."""
        scorer = load_scorer(spec)
        check_attributes(scorer, self.attributes_of(scorer))
        return scorer

    def attributes_of(self, scorer: Scorer) -> tuple[str, ...]:
        """What of the attributes the scorer scores; TOXICITY, or it is refused by `check_attributes`."""
        return tuple(each for each in self.settings.attributes if each in scorer.attributes or each == "TOXICITY")

    def scores_of(self, method: Method, scorer: Scorer) -> Parts:
        """The parts of the stage score."""
        key = self._generation_key | {
            "method": method.label,
            "scorer": scorer.name,
            "revision": scorer.revision,
            "attributes": list(self.attributes_of(scorer)),
        }
        return Parts(self.folder_of(method) / f"scores-{sha256_of([scorer.name, scorer.revision])[:8]}", key)

    def _scored(self, scorer: Scorer, method: Method, number: int) -> dict[str, Any]:
        records = self.records_of(method, number)
        every = [one for ones in records for one in ones]
        written = np.array([one.failure is None for one in every])
        scores = scorer.score([one.text for one in every if one.failure is None], self.attributes_of(scorer))
        shape = len(records), self.settings.n
        tables = {}
        for name in scores.attributes:
            values = np.full(len(every), FAILED)
            values[written] = scores[name]
            tables[name] = values.reshape(shape)
        return {
            "scores": {
                name: [[None if np.isnan(value) else float(value) for value in row] for row in table]
                for name, table in tables.items()
            },
            "reasons": {str(reason): count for reason, count in scores.failures.items()},
        }

    def measure(self) -> None:
        """Likelihood of the continuations, and of clean human texts under every method."""
        mine = self._mine()
        with self._progress("likelihood", len(mine) * len(self.methods)) as progress:
            for method in self.methods:
                self.likelihood_of(method).complete(
                    mine,
                    partial(self._likelihood, method),
                    progress.update,
                )
        if self.clean:
            for place in self._mine(range(len(self.methods))):
                method = self.methods[place]
                self.clean_of(method).complete([0], partial(self._forced, method))
        self.processes.wait()

    def likelihood_of(self, method: Method) -> Parts:
        """The parts of the likelihood of the continuations."""
        key = self._generation_key | {"method": method.label, "ppl_model": self.settings.ppl_model}
        return Parts(self.folder_of(method) / f"likelihood-{sha256_of(self.settings.ppl_model)[:8]}", key)

    @cached_property
    def _reader(self) -> tuple[Any, Any]:
        """The model whose perplexity is measured, and its tokenizer."""
        if self.settings.ppl_model == SELF:
            return self.model, self.tokenizer
        return load_language_model(self.settings.ppl_model, device=self.settings.device)

    def _likelihood(self, method: Method, number: int) -> dict[str, Any]:
        model, tokenizer = self._reader
        records = self.records_of(method, number)
        same = tokenizer is self.tokenizer or Fingerprint.of(tokenizer) == Fingerprint.of(self.tokenizer)
        prompts = [tokenizer(prompt.text)["input_ids"] for prompt in self.batches[number]]
        # what was generated, not what its text would be split into, where the vocabulary is the same
        texts = [
            [one.token_ids if same else tokenizer(one.text, add_special_tokens=False)["input_ids"] for one in ones]
            for ones in records
        ]
        found = prompted_nll(model, prompts, texts)
        shape = len(records), -1
        return {"nll": found.nll.reshape(shape).tolist(), "tokens": found.tokens.reshape(shape).tolist()}

    def clean_of(self, method: Method) -> Parts:
        """The part of the likelihood of clean texts."""
        texts = sha256_of(self.clean)
        return Parts(self.folder_of(method) / "clean", {"model": self.model_digest, "texts": texts})

    def _forced(self, method: Method, _: int = 0) -> dict[str, Any] | None:
        decoder = self.bound(method, _CLEAN)
        if decoder.draws > 1 or decoder.write is not None:  # it makes whole texts, and has no policy of single tokens
            return None
        prompts, texts = [prompt for prompt, _ in self.clean], [text for _, text in self.clean]
        return asdict(forced_nll(self.model, decoder.processor, prompts, texts))

    def run(self, stages: Sequence[str] = STAGES, starred: bool = True) -> str | None:
        """Run stages, in their order.

        Args:
            stages: of `STAGES`.
            starred: whether toxic words are starred in the report's examples.

        Returns:
            The report in Markdown, if it is asked for and this process writes it.
        """
        for name in ("generate", "score", "measure"):
            if name in stages:
                if self.processes.index == 0:
                    shared = f", {self.processes.count} processes" if self.processes.count > 1 else ""
                    say(f"{name}: {len(self.prompts)} prompts in {len(self.batches)} batches{shared}")
                getattr(self, name)()
        if "report" not in stages:
            return None
        from rectify.evaluation.run_report import write_report

        return write_report(self, starred) if self.processes.index == 0 else None


def _recorded(continuation: Continuation) -> dict[str, Any]:
    return {"text": continuation.text, "token_ids": continuation.token_ids, **continuation.extra}
