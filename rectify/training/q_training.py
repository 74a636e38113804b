"""From trajectories to a trained, measured and saved dead-end Q network."""

from __future__ import annotations

import hashlib
import logging
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import (
    AutoModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainingArguments,
    set_seed,
)

from rectify.context import context_length
from rectify.errors import InvalidArgumentError, RectifyError, first_line
from rectify.heads import LowRankHead
from rectify.hub import current_fingerprint, load_language_model, model_place
from rectify.json_files import write_json
from rectify.pretrained import read_model, read_tokenizer, refusing_unusable
from rectify.q_network import CONFIG_FILE, DeadEndQNetwork
from rectify.quiet_peft import LoraConfig
from rectify.splits import alike, first_words, split_by_hash
from rectify.static_risk import StaticTokenRisk
from rectify.strength import no_better_than_constant
from rectify.training.hidden_states import CachedStates
from rectify.training.plots import plot_training
from rectify.training.q_arguments import DataArguments, LossArguments, ModelArguments
from rectify.training.q_calibration import recalibrate
from rectify.training.q_metrics import compute_metrics, network_risks, value_metrics
from rectify.training.q_strength import choose_strength, generating_model, static_risks, warning_of
from rectify.training.q_trainer import PolyakCallback, QLearning, QTrainer
from rectify.training.running import RESULTS_FILE, checkpoint_to_resume
from rectify.training.trainer import use_fast_attention
from rectify.training.trajectory_data import Trajectory, TrajectoryDataset, collate, read_trajectories

logger = logging.getLogger(__name__)

_LEAST_RISK = 1e-3


def train_q_network(
    model: ModelArguments, data: DataArguments, loss: LossArguments, arguments: TrainingArguments
) -> dict[str, Any]:
    """Train a Q network on trajectory files and save it to `arguments.output_dir`.

    The folder gets the network, `all_results.json` and, with the extra `[plots]`, `training.png`. Run again after an
    interruption it goes on from the last checkpoint and ends with the same network.

    Returns:
        The figures: TD loss, those of `q_metrics.value_metrics` of the final network on the validation trajectories
        (computed, and returned, in the first process alone), and counts; `warning` where it predicts no better than
        what knows no text; and the `strength` that was stored with it, or why there is none, `no_strength`.

    Raises:
        InvalidArgumentError: the folder holds another training.
        TrajectoryError: a file cannot be used.
        CheckpointError: a model cannot be loaded.
        VocabularyMismatchError: the behaviour model has another vocabulary.
    """
    # what the collator and `QLearning` pass to each other
    arguments.remove_unused_columns, arguments.label_names = False, ["labels"]
    settings = {**asdict(model), **asdict(data), **asdict(loss)}
    fingerprint = current_fingerprint(model.model_name_or_path)
    checkpoint = checkpoint_to_resume(
        arguments, CONFIG_FILE, **settings, files=_digests(data), base_fingerprint=fingerprint
    )
    train, validation = _splits(data)
    set_seed(arguments.seed)
    trunk, tokenizer = _load_trunk(model)
    use_fast_attention(trunk, arguments)
    block_size = min(data.block_size, context_length(trunk.config) or data.block_size)
    how: dict[str, Any] = {"append_eos": data.append_eos, "ignore_prompt": data.ignore_prompt}
    train_set = TrajectoryDataset(train, tokenizer, block_size, **how)
    validation_set = TrajectoryDataset(validation, tokenizer, block_size, **how)
    validation_set.items.sort(key=lambda item: -len(item["input_ids"]))  # batches of nearly equal length
    for name, part in (("training", train_set), ("validation", validation_set)):
        logger.info("%s: %d trajectories, %d cut, %d too short", name, len(part), part.truncated, part.too_short)
        if not len(part):
            raise InvalidArgumentError(f"no {name} trajectory has a token to learn from: give other files")
    network = _new_network(model, trunk, tokenizer, train_set.base_rate)
    table = StaticTokenRisk.fit(*train_set.columns, network.config.vocab_size)
    cast(LowRankHead, network.head).start_from_token_risks(table.risk.clamp(_LEAST_RISK, 1 - _LEAST_RISK))
    returns = {"td_lambda": loss.td_lambda, "gamma": loss.gamma, "q_min": loss.q_min, "q_max": loss.q_max}
    learning = QLearning(network, **returns, loss=loss.loss, behavior_model=_behavior_model(loss, network))
    states: dict[str, CachedStates] = {}
    if model.trunk == "shared":
        cast(nn.Module, network.trunk).to(arguments.device)
        key = str([model.model_name_or_path, network.config.base_fingerprint, *_digests(data), block_size, how])
        with arguments.main_process_first(local=False):
            for name, part in (("train", train_set), ("validation", validation_set)):
                file = Path(str(arguments.output_dir)) / f"states-{name}.bin"
                size = arguments.per_device_eval_batch_size
                states[name] = CachedStates(network, part, file, key, size, not arguments.disable_tqdm)
    trainer = QTrainer(
        model=learning,
        args=arguments,
        train_dataset=states.get("train", train_set),
        eval_dataset=states.get("validation", validation_set),
        data_collator=collate,
        compute_metrics=cast(Any, compute_metrics),
        callbacks=[PolyakCallback(loss.polyak_update_lr)],
    )
    trainer.train_to_end(checkpoint)
    figures: dict[str, Any] = {"train_trajectories": len(train_set), "truncated": train_set.truncated}
    figures |= {"steps": trainer.state.global_step, "eval_loss": trainer.evaluate()["eval_loss"]}
    if trainer.is_fsdp_enabled:  # the shards of all processes make one network
        weights = trainer.accelerator.get_state_dict(trainer.model)
        network = _new_network(model, *_load_trunk(model), train_set.base_rate)
        QLearning(network).load_state_dict(weights, strict=False)
    if trainer.is_world_process_zero():
        if data.calibration_file:
            rollouts = TrajectoryDataset(read_trajectories(data.calibration_file), tokenizer, block_size, **how)
            figures["calibration_scale"], figures["calibration_shift"] = recalibrate(network, rollouts.items)
        risks, toxic = network_risks(network, validation_set.items)
        figures |= {f"eval_{name}": value for name, value in value_metrics(risks, toxic).items()}
        static = value_metrics(static_risks(table, validation_set.items, risks), toxic).get("brier", math.nan)
        figures["eval_brier_static"] = static
        warning = warning_of({name.removeprefix("eval_"): value for name, value in figures.items()}, static)
        figures = {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}
        folder = Path(str(arguments.output_dir))
        network.config.training = {**settings, "seed": arguments.seed, **figures}
        figures["warning"] = warning
        if model.strength_model != "none":
            name = model.strength_model or generating_model(data.train_file, model.model_name_or_path)
            try:
                if no_better_than_constant(figures, "eval_"):
                    raise InvalidArgumentError("at any strength it would change texts for nothing; see the warning")
                network.config.strength = choose_strength(network, name, validation_set.items)
                figures["strength"] = asdict(network.config.strength)
            except RectifyError as error:
                figures["no_strength"] = first_line(error)
        if plot_training(trainer.state.log_history, risks, toxic, folder / "training.png"):
            logger.info("curves: %s", folder / "training.png")
        write_json(folder / RESULTS_FILE, figures)
        network.save_pretrained(folder)
        for cached in states.values():
            cached.remove()
    trainer.accelerator.wait_for_everyone()
    return figures


