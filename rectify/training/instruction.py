"""Training of an instruction-style detector: rationales first, labels on the same adapter after, and labels alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import copy
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments, set_seed

from rectify.adapters import load_adapter
from rectify.causal_body import causal_body
from rectify.context import context_length
from rectify.detectors.cascade import predicted
from rectify.detectors.instruction import InstructionConfig, InstructionDetector
from rectify.detectors.templates import TEMPLATES, Template
from rectify.errors import InvalidArgumentError
from rectify.evaluation.calibration import expected_calibration_error
from rectify.hub import current_fingerprint, files_digest, load_language_model
from rectify.json_files import sha256_of, write_json
from rectify.quiet_peft import PeftModel
from rectify.training.detector_figures import scikit_learn
from rectify.training.instruction_rows import InstructionRow
from rectify.training.language_model import LEFT_OUT, AdapterSettings, fit, with_adapter
from rectify.training.running import RESULTS_FILE, check_same, checkpoint_to_resume, folder_of_several
from rectify.training.score_calibration import calibration_temperature
from rectify.training.trainer import run_record
from rectify.weights_digest import weights_digest

RATIONALES, CONTROL = "rationales", "control"
"""Folders of the first stage, and of the labels alone."""


@dataclass
class InstructionSettings(AdapterSettings):
    """What is trained; each field is a flag of `rectify train instruction`."""

    template: str = field(default="toxic", metadata={"help": f"form of question and answer: {', '.join(TEMPLATES)}"})
    prompt: str | None = field(
        default=None, metadata={"help": "another question, with {text} in it (default: the template's)"}
    )
    chat: bool = field(default=False, metadata={"help": "put the question in the tokenizer's chat template"})
    max_length: int = field(default=256, metadata={"help": "tokens of a text that are read, from its start"})
    rationale_epochs: float | None = field(
        default=None, metadata={"help": "of the first stage (default: num_train_epochs)"}
    )
    rationale_learning_rate: float | None = field(
        default=None, metadata={"help": "of the first stage (default: learning_rate)"}
    )
    control: bool = field(
        default=True, metadata={"help": "with rationales: train a detector on the labels of all rows alone as well"}
    )

    def __post_init__(self) -> None:
        if self.template not in TEMPLATES:
            raise InvalidArgumentError(f"template is {self.template!r}: give one of {', '.join(TEMPLATES)}")
        _ = self.chosen_template  # refuses a bad prompt

    @property
    def chosen_template(self) -> Template:
        """The template with the prompt that is given, if any."""
        template = TEMPLATES[self.template]
        return template if self.prompt is None else replace(template, prompt=self.prompt)


def train_instruction(
    settings: InstructionSettings,
    arguments: TrainingArguments,
    template: Template,
    train: Sequence[InstructionRow],
    validation: Sequence[InstructionRow],
    rationales: Sequence[InstructionRow] = (),
    callbacks: Sequence[TrainerCallback] = (),
) -> dict[str, dict[str, Any]]:
    """Train a detector into `arguments.output_dir`; killed, the same call goes on from its checkpoint.

    With rationales, a first adapter learns these rows (folder `rationales`) and the detector goes on from it with the
    labels; `control` learns the labels of all rows from the start, so that it has seen the same texts. A stage that is
    finished is not trained again. Only the answer's tokens, the end token among them, count in the loss.

    Args:
        settings: what is trained.
        arguments: how, for `transformers.Trainer`.
        template: the question and the form of the answers.
        train, validation: rows whose labels are learnt and predicted.
        rationales: rows whose answers hold more than a label.
        callbacks: of all Trainers.

    Returns:
        The record of each stage, by its name: `rationales`, `control`, `labels`.

    Raises:
        InvalidArgumentError: there are no rows, a setting is out of range, or the folder holds another training.
        CheckpointError: nothing usable is at `model_name_or_path`.
    """
    folder = folder_of_several(arguments, RESULTS_FILE)
    scikit_learn()
    stage = _Stage(settings, arguments, template, list(validation), list(callbacks))
    records: dict[str, dict[str, Any]] = {}
    start = None
    if rationales:
        start = folder / RATIONALES
        first = stage.with_changes(settings.rationale_epochs, settings.rationale_learning_rate)
        records[RATIONALES] = first.run(start, rationales)
        if settings.control:
            bare = [row.bare(template) for row in rationales]
            records[CONTROL] = stage.run(folder / CONTROL, [*bare, *train])
    records["labels"] = stage.run(folder, train, start)
    return records


@dataclass
class _Stage:
    settings: InstructionSettings
    arguments: TrainingArguments
    template: Template
    validation: list[InstructionRow]
    callbacks: list[TrainerCallback]

    def with_changes(self, epochs: float | None, learning_rate: float | None) -> _Stage:
        arguments = copy(self.arguments)
        arguments.num_train_epochs = arguments.num_train_epochs if epochs is None else epochs
        arguments.learning_rate = arguments.learning_rate if learning_rate is None else learning_rate
        return replace(self, arguments=arguments)

    def run(self, folder: Path, rows: Sequence[InstructionRow], start: Path | None = None) -> dict[str, Any]:
        """The record of one training, after it or where it was finished before."""
        settings, arguments = self.settings, copy(self.arguments)
        arguments.output_dir = str(folder)
        given = {
            **asdict(settings),
            "base_fingerprint": current_fingerprint(settings.model_name_or_path, settings.model_revision),
            "template": asdict(self.template),
            "rows_sha256": sha256_of([[asdict(row) for row in part] for part in (rows, self.validation)]),
            "start": start and files_digest(start, suffixes={".safetensors"}),
        }
        if (folder / RESULTS_FILE).exists():
            check_same(folder, arguments.to_dict() | given)
            return json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))["record"]
        checkpoint = checkpoint_to_resume(arguments, RESULTS_FILE, **given)
        set_seed(arguments.seed)
        model, detector = self._model(start)
        data = EncodedRows(detector, rows, "train")
        held = EncodedRows(detector, self.validation, "validation", detector.room)
        trainer, results = fit(model, arguments, data, held, checkpoint, self.callbacks)
        detector.model.eval()
        figures, temperature = _validate(detector, held.rows, arguments.eval_batch_size)
        detector.config.temperature = temperature
        record = {
            "rows": len(data),
            "too_long": data.too_long,
            **run_record(trainer),
            "validation": {"nll": results["eval_nll"], **figures, "too_long": held.too_long},
        }
        detector.config.training = {**record, "lora_r": settings.lora_r, "lora_alpha": settings.lora_alpha}
        if trainer.is_world_process_zero():
            detector.config.save_pretrained(folder, model)
            # the last file, as it says that this training is finished
            write_json(folder / RESULTS_FILE, results | {"record": record})
        return record

    def _model(self, start: Path | None) -> tuple[PeftModel, InstructionDetector]:
        """The language model with its adapter, and the detector that it is part of."""
        settings = self.settings
        name, revision = settings.model_name_or_path, settings.model_revision
        base, tokenizer = load_language_model(name, revision=revision)
        fingerprint = weights_digest(causal_body(base))
        model = with_adapter(base, settings) if start is None else load_adapter(base, start, trainable=True)
        config = InstructionConfig(name, self.template, revision, settings.max_length, settings.chat)
        config.base_fingerprint = fingerprint
        # the model inside, as peft's own does not say that it takes positions
        return model, InstructionDetector(config, cast(PreTrainedModel, model.get_base_model()), tokenizer)


def _validate(
    detector: InstructionDetector, rows: Sequence[InstructionRow], batch_size: int
) -> tuple[dict[str, Any], float]:
    """Figures of the rows' labels, and the temperature that calibrates them."""
    labels = detector.config.labels
    probabilities = detector.prompt_probabilities([_prompt(detector, row) for row in rows], batch_size)
    truth = np.array([labels.index(row.label) for row in rows])
    said, _ = predicted(probabilities)
    known = said >= 0
    figures: dict[str, Any] = {
        "n": len(truth),
        "unparsed": int((~known).sum()),
        "accuracy": float((said == truth).mean()),
        "f1_macro": float(
            scikit_learn().f1_score(truth, said, labels=range(len(labels)), average="macro", zero_division=0.0)
        ),
    }
    if not known.any():
        return figures, 1.0
    logits = np.log(probabilities[known].clip(1e-30))
    temperature = calibration_temperature(logits, np.eye(len(labels))[truth[known]])
    scaled = logits / temperature
    after = np.exp(scaled - np.logaddexp.reduce(scaled, axis=-1, keepdims=True))
    for name, values in (("ece", probabilities[known]), ("ece_calibrated", after)):
        right = values.argmax(-1) == truth[known]
        figures[name] = expected_calibration_error(values.max(-1).clip(0, 1), right)
    return figures, temperature


