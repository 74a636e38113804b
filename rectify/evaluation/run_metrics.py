"""From the parts of a run to its figures: what `metrics.json` holds."""

from __future__ import annotations

import math
import shlex
import sys
from collections import Counter, defaultdict
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
import transformers

from rectify.errors import InvalidArgumentError
from rectify.evaluation.fluency import ForcedLikelihood, distinct_n
from rectify.evaluation.intervals import (
    Bootstrap,
    Estimate,
    expected_maximum,
    mean_perplexity,
    repetition,
    total_perplexity,
    toxic_share,
    toxicity_probability,
)
from rectify.evaluation.prompted_run import FAILED, PromptedRun
from rectify.evaluation.run_settings import SELF
from rectify.evaluation.toxicity_prompts import TOXIC, prompt_toxicity
from rectify.evaluation.weights import Provenance, networks_of
from rectify.generation.generator import Continuation
from rectify.json_files import file_sha256, sha256_of, without_undefined
from rectify.methods.method import Method
from rectify.scoring.scores import Scorer
from rectify.version import __version__

_BINS = 20


class _Made:
    """Everything that was made for a method, in the order of the prompts."""

    def __init__(self, run: PromptedRun, method: Method) -> None:
        numbers = range(len(run.batches))
        self.parts = list(run.generations_of(method).read(numbers))
        self.records: list[list[Continuation]] = [ones for number in numbers for ones in run.records_of(method, number)]
        likelihood = list(run.likelihood_of(method).read(numbers))
        self.nll, self.tokens = (
            np.array([row for part in likelihood for row in part[name]], dtype=np.float64) for name in ("nll", "tokens")
        )
        self.clean = next(iter(run.clean_of(method).read([0]))) if run.clean else None
        self.scores: dict[str, dict[str, np.ndarray]] = {}

    def read_scores(self, run: PromptedRun, method: Method, scorer: Scorer) -> None:
        parts = list(run.scores_of(method, scorer).read(range(len(run.batches))))
        self.scores[scorer.name] = {
            attribute: np.array(
                [
                    [math.nan if value is None else value for value in row]
                    for part in parts
                    for row in part["scores"][attribute]
                ]
            )
            for attribute in run.attributes_of(scorer)
        }

    def speeds(self) -> np.ndarray:
        """Seconds a generated token of each batch."""
        return np.array(
            [
                part["seconds"]
                / max(1, sum(len(one["token_ids"]) for record in part["records"] for one in record["generations"]))
                for part in self.parts
            ]
        )


def measured(run: PromptedRun) -> dict[str, Any]:
    """All figures of a run whose stages are done; those that are undefined are `None`.

    Raises:
        InvalidArgumentError: a stage is not done, or prompts lack scores and `allow_missing` is not set.
    """
    settings = run.settings
    scorers = [run.scorer(spec) for spec in settings.scorers]
    made = {method: _Made(run, method) for method in run.methods}
    for method, one in made.items():
        for scorer in scorers:
            one.read_scores(run, method, scorer)
    if not settings.allow_missing:
        _check_complete(made, scorers)
    subsets = _subsets(run)
    bootstraps = {name: Bootstrap(len(rows), settings.resamples, settings.seed) for name, rows in subsets.items()}
    base = made[run.methods[0]]
    figures = [_figures(run, method, made[method], base, scorers, subsets, bootstraps) for method in run.methods]
    return without_undefined(
        {
            "settings": _described(run),
            "scorers": [{"name": scorer.name, "revision": scorer.revision} for scorer in scorers],
            "attributes": list(settings.attributes),
            "warnings": [*_warnings(run, scorers), *_failures(made)],
            "methods": figures,
            "maxima": {
                scorer.name: {
                    method.label: _histogram(made[method].scores[scorer.name]["TOXICITY"]) for method in run.methods
                }
                for scorer in scorers
            },
        }
    )


def _check_complete(made: dict[Method, _Made], scorers: list[Scorer]) -> None:
    for method, one in made.items():
        for scorer in scorers:
            lacking = int(np.isnan(one.scores[scorer.name]["TOXICITY"]).any(-1).sum())
            if lacking:
                raise InvalidArgumentError(
                    f"{lacking} prompts of method {method.label!r} have fewer scores by {scorer.name!r} than "
                    "continuations: score again, or pass --allow_missing to report them by the scores that they have"
                )


def _subsets(run: PromptedRun) -> dict[str, np.ndarray]:
    """The rows of all prompts, of the toxic and of the other scored ones; those that are empty are left out."""
    toxicity = np.array([math.nan if (known := prompt_toxicity(one)) is None else known for one in run.prompts])
    members = {"all": np.full(len(toxicity), True), "toxic": toxicity >= TOXIC, "nontoxic": toxicity < TOXIC}
    return {name: np.flatnonzero(rows) for name, rows in members.items() if rows.any()}


def _figures(
    run: PromptedRun,
    method: Method,
    one: _Made,
    base: _Made,
    scorers: list[Scorer],
    subsets: dict[str, np.ndarray],
    bootstraps: dict[str, Bootstrap],
) -> dict[str, Any]:
    speed, against = one.speeds(), base.speeds()
    return {
        "label": method.label,
        "name": method.name,
        "family": method.family,
        "strength": method.strength,
        "value": method.value,
        "source": method.source,
        "reads_parameters": run.provenance_of(method).parameters,
        "toxicity": {
            scorer.name: {
                name: {
                    attribute: _toxicity(table[rows], base.scores[scorer.name][attribute][rows], bootstraps[name])
                    for attribute, table in one.scores[scorer.name].items()
                }
                for name, rows in subsets.items()
            }
            for scorer in scorers
        },
        "perplexity_model": run.settings.ppl_model,
        "perplexity": {name: _perplexity(one, base, rows, bootstraps[name]) for name, rows in subsets.items()},
        "clean": _clean(run, one.clean),
        "diversity": {name: _diversity(one, rows) for name, rows in subsets.items()},
        "time": {"ms_per_token": float(np.median(speed)) * 1e3, "ratio": float(np.median(speed / against))},
        "decisions": _decisions(one),
    }


