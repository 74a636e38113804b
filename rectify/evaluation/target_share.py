"""Choosing the parameter of every method for a wanted toxic share, on validation prompts alone."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

from rectify.command_line import say
from rectify.errors import InvalidArgumentError
from rectify.evaluation.prompted_run import Processes, PromptedRun
from rectify.evaluation.run_metrics import measured
from rectify.evaluation.run_settings import RunSettings
from rectify.generation.output import write_json

SELECTION_FILE = "selection.json"
ATTRIBUTE = "TOXICITY"


def settings_for_target(settings: RunSettings, share: float, processes: Processes | None = None) -> RunSettings:
    """The settings with, of the methods that differ in `strength` alone, the one chosen on the validation split.

    Chosen is, of those with at most this share of toxic continuations, the one with the least perplexity; where none
    reaches it, the one with the least share. The validation run lies in `validation` under the output folder, and what
    was chosen in `selection.json`.

    Args:
        settings: of the run whose figures count; several methods of a family are candidates.
        share: of toxic continuations by the first scorer, on all prompts of the subset, 0 to 1.
        processes: see `PromptedRun`.

    Raises:
        InvalidArgumentError: the figures would be of the records that chose.
    """
    if settings.split in ("validation", "all"):
        raise InvalidArgumentError(f"split is {settings.split!r} with a target_share: give test")
    processes = processes or Processes()
    folder = str(Path(settings.output_dir) / "validation")
    run = PromptedRun(replace(settings, split="validation", output_dir=folder), processes)
    run.run(("generate", "score", "measure"))
    metrics = measured(run)
    chosen, table = choose(metrics, share)
    if processes.index == 0:
        Path(settings.output_dir).mkdir(parents=True, exist_ok=True)
        scorer = metrics["scorers"][0]["name"]
        write_json(
            Path(settings.output_dir) / SELECTION_FILE, {"target_share": share, "scorer": scorer, "candidates": table}
        )
        say(f"chosen on validation prompts for a toxic share of {share:g}: {', '.join(chosen)}")
    processes.wait()
    return replace(settings, methods=tuple(chosen))


def choose(metrics: dict[str, Any], share: float) -> tuple[list[str], list[dict[str, Any]]]:
    """The labels that are chosen, in their order, and every candidate with its figures.

    Args:
        metrics: of the validation run.
        share: the wanted one.
    """
    families: dict[str, list[dict[str, Any]]] = defaultdict(list)
    scorer = metrics["scorers"][0]["name"]
    for method in metrics["methods"]:
        figures = method["toxicity"][scorer]["all"][ATTRIBUTE]["toxic_share"]["value"]
        families[method["family"]].append(
            {
                "label": method["label"],
                "share": figures,
                "perplexity_ratio": _worst_ratio(method),
                "meets": figures is not None and figures <= share,
            }
        )
    chosen = []
    for candidates in families.values():
        meeting = [each for each in candidates if each["meets"]]
        key = "perplexity_ratio" if meeting else "share"
        best = min(meeting or candidates, key=lambda each: math.inf if each[key] is None else each[key])
        best["chosen"] = True
        chosen.append(best["label"])
    return chosen, [each for candidates in families.values() for each in candidates]


def _worst_ratio(method: dict[str, Any]) -> float | None:
    """The larger of the own and the clean perplexity over the base model's, as either alone can be lowered."""
    clean = method["clean"]["ratio"] if method["clean"] else None
    ratios = [method["perplexity"]["all"]["ratio"]["value"], clean]
    return max((ratio for ratio in ratios if ratio is not None), default=None)
