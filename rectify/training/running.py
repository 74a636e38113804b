"""What every training does around `transformers.Trainer`: refuse a foreign folder, and go on after a kill."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from rectify.errors import InvalidArgumentError
from rectify.json_files import read_object, write_json

SETTINGS_FILE = "run_settings.json"
RESULTS_FILE = "all_results.json"
"""Figures of a training; its last file, so that one that is there says that the training is finished."""

# what may differ between a run and the one that continues it
_FREE = {
    "output_dir",
    "logging_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "resume_from_checkpoint",
    "local_rank",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "eval_strategy",
    "eval_steps",
    "save_steps",
    "save_strategy",
    "save_total_limit",
    "logging_steps",
    "logging_strategy",
    "log_level",
    "per_device_eval_batch_size",
}


def checkpoint_to_resume(arguments: TrainingArguments, finished: str, **settings: Any) -> str | None:
    """The checkpoint from which a run goes on, or `None` for a new run; call it before training.

    `OUTPUT_DIR/run_settings.json` holds what determines the result, so that a run of other settings is refused.
    A checkpoint that was cut off while it was written is passed over.

    Args:
        arguments: of the Trainer; its `resume_from_checkpoint` names a checkpoint to start from instead.
        finished: the file that a finished run leaves in `output_dir`.
        **settings: what else the result depends on, as JSON values.

    Raises:
        InvalidArgumentError: the folder holds a finished run, or one of other settings.
    """
    folder = _unfinished_folder(arguments, finished)
    given = {name: value for name, value in arguments.to_dict().items() if name not in _FREE}
    wanted = json.loads(json.dumps(given | settings, default=str))
    beside = folder / SETTINGS_FILE
    checkpoint = _last_complete(folder)
    if checkpoint is not None and beside.exists():
        former = read_object(beside)
        differing = [name for name in {**former, **wanted} if former.get(name) != wanted.get(name)]
        if differing:
            name = differing[0]
            raise InvalidArgumentError(
                f"output_dir {str(folder)!r} holds checkpoints of a training with {name} {former.get(name)!r}, not "
                f"{wanted.get(name)!r}: give the same settings, another folder, or remove the checkpoints"
            )
    if arguments.should_save:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(beside, wanted)
    return arguments.resume_from_checkpoint or checkpoint


def check_same(folder: Path, wanted: dict[str, Any]) -> None:
    """Refuse to take what another training has finished for a part of this one."""
    former: dict[str, Any] = {SETTINGS_FILE: "nothing"}
    if (folder / SETTINGS_FILE).exists():
        former = read_object(folder / SETTINGS_FILE)
    wanted = json.loads(json.dumps(wanted, default=str))
    name = next((name for name in former if former[name] != wanted.get(name)), None)
    if name is not None:
        raise InvalidArgumentError(
            f"{str(folder)!r} holds a finished training with {name} {former[name]!r}, not {wanted.get(name)!r}: give "
            "the same settings, another output_dir, or remove it"
        )


def folder_of_several(arguments: TrainingArguments, finished: str) -> Path:
    """The folder of a run that is several trainings, each in a folder in it with a checkpoint of its own.

    Args:
        arguments: of the Trainers.
        finished: the file that the finished run leaves in `output_dir`.

    Raises:
        InvalidArgumentError: the folder holds a finished run, or a checkpoint to start from is named.
    """
    folder = _unfinished_folder(arguments, finished)
    if arguments.resume_from_checkpoint:
        raise InvalidArgumentError(
            f"resume_from_checkpoint is {arguments.resume_from_checkpoint!r}, and there are several trainings: leave "
            "it out, a killed training goes on by itself"
        )
    return folder


def _unfinished_folder(arguments: TrainingArguments, finished: str) -> Path:
    folder = Path(str(arguments.output_dir))
    if (folder / finished).exists():
        raise InvalidArgumentError(
            f"output_dir {str(folder)!r} holds a finished training ({finished}): give another folder, or remove it"
        )
    return folder


def _last_complete(folder: Path) -> str | None:
    """The newest checkpoint with a trainer state, which is written last."""
    if not folder.is_dir() or get_last_checkpoint(str(folder)) is None:
        return None
    checkpoints = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    return next((str(path) for path in checkpoints if _is_complete(path)), None)


def _is_complete(checkpoint: Path) -> bool:
    try:
        read_object(checkpoint / "trainer_state.json")
    except (OSError, InvalidArgumentError):
        return False
    return True
