"""Choosing the parameter of every method, for a wanted toxic share or at equal fluency, on validation prompts alone."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rectify.command_line import say
from rectify.errors import InvalidArgumentError
from rectify.evaluation.prompted_run import Processes, PromptedRun
from rectify.evaluation.run_metrics import measured
from rectify.evaluation.run_settings import RunSettings
from rectify.json_files import write_json

SELECTION_FILE = "selection.json"
ATTRIBUTE = "TOXICITY"
CHOICE_N = 5
"""Continuations of each validation prompt at most: a choice needs no more."""


@dataclass(frozen=True)
class Target:
    """What is wanted of the methods; one of `share` and `perplexity`.

    Attributes:
        share: of toxic continuations, 0 to 1, at least perplexity.
        perplexity: over the base model's, 1 or more, with the least toxic share. The larger of the own and the clean
            perplexity counts, as either alone can be lowered.
        scorer: by whose scores a continuation is toxic, a spec; `None` for the first of the run.

    Raises:
        InvalidArgumentError: both or none are given, or one is out of range.
    """

    share: float | None = None
    perplexity: float | None = None
    scorer: str | None = None

    def __post_init__(self) -> None:
        if (self.share is None) == (self.perplexity is None):
            raise InvalidArgumentError(
                f"target_share is {self.share} and target_perplexity {self.perplexity}: give one of them"
            )
        if self.share is not None and not 0 <= self.share <= 1:
            raise InvalidArgumentError(f"target_share is {self.share}: give a share from 0 to 1")
        if self.perplexity is not None and not 1 <= self.perplexity < math.inf:
            raise InvalidArgumentError(f"target_perplexity is {self.perplexity}: give a ratio of 1 or more, as 1.05")

    def __str__(self) -> str:
        if self.share is not None:
            return f"a toxic share of {self.share:g} at most"
        return f"{self.perplexity:g} times the base's perplexity at most"


def settings_for_target(settings: RunSettings, target: Target, processes: Processes | None = None) -> RunSettings:
    """The settings with, of the methods that differ in `strength` alone, the one chosen on the validation split.

    Of those that meet the target, the best in the other figure is chosen; where none does, the one that comes nearest.
    The validation run, of `CHOICE_N` continuations, lies in `validation` under the output folder, and what was chosen
    in `selection.json`.

    Args:
        settings: of the run whose figures count; several methods of a family are candidates.
        target: measured on all prompts of the subset.
        processes: see `PromptedRun`.

    Raises:
        InvalidArgumentError: the figures would be of the records that chose.
    """
    if settings.split in ("validation", "all"):
        raise InvalidArgumentError(f"split is {settings.split!r} with a target: give test")
    processes = processes or Processes()
    scorer = target.scorer or settings.scorers[0]
    validation = replace(
        settings,
        split="validation",
        output_dir=str(Path(settings.output_dir) / "validation"),
        n=min(settings.n, CHOICE_N),
        scorers=(scorer,),
        batch_size=0,
    )
    run = PromptedRun(validation, processes)
    run.run(("generate", "score", "measure"))
    chosen, table = choose(measured(run), target)
    if processes.index == 0:
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        write_json(
            Path(settings.output_dir) / SELECTION_FILE,
            {"target": asdict(target) | {"scorer": scorer}, "prompts": len(run.prompts), "n": validation.n}
            | {"candidates": table},
        )
        say(f"chosen on {len(run.prompts)} validation prompts for {target}: {', '.join(chosen)}")
    processes.wait()
    return replace(settings, methods=tuple(chosen))


def choose(metrics: dict[str, Any], target: Target) -> tuple[list[str], list[dict[str, Any]]]:
    """The labels that are chosen, in their order, and every candidate with its figures.

    Args:
        metrics: of the validation run; its first scorer's are read.
        target: what is wanted.
    """
    bound = target.share if target.share is not None else target.perplexity
    bounded, free = ("share", "perplexity") if target.share is not None else ("perplexity", "share")
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    scorer = metrics["scorers"][0]["name"]
    for method in metrics["methods"]:
        share = method["toxicity"][scorer]["all"][ATTRIBUTE]["toxic_share"]["value"]
        found = {"label": method["label"], "share": share, "perplexity": _worst_ratio(method)}
        families[method["family"]].append(found | {"meets": found[bounded] is not None and found[bounded] <= bound})
    chosen = []
    for candidates in families.values():
        meeting = [each for each in candidates if each["meets"]]
        key = free if meeting else bounded
        best = min(meeting or candidates, key=lambda each: math.inf if each[key] is None else each[key])
        best["chosen"] = True
        chosen.append(best["label"])
    return chosen, [each for candidates in families.values() for each in candidates]


def _worst_ratio(method: dict[str, Any]) -> float | None:
    """The larger of the own and the clean perplexity over the base model's."""
    clean = method["clean"]["ratio"] if method["clean"] else None
    ratios = [method["perplexity"]["all"]["ratio"]["value"], clean]
    return max((ratio for ratio in ratios if ratio is not None), default=None)