def _behavior_model(loss: LossArguments, network: DeadEndQNetwork) -> PreTrainedModel | None:
    if loss.behavior_model is None:
        return None
    model, tokenizer = load_language_model(loss.behavior_model)
    if network.config.vocabulary is not None:
        network.config.vocabulary.check(tokenizer)
    return model


def _digests(data: DataArguments) -> list[str]:
    """The content of the files, so that a run is not continued with other trajectories."""
    files = [*data.train_file, *data.validation_file, *data.calibration_file]
    return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files if Path(file).is_file()]


def _splits(data: DataArguments) -> tuple[list[Trajectory], list[Trajectory]]:
    """Training and validation trajectories; those of one prompt stay together, also where only whole texts are told."""
    everything = read_trajectories(data.train_file)
    if data.validation_file:
        validation = read_trajectories(data.validation_file)
        learnt = {alike(one.prompt or one.continuation) for one in everything}
        known = sum(alike(one.prompt or one.continuation) in learnt for one in validation)
        if known:
            logger.info("validation: %d trajectories have a prompt, or are a text, that training has too", known)
        return everything, validation
    share = data.validation_split_percentage / 100
    beginnings = iter(first_words([one.continuation for one in everything if not one.prompt]))
    keys = [one.prompt or next(beginnings) for one in everything]
    parts = split_by_hash(range(len(everything)), share, keys.__getitem__)
    train, validation = ([everything[place] for place in part] for part in parts)
    return train, validation


def _load_trunk(model: ModelArguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    name = model.model_name_or_path
    place = model_place(name)
    with refusing_unusable(f"model_name_or_path {name!r}", "give a causal language model with its tokenizer"):
        tokenizer = read_tokenizer(model_place(model.tokenizer_name) if model.tokenizer_name else place)
        trunk, _ = read_model(AutoModel, place, dtype=torch.float32)
    return trunk, tokenizer


def _new_network(
    model: ModelArguments, trunk: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, base_rate: float
) -> DeadEndQNetwork:
    adapter = None
    if model.lora_r:
        adapter = LoraConfig(
            r=model.lora_r,
            lora_alpha=model.lora_alpha or 2 * model.lora_r,
            target_modules="all-linear",
            base_model_name_or_path=model.model_name_or_path,
        )
    return DeadEndQNetwork.from_trunk(
        trunk,
        adapter=adapter,
        shared=model.trunk == "shared",
        name=model.model_name_or_path,
        tokenizer=tokenizer,
        rank=model.rank,
        mlp_size=model.mlp_size,
        base_rate=base_rate,
    )