def _toxicity(scores: np.ndarray, base: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    found: dict[str, Any] = {
        "prompts": int((~np.isnan(scores)).any(-1).sum()),
        "continuations": scores.size,
        "failures": int(np.isnan(scores).sum()),
    }
    for name, measure in (
        ("expected_maximum", expected_maximum),
        ("toxicity_probability", toxicity_probability),
        ("toxic_share", toxic_share),
    ):
        found[name] = asdict(bootstrap.estimate(measure(scores)))
        found[f"{name}_change"] = asdict(bootstrap.change(measure(scores), measure(base)))
    return found


def _perplexity(one: _Made, base: _Made, rows: np.ndarray, bootstrap: Bootstrap) -> dict[str, Any]:
    ratio, against = (total_perplexity(each.nll[rows], each.tokens[rows]) for each in (one, base))
    found: Estimate = bootstrap.estimate(ratio)
    return asdict(found) | {
        "ratio": asdict(bootstrap.over_base(ratio, against)),
        "mean_of_continuations": mean_perplexity(one.nll[rows], one.tokens[rows]),
        "tokens": int(one.tokens[rows].sum()),
    }


def _clean(run: PromptedRun, sums: dict[str, Any] | None) -> dict[str, Any] | None:
    if sums is None:
        return None
    found = ForcedLikelihood(**sums)
    return {
        "perplexity": found.perplexity,
        "ratio": found.perplexity / found.base_perplexity,
        "cut_share": found.cut_share,
        "removed": found.removed,
        "texts": len(run.clean),
        "tokens": found.tokens,
    }


def _diversity(one: _Made, rows: np.ndarray) -> dict[str, Any]:
    records = [one.records[row] for row in rows]
    texts = [[each.text for each in ones] for ones in records]
    every = [each for ones in records for each in ones]
    repeated, total = repetition([each.token_ids for each in every])
    return {
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
        "mean_length": float(np.mean([len(each.token_ids) for each in every])),
        "empty": float(np.mean([not each.text.strip() for each in every])),
        "failed": float(np.mean([each.failure is not None for each in every])),
        "repetition": repeated / total if total else math.nan,
    }


def _decisions(one: _Made) -> dict[str, Any] | None:
    counts = [part["statistics"] for part in one.parts]
    if not counts or counts[0] is None:
        return None
    sums = {name: sum(count.get(name, 0) for count in counts) for name in counts[0]}  # older parts counted less
    decisions = max(1, sums["decisions"])
    return sums | {"capped_per_decision": sums["capped"] / decisions, "moved": sums["moved"] / decisions}


def _histogram(scores: np.ndarray) -> list[int]:
    """How many prompts have their highest score in each of equal bins from 0 to 1."""
    known = scores[~np.isnan(scores).all(-1)]
    highest = np.nanmax(known, axis=-1) if len(known) else np.empty(0)
    return np.histogram(highest, _BINS, (0, 1))[0].tolist()


def _described(run: PromptedRun) -> dict[str, Any]:
    settings = asdict(run.settings)
    for name in ("methods", "output_dir", "attributes", "scorers"):
        del settings[name]
    return settings | {
        "model_weights": run.model_digest,
        "model_parameters": sum(each.numel() for each in run.model.parameters()),
        "dtype": str(run.model.dtype).removeprefix("torch."),
        "batch_size": run.batch_size,
        "prompts_file_sha256": file_sha256(run.settings.prompts),
        "prompts_sha256": sha256_of([prompt.key for prompt in run.prompts]),
        "num_prompts": len(run.prompts),
        "left_out": run.left_out,
        "sampling": repr(run.generator.sampling),
        "ppl_model": "the generating model itself" if run.settings.ppl_model == SELF else run.settings.ppl_model,
        "rule": f"toxic at a score ≥ {TOXIC}",
        "command": shlex.join(sys.argv),
        "versions": {
            "rectify": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "peft": version("peft"),
        },
    }


def _warnings(run: PromptedRun, scorers: list[Scorer]) -> list[str]:
    """Where a scorer shares weights or training files with a method or with the model."""
    found = []
    others = [(f"the method {method.label}", run.provenance_of(method)) for method in run.methods]
    others.append(("the model", Provenance.of([run.model])))
    for scorer in scorers:
        own = Provenance.of(networks_of(scorer))
        shares: dict[str, list[str]] = defaultdict(list)
        for name, other in others:
            if what := own.shared_with(other):
                shares[what].append(name)
        found += [
            f"{scorer.name} shares {what} with {', '.join(names)}: its scores may flatter"
            for what, names in shares.items()
        ]
    return found


def _failures(made: dict[Method, _Made]) -> list[str]:
    """What of the continuations the methods failed to write, by reason."""
    found = []
    for method, one in made.items():
        every = [each.failure for ones in one.records for each in ones]
        reasons = Counter(reason for reason in every if reason is not None)
        if reasons:
            said = "; ".join(f"{count} times, {reason}" for reason, count in reasons.most_common())
            found.append(
                f"{method.label} failed to write {reasons.total() / len(every):.1%} of its continuations, each of "
                f"which counts as toxic with a score of {FAILED:g}: {said}"
            )
    return found
