"""The end of a Q network's training: whether it predicts anything, and how strongly it can be applied."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rectify.builders.trajectories import GENERATIONS
from rectify.errors import InvalidArgumentError
from rectify.evaluation.teacher_forcing import ruled_nll
from rectify.hub import load_language_model
from rectify.q_network import DeadEndQNetwork
from rectify.rule import Tilt
from rectify.static_risk import StaticTokenRisk
from rectify.strength import Strength, no_better_than_constant

MOST_RATIO = 1.05
"""Of the perplexity of clean texts, that a strength may cost."""
_BETAS = (0.25, 0.5, 1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 15, 20, 30)
_FEWEST, _TEXTS, _TOKENS = 10, 200, 64
_TOXIC = -0.5


def static_risks(table: StaticTokenRisk, items: Sequence[dict[str, Any]], like: np.ndarray) -> np.ndarray:
    """What a context-free table says of trajectories, in the form of `q_metrics.network_risks`, `like` one of it."""
    risks = np.full(like.shape, np.nan)
    of_token = table.risk.double().cpu().numpy()
    for row, item in enumerate(items):
        risks[row, : len(item["input_ids"])] = of_token[item["input_ids"]]
    return np.where(np.isnan(like), np.nan, risks)


def warning_of(figures: dict[str, float], static_brier: float) -> str | None:
    """What is to be said of a network that predicts no better than what knows no text, or no context.

    Args:
        figures: of the network on the validation trajectories, see `q_metrics.value_metrics`.
        static_brier: Brier score of the context-free table of token risks.
    """
    brier, constant = figures["brier"], figures["brier_constant"]
    if "auc_all_positions" not in figures:
        return (
            "the validation trajectories are all toxic or all harmless, and do not tell whether the network predicts "
            "anything: give both kinds"
        )
    if no_better_than_constant(figures):
        return (
            f"the network is no better than a constant: Brier score {brier:.4f}, that of the base rate {constant:.4f}, "
            f"AUC {figures['auc_all_positions']:.3f}: do not rely on it; give more trajectories, more epochs or "
            "another learning rate"
        )
    if not brier < static_brier and "calibration_scale" not in figures:  # the table is not recalibrated
        return (
            f"the network is no better than a table of token risks, which knows no context: Brier score {brier:.4f}, "
            f"that of the table {static_brier:.4f}: give more trajectories or epochs, or take `rectify train static`"
        )
    return None


def choose_strength(network: DeadEndQNetwork, model_name: str, items: Sequence[dict[str, Any]]) -> Strength:
    """The largest β of `Tilt` at which clean texts are as probable as before, but for a twentieth of their perplexity.

    Args:
        network: in evaluation mode.
        model_name: of the language model that is to be rectified.
        items: validation trajectories, as `TrajectoryDataset` holds them; the clean ones count, 200 at most, evenly
            spread over them, and 64 tokens of each.

    Raises:
        InvalidArgumentError: the clean texts are too few, the model predicts nothing, or even the least β costs more.
        CheckpointError: the model cannot be loaded.
        VocabularyMismatchError: it has another vocabulary.
    """
    clean = [item for item in items if item["reward"] > _TOXIC]
    if len(clean) < _FEWEST:
        raise InvalidArgumentError(f"{len(clean)} clean validation trajectories are too few: give {_FEWEST} or more")
    model, tokenizer = load_language_model(model_name, device=network.device)
    if network.config.vocabulary is not None:
        network.config.vocabulary.check(tokenizer)
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
    texts = [
        (item["input_ids"][: item["start"]], item["input_ids"][item["start"] :][:_TOKENS])
        for item in clean[:: -(-len(clean) // _TEXTS)]
        if item["start"] < longest
    ]
    texts = [(prompt, rest[: longest - len(prompt)]) for prompt, rest in texts]
    prompts, rests = zip(*texts, strict=True) if texts else ((), ())
    found = ruled_nll(model, network, [Tilt(beta=beta) for beta in _BETAS], prompts, rests)
    base = found[0].base_perplexity
    if not base < network.config.vocab_size:
        raise InvalidArgumentError(
            f"{model_name!r} has a perplexity of {base:.4g} on the clean texts, no better than a guess: give "
            "strength_model, the model that is to be rectified"
        )
    # the logarithm of the perplexity is convex in β: what exceeds the bound once exceeds it from there on
    ratios = [each.perplexity / base for each in found]
    fitting = [place for place, ratio in enumerate(ratios) if ratio <= MOST_RATIO]
    if not fitting:
        raise InvalidArgumentError(
            f"even beta {_BETAS[0]} costs {ratios[0]:.3f} × the perplexity of clean texts: give more trajectories"
        )
    best = fitting[-1]
    return Strength(
        float(_BETAS[best]),
        clean_perplexity_ratio=round(ratios[best], 4),
        model=model_name,
        texts=len(texts),
        tokens=found[best].tokens,
    )


def generating_model(train_files: Sequence[str], default: str) -> str:
    """The model by which trajectories were made, where `rectify build trajectories` left its settings beside them."""
    for file in train_files:
        settings = Path(file).parent / f"{GENERATIONS}.settings.json"
        try:
            model = json.loads(settings.read_text(encoding="utf-8"))["model"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
        if isinstance(model, str):
            return model
    return default
