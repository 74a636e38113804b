"""What rectification does: toxicity, fluency and diversity of the base model and of any number of arms, in one run.

Every stage keeps its results in the output folder under a key of all that they depend on (weights by their hash), so
that a run that was killed, or is given more arms, does only what is missing.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn

from rectify.command_line import say
from rectify.errors import InvalidArgumentError
from rectify.evaluation.arms import Arm
from rectify.evaluation.fluency import continuation_nll, distinct_n, perplexity, rectified_nll
from rectify.evaluation.judging import Judge, toxicity
from rectify.evaluation.toxicity_prompts import choose, clean_texts, is_toxic, read_scored
from rectify.evaluation.weights import weights_digest
from rectify.generation.generator import Generator, shared_context
from rectify.generation.output import GenerationFile, Records, sha256_of, write_json
from rectify.generation.prompts import Prompt
from rectify.hub import load_language_model
from rectify.processor import RectificationProcessor
from rectify.q_network import DeadEndQNetwork
from rectify.risk_model import RiskModel
from rectify.sampling import Sampling
from rectify.static_risk import StaticTokenRisk
from rectify.version import __version__


@dataclass(frozen=True, kw_only=True)
class EffectSettings:
    """What is measured, and how.

    Attributes:
        model: folder, bundled name or Hub id of the language model.
        arms: the base arm first.
        q: folder, bundled name or Hub id of the Q network; needed by arms that read it.
        static: folder of a `StaticTokenRisk`; needed by arms that read it.
        prompts: the RealToxicityPrompts file.
        split, prompt_set, num_prompts: which of its prompts; `None` for all of them.
        num_return_sequences: continuations a prompt.
        max_new_tokens: tokens of every continuation, exactly; the end of text is forbidden.
        top_p: applied before the rule; the temperature is 1.
        seed: of the choice of prompts and of the samples.
        batch_size: prompts at a time.
        device: where to run.
        output_dir: folder of everything that is written.
    """

    model: str
    arms: tuple[Arm, ...]
    prompts: str
    output_dir: str
    q: str | None = None
    static: str | None = None
    split: Literal["validation", "test"] = "validation"
    prompt_set: Literal["toxic", "all"] = "toxic"
    num_prompts: int | None = None
    num_return_sequences: int = 25
    max_new_tokens: int = 20
    top_p: float = 0.9
    seed: int = 0
    batch_size: int = 16
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("num_return_sequences", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give 1 or more")
        for name in ("q", "static"):
            if getattr(self, name) is None and any(arm.risk == name for arm in self.arms):
                raise InvalidArgumentError(f"{name} is not given, and an arm reads it: give its folder")


class Effect:
    """One experiment: loads models and prompts; `report()` runs what is missing.

    Args:
        settings: what is measured.
        judge: scores the continuations.

    Raises:
        RectifyError: a model, the prompts or a setting cannot be used.
    """

    def __init__(self, settings: EffectSettings, judge: Judge) -> None:
        self.settings, self.judge = settings, judge
        sampling: dict[str, Any] = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": settings.top_p}
        Sampling(**sampling)  # refuses a bad value before anything is loaded
        scored = read_scored(settings.prompts, settings.split)
        chosen = choose(scored, settings.prompt_set, settings.num_prompts, settings.seed)
        self.model, self.tokenizer = load_language_model(settings.model, device=settings.device)
        self.risk_models: dict[str | None, RiskModel] = {}
        wanted = {arm.risk for arm in settings.arms}
        if settings.q is not None and "q" in wanted:
            self.risk_models["q"] = DeadEndQNetwork.from_pretrained(
                settings.q, device=settings.device, model=self.model
            )
        if settings.static is not None and "static" in wanted:
            self.risk_models["static"] = StaticTokenRisk.from_pretrained(settings.static, device=settings.device)
        self._sampling = sampling
        self.generator = Generator(
            self.model,
            self.tokenizer,
            Sampling.resolve(self.model.generation_config, **sampling),
            settings.max_new_tokens,
            settings.max_new_tokens,
            settings.num_return_sequences,
            settings.seed,
        )
        context = shared_context(self.model, self.risk_models.values())
        unusable = self.generator.unusable(chosen, context)
        lengths = {id(prompt): len(self._ids(prompt.text)) for prompt in chosen}
        # prompts of like length make batches with little padding
        self.prompts = sorted(
            (prompt for place, prompt in enumerate(chosen) if place not in unusable), key=lambda p: lengths[id(p)]
        )
        if not self.prompts:
            raise InvalidArgumentError(f"prompts {settings.prompts!r} leave none of the {settings.prompt_set} set")
        self.clean = self._clean(scored, context)
        names = ("model", "q", "static")
        modules = (self.model, self.risk_models.get("q"), self.risk_models.get("static"))
        self.names = {
            name: f"{getattr(settings, name)} ({weights_digest(module)})" if isinstance(module, nn.Module) else None
            for name, module in zip(names, modules, strict=True)
        }
        self.left_out = {"prompts": len(unusable), "clean_texts": len(clean_texts(scored)) - len(self.clean)}
        self.folder = Path(settings.output_dir)

    def _ids(self, text: str, special: bool = True) -> list[int]:
        return self.tokenizer(text, add_special_tokens=special)["input_ids"]  # type: ignore[return-value]

    def _clean(self, scored: list, context: int | None) -> list[tuple[list[int], list[int]]]:
        """Prompt and continuation ids of clean human texts that fit the context."""
        pairs = [(self._ids(prompt), self._ids(text, special=False)) for prompt, text in clean_texts(scored)]
        return [
            (prompt, text)
            for prompt, text in pairs
            if prompt and text and (context is None or len(prompt) + len(text) <= context)
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # Stages

    def generate(self, arm: Arm) -> tuple[Records, str]:
        """The arm's records, with the token ids of their generations, and the SHA-256 of their file."""
        settings = {
            "rectify": __version__,
            "model": self.names["model"],
            "dtype": str(self.model.dtype),
            "arm": arm.label,
            "risk": self.names[arm.risk] if arm.risk is not None else None,
            "rule": repr(arm.rule),
            "sampling": repr(self.generator.sampling),
            "new_tokens": self.settings.max_new_tokens,
            "num_return_sequences": self.settings.num_return_sequences,
            "seed": self.settings.seed,
            "batch_size": self.settings.batch_size,
            "prompts": sha256_of([prompt.text for prompt in self.prompts]),
        }
        file = GenerationFile(self.folder / f"{arm.file_name}.jsonl", settings)
        processor = self._processor(arm)

        def make(batch: list[Prompt], number: int) -> Records:
            found = self.generator.continue_batch(batch, number, processor)
            return [
                {name: prompt.record[name] for name in ("filename", "begin", "end", "prompt")}
                | {"generations": [asdict(one) for one in continuations]}
                for prompt, continuations in zip(batch, found, strict=True)
            ]

        file.complete(self.prompts, self.settings.batch_size, make, arm.label)
        content = file.path.read_bytes()
        return [json.loads(line) for line in content.splitlines()], hashlib.sha256(content).hexdigest()

    def _processor(self, arm: Arm) -> RectificationProcessor | None:
        if arm.rule is None:
            return None
        risk_model = self.risk_models[arm.risk]
        return RectificationProcessor(
            risk_model, arm.rule, model=self.model, tokenizer=self.tokenizer, **self._sampling
        )

    def judged(self, arm: Arm, records: Records, digest: str) -> list[list[float | None]]:
        """The judge's score of each generation of each record."""

        def judge() -> list[list[float | None]]:
            scores = self.judge([one["text"] for record in records for one in record["generations"]])
            n = self.settings.num_return_sequences
            return [scores[start : start + n] for start in range(0, len(scores), n)]

        key = {"generations": digest, "judge": self.judge.name}
        return _kept(self.folder / f"{arm.file_name}.judged.json", key, judge)

    def own_nll(self, arm: Arm, records: Records, digest: str) -> list[list[float]]:
        """Negative log-likelihood of each record's generations under the base model, and their tokens."""

        def measure() -> list[list[float]]:
            prompts = [self._ids(record["prompt"]["text"]) for record in records for _ in record["generations"]]
            ids = [one["token_ids"] for record in records for one in record["generations"]]
            found = continuation_nll(self.model, prompts, ids)
            shape = (len(records), -1)
            return torch.stack((found.nll.reshape(shape).sum(-1), found.tokens.reshape(shape).sum(-1)), -1).tolist()

        key = {"generations": digest, "model": self.names["model"], "dtype": str(self.model.dtype)}
        return _kept(self.folder / f"{arm.file_name}.own.json", key, measure)

    def clean_text(self, arm: Arm) -> dict[str, Any]:
        """Perplexity of clean human continuations under the arm, and how many of their tokens it cuts."""

        def measure() -> dict[str, Any]:
            prompts, texts = [prompt for prompt, _ in self.clean], [text for _, text in self.clean]
            if arm.rule is None:
                base = continuation_nll(self.model, prompts, texts)
                nll, tokens = float(base.nll.sum()), int(base.tokens.sum())
                return {"nll": nll, "base_nll": nll, "tokens": tokens, "cut": 0, "removed": 0}
            return asdict(rectified_nll(self.model, self.risk_models[arm.risk], arm.rule, prompts, texts))

        names = [self.names["model"], self.names[arm.risk] if arm.risk is not None else None]
        key = {"models": names, "dtype": str(self.model.dtype), "rule": repr(arm.rule), "texts": sha256_of(self.clean)}
        sums = _kept(self.folder / f"{arm.file_name}.clean.json", key, measure)
        tokens = sums["tokens"]
        return {
            "texts": len(self.clean),
            **sums,
            "perplexity": perplexity(sums["nll"], tokens),
            "ratio": perplexity(sums["nll"] - sums["base_nll"], tokens),
            "cut_share": sums["cut"] / tokens if tokens else math.nan,
        }

    # -----------------------------------------------------------------------------------------------------------------
    # Report

    def report(self) -> dict[str, Any]:
        """Run what is missing, and write `report.json`; figures that do not exist are `null`."""
        self.folder.mkdir(parents=True, exist_ok=True)
        arms = []
        for number, arm in enumerate(self.settings.arms, start=1):
            say(f"arm {number} of {len(self.settings.arms)}: {arm.label}")
            arms.append(self._figures(arm))
        for figures in arms:
            for name in ("toxic", "all"):
                figures[name]["own_ratio"] = figures[name]["own_perplexity"] / arms[0][name]["own_perplexity"]
            figures["distinct_2_ratio"] = figures["distinct"]["2"] / (arms[0]["distinct"]["2"] or math.nan)
        report = _without_nan({"settings": self._described(), "arms": arms})
        write_json(self.folder / "report.json", report)
        return report

    def _figures(self, arm: Arm) -> dict[str, Any]:
        records, digest = self.generate(arm)
        scores, nll = self.judged(arm, records, digest), self.own_nll(arm, records, digest)
        figures: dict[str, Any] = {
            "label": arm.label,
            "family": arm.family,
            "risk": arm.risk,
            "rule": repr(arm.rule) if arm.rule is not None else None,
            "parameter": arm.parameter,
            "value": arm.value,
            "generations_sha256": digest,
        }
        toxic = [is_toxic(prompt) for prompt in self.prompts]
        for name, members in (("toxic", toxic), ("all", [True] * len(toxic))):
            rows = [place for place, member in enumerate(members) if member]
            total, tokens = (sum(nll[row][part] for row in rows) for part in (0, 1))
            own = {"own_perplexity": perplexity(total, int(tokens)), "tokens": int(tokens)}
            figures[name] = asdict(toxicity([scores[row] for row in rows])) | own
        texts = [[one["text"] for one in record["generations"]] for record in records]
        figures["distinct"] = {str(n): distinct_n(texts, n) for n in (1, 2, 3)}
        figures["clean"] = self.clean_text(arm)
        return figures

    def _described(self) -> dict[str, Any]:
        settings = asdict(self.settings)
        del settings["arms"], settings["output_dir"]
        return settings | {
            **self.names,
            "judge": self.judge.name,
            "parameters": {name: _size(model) for name, model in [("model", self.model), *self.risk_models.items()]},
            "chosen_prompts": len(self.prompts),
            "left_out": self.left_out,
            "prompts_file_sha256": hashlib.sha256(Path(self.settings.prompts).read_bytes()).hexdigest(),
            "prompts_sha256": sha256_of([prompt.text for prompt in self.prompts]),
            "rectify": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def _size(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _kept(path: Path, key: dict[str, Any], compute: Callable[[], Any]) -> Any:
    """What was computed and written before under the same key; else it is computed and written."""
    if path.exists():
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            kept = {}
        if kept.get("key") == key:
            return kept["value"]
    value = compute()
    write_json(path, {"key": key, "value": value})
    return value


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
