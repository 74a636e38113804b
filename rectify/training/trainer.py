"""The `transformers.Trainer` of all trainings here: small checkpoints, and batches that interruptions do not change."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import nn
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from rectify.errors import RectifyError
from rectify.training.length_groups import LengthGroups


class AdapterTrainer(Trainer):
    """A `Trainer` whose checkpoints leave frozen weights out, and whose batches depend on seed and epoch alone.

    The training set keeps its encoded items, dictionaries with `input_ids`, in `items`.
    """

    frozen_but_saved: tuple[str, ...] = ()
    """Beginnings of the names of weights that training changes without a gradient."""

    def __init__(self, *, callbacks: Sequence[TrainerCallback] | None = None, **named: Any) -> None:
        super().__init__(callbacks=[*(callbacks or ()), _WholeLog()], **named)

    def train_to_end(self, checkpoint: str | None) -> dict[str, Any]:
        """Train, or go on from a checkpoint.

        Returns:
            The figures. But for times they, and `state.log_history`, are those of a training without interruption:
            `train_loss` is the mean over all steps, also over those before.
        """
        figures = dict(self.train(resume_from_checkpoint=checkpoint).metrics)
        history = self.state.log_history
        total, step = 0.0, 0.0
        for entry in history:
            if "loss" in entry:  # the mean since the entry before
                total, step = total + entry["loss"] * (entry["step"] - step), entry["step"]
        for each in (figures, *history) if step else ():
            if "train_loss" in each:
                each["train_loss"] = total / step
        self.state.log_history = [dict(sorted(entry.items())) for entry in history]  # as a checkpoint has it
        return figures

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        model = self.accelerator.unwrap_model(self.model)
        kept = self._changed_weights(model)
        weights = model.state_dict() if state_dict is None else state_dict
        super()._save(output_dir, {name: weight for name, weight in weights.items() if name in kept})

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # what is frozen is not in a checkpoint; that nothing else is missing is what matters
        lacking = self._changed_weights(cast(nn.Module, self.model)).intersection(load_result.missing_keys)
        if lacking:
            raise RectifyError(f"the checkpoint lacks {min(lacking)}: remove it, to go on from the one before")

    def _changed_weights(self, model: nn.Module) -> set[str]:
        return {
            name
            for name, weight in model.named_parameters()
            if weight.requires_grad or name.startswith(self.frozen_but_saved)
        }

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Any:
        return SequentialSampler(cast(Any, eval_dataset))  # sorted by length already

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        lengths = [len(item["input_ids"]) for item in cast(Any, self.train_dataset).items]
        seed = self.args.data_seed if self.args.data_seed is not None else self.args.seed
        return LengthGroups(lengths, self.args.train_batch_size, seed)


class _WholeLog(TrainerCallback):
    """Logs at each checkpoint and at the end: what was summed up since the last entry is in no checkpoint."""

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **_: Any) -> None:
        control.should_log |= control.should_save or control.should_training_stop

    on_epoch_end = on_step_end


class ModelTraining(nn.Module):
    """A loss around a model of transformers, in the form that the Trainer expects."""

    def activation_checkpointing_enable(self, **settings: Any) -> None:
        """Called by the Trainer for `--gradient_checkpointing`."""
        self._save_memory("activation_checkpointing_enable", settings)

    def gradient_checkpointing_enable(self, **settings: Any) -> None:
        """The same, as older versions of transformers call it."""
        self._save_memory("gradient_checkpointing_enable", settings)

    def _save_memory(self, name: str, settings: dict[str, Any]) -> None:
        model = next((module for module in self.modules() if isinstance(module, PreTrainedModel)), None)
        if model is not None:  # the trunk that a Q network shares is no part of it, and not trained
            getattr(model, name)(**settings)
            model.enable_input_require_grads()  # what is before an adapter is frozen, and has no gradient


def use_fast_attention(model: PreTrainedModel, arguments: TrainingArguments) -> None:
    """On a CPU in bfloat16, switch to plain attention: there the fused one's backward pass takes a quarter of the time
    of a small model's training."""
    if arguments.bf16 and arguments.device.type == "cpu":
        model.set_attn_implementation("eager")


def run_record(trainer: Trainer) -> dict[str, Any]:
    """What a finished training was run with, for the record beside its weights."""
    arguments = trainer.args
    return {
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "learning_rate": arguments.learning_rate,
        "seed": arguments.seed,
    }