def _prompt(detector: InstructionDetector, row: InstructionRow) -> str:
    return detector.wrapped(row.question) if row.question else detector.prompt(row.text)


class EncodedRows(Dataset):
    """Token ids of questions, answers and end tokens, the last two to be learnt; what exceeds the context is left out.

    Args:
        detector: whose questions they are.
        rows: them.
        name: what a message calls them.
        room: tokens that the context is to hold after a question, be the answer shorter.

    Attributes:
        items: what the model reads.
        rows: those that are not left out.
        too_long: how many are.

    Raises:
        InvalidArgumentError: no row is left.
    """

    def __init__(self, detector: InstructionDetector, rows: Sequence[InstructionRow], name: str, room: int = 0) -> None:
        context = context_length(detector.model.config)
        end = cast(int | None, detector.tokenizer.eos_token_id)
        self.items: list[dict[str, Any]] = []
        self.rows: list[InstructionRow] = []
        self.too_long = 0
        for row in rows:
            asked = detector.encode_prompt(_prompt(detector, row))
            answer = [*detector.encode_answer(row.answer), *([] if end is None else [end])]
            if context is not None and len(asked) + max(len(answer), room) > context:
                self.too_long += 1
            else:
                self.rows.append(row)
                labels = [*[LEFT_OUT] * len(asked), *answer]
                self.items.append({"input_ids": [*asked, *answer], "labels": labels})
        if not self.items:
            raise InvalidArgumentError(
                f"{name} has {len(rows)} rows, none within the context of {context} tokens: give others, or a lower "
                "max_length"
            )

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.items[index]
