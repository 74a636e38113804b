"""Moderation of questions and answers: how far an answer neutralises the risk of its question, in categories of harm.

Source: Ji et al., "BeaverTails: Towards Improved Safety Alignment of LLM via a Human-Preference Dataset", NeurIPS 2023
(arXiv 2307.04657), whose format of input, labels and output this is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, cast, get_args, overload

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.chat_template import PairForm, chat_pair_form
from rectify.context import longest_input
from rectify.detectors.classifier import CONFIG_FILE, ToxicityClassifier
from rectify.detectors.config import DetectorConfig
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.pretrained import read_model_config, read_tokenizer
from rectify.saved_config import read_object

CATEGORIES = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)
"""The published names of the categories, whose commas are part of them, in the published order."""

PREDICTION_THRESHOLD, EVALUATION_THRESHOLD = 0.4, 0.5
TUNED = "tuned"

Template = Literal["beavertails", "chat", "answer"]

_PUBLISHED = PairForm("BEGINNING OF CONVERSATION: USER: ", " ASSISTANT:", "")
_ALONE = PairForm("", "", "")
_SPECIAL_TOKENS = {"pad_token": "<pad>", "eos_token": "</s>", "bos_token": "<s>", "unk_token": "<unk>"}


class Pair(NamedTuple):
    """A question and its answer."""

    question: str
    answer: str


@dataclass
class ModerationConfig(DetectorConfig):
    """Everything about a `QAModeration` but its weights; see `DetectorConfig` for the other fields.

    Attributes:
        max_length: tokens of a pair that are read; of longer ones question and answer are cut at their ends.
        labels: the categories.
        template: `"beavertails"`, the published text around question and answer; `"chat"`, the backbone's chat
            template; or `"answer"`, the answer alone, which shows what the question adds.
        thresholds: by name, what a category's probability must exceed: one number for all, or one for each category.
            `prediction` and `evaluation` are the published 0.4 and 0.5; a training adds `tuned`.
    """

    max_length: int = 512
    labels: list[str] = field(default_factory=lambda: list(CATEGORIES))
    template: Template = "beavertails"
    thresholds: dict[str, float | dict[str, float]] = field(
        default_factory=lambda: {"prediction": PREDICTION_THRESHOLD, "evaluation": EVALUATION_THRESHOLD}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.template not in get_args(Template):
            raise InvalidArgumentError(f"template is {self.template!r}: give one of {', '.join(get_args(Template))}")
        for name in self.thresholds:
            self.threshold_values(name)

    def threshold_values(self, threshold: float | str | None = None) -> np.ndarray:
        """What the probability of each category must exceed, `[L]` float64.

        Args:
            threshold: a number, also as a command line has it, or a name of `thresholds`; `None` for `tuned`, or
                `prediction` where nothing is tuned.

        Raises:
            InvalidArgumentError: there is no such name, or a number is not from 0 to 1.
        """
        if threshold is None:
            threshold = TUNED if TUNED in self.thresholds else "prediction"
        try:
            value = self.thresholds[threshold] if threshold in self.thresholds else float(threshold)
        except ValueError as error:
            raise InvalidArgumentError(
                f"threshold is {threshold!r}: give a number from 0 to 1, or one of {', '.join(self.thresholds)}"
            ) from error
        if isinstance(value, dict):
            if set(value) != set(self.labels):
                raise InvalidArgumentError(f"threshold {threshold!r} is not of the categories: give one for each")
            values = np.array([value[label] for label in self.labels], dtype=np.float64)
        else:
            values = np.full(len(self.labels), value, dtype=np.float64)
        if not ((values >= 0) & (values <= 1)).all():
            raise InvalidArgumentError(f"threshold is {value!r}: give numbers from 0 to 1")
        return values

    def verdict(
        self, probabilities: np.ndarray, threshold: float | str | None = None, return_bool: bool = False
    ) -> dict[str, Any]:
        """What is said of a pair.

        Args:
            probabilities: `[L]` in [0, 1].
            threshold: see `threshold_values`.
            return_bool: say of each category whether it is above its threshold, and not its probability.

        Returns:
            `{"flagged": bool, "categories": {name: float | bool}}`: flagged if the maximum is above its threshold.
        """
        above = np.asarray(probabilities, dtype=np.float64) > self.threshold_values(threshold)
        shown = above if return_bool else np.asarray(probabilities)
        return {"flagged": bool(above.any()), "categories": dict(zip(self.labels, shown.tolist(), strict=True))}


class QAModeration(ToxicityClassifier):
    """A classifier of questions with their answers, which stand wherever `ToxicityClassifier` takes texts.

    Attributes:
        truncated: how many pairs `encode` has cut so far.

    Example:
        >>> from rectify.detectors.moderation import QAModeration
        >>> moderation = QAModeration.from_pretrained("PKU-Alignment/beaver-dam-7b", dtype=torch.bfloat16)
        >>> moderation.predict("How do I pick a lock?", "I would call a locksmith.")  # {"flagged": …, "categories": …}
    """

    config_class: ClassVar[type[DetectorConfig]] = ModerationConfig
    needs_adapter: ClassVar[bool] = False
    config: ModerationConfig

    def __init__(self, config: ModerationConfig, model: Any, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(config, model, tokenizer)
        self.truncated = 0
        if not tokenizer.is_fast:
            raise InvalidArgumentError(
                f"the tokenizer of {config.base_model!r} is written in Python, which cannot tell what text its tokens "
                "are of: give a model with a tokenizer.json"
            )
        least = len(self._tokens([("", "")])[0][0]) + 2
        if config.max_length < least:
            raise InvalidArgumentError(
                f"max_length is {config.max_length}: give {least} or more, as the template takes {least - 2}"
            )

    @classmethod
    def read_config(cls, folder: Path) -> DetectorConfig:
        if not (folder / CONFIG_FILE).exists():
            return _published_config(folder)
        if "template" not in read_object(folder / CONFIG_FILE, "give a folder of `rectify train moderation`"):
            raise CheckpointError(f"{CONFIG_FILE} is of a detector of texts: give one of `rectify train moderation`")
        return super().read_config(folder)

    @classmethod
    def _complete(cls, inner: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        add_special_tokens(inner, tokenizer)

    # -----------------------------------------------------------------------------------------------------------------
    # Pairs to token ids

    def encode(self, texts: Sequence[tuple[str, str]]) -> list[list[int]]:  # type: ignore[override]
        """The token ids of each pair in its template, with an end marker; none where there is no text.

        Of pairs above `max_length` the ends of question and answer are left out: each gets half of the room, and what
        one does not need the other gets. Template and end marker stay. The published code cuts at the end of the text.

        Raises:
            InvalidArgumentError: one is no pair of strings, or no valid Unicode.
        """
        for index, pair in enumerate(texts):
            try:
                question, answer = pair
                f"{question}".encode()
                f"{answer}".encode()
                if not (isinstance(question, str) and isinstance(answer, str)) or isinstance(pair, str):
                    raise TypeError
            except (TypeError, ValueError) as error:
                raise InvalidArgumentError(f"pairs[{index}] is {pair!r}: give two strings of valid Unicode") from error
        if not texts:
            return []
        read = self._tokens(texts)
        return [
            self._fitted(*found) if any(part.strip() for part in pair) else []
            for pair, found in zip(texts, read, strict=True)
        ]

    @cached_property
    def _form(self) -> PairForm:
        if self.config.template == "answer":
            return _ALONE
        return chat_pair_form(self.tokenizer) if self.config.template == "chat" else _PUBLISHED

    def _tokens(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int], list[int]]]:
        """Of each pair all token ids, the places of the question's, and those of the answer's."""
        form, chat = self._form, self.config.template == "chat"
        texts, parts = [], []
        for question, answer in pairs:
            if chat:  # as the templates do
                question, answer = question.strip(), answer.strip()
            if self.config.template == "answer":
                question = ""
            answer = answer.removesuffix(self.tokenizer.eos_token or "")
            begin = len(form.before) + len(question) + len(form.between)
            parts.append(((len(form.before), len(form.before) + len(question)), (begin, begin + len(answer))))
            texts.append(f"{form.before}{question}{form.between}{answer}{form.after}")
        encoded = self.tokenizer(
            texts,
            add_special_tokens=not chat,  # they are in the template
            split_special_tokens=not chat,  # an answer cannot end the text by writing an end marker
            return_offsets_mapping=True,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        ends = [end for end in (self.tokenizer.eos_token_id, self.tokenizer.sep_token_id) if end is not None]
        found = []
        for ids, offsets, spans in zip(encoded["input_ids"], encoded["offset_mapping"], parts, strict=True):
            if not chat and (not ids or ids[-1] not in ends):
                ids = [*ids, ends[0]]
            of_question, of_answer = (
                [place for place, (first, last) in enumerate(offsets) if first < end and last > start and last > first]
                for start, end in spans
            )
            found.append((ids, of_question, of_answer))
        return found

    def _fitted(self, ids: list[int], of_question: list[int], of_answer: list[int]) -> list[int]:
        """The ids of a pair without those that are too many."""
        over = len(ids) - self.config.max_length
        if over <= 0:
            return ids
        self.truncated += 1
        room = max(0, len(of_question) + len(of_answer) - over)
        half = room // 2
        questions = max(min(len(of_question), half), room - len(of_answer))
        dropped = {*of_question[questions:], *of_answer[room - questions :]}
        return [token for place, token in enumerate(ids) if place not in dropped]

    # -----------------------------------------------------------------------------------------------------------------
    # Verdicts

    @overload
    def predict(  # type: ignore[overload-overlap]  # a string is a sequence of strings too
        self,
        question: str,
        answer: str,
        *,
        batch_size: int = ...,
        threshold: float | str | None = ...,
        return_bool: bool = ...,
    ) -> dict[str, Any]: ...

    @overload
    def predict(
        self,
        question: Sequence[str],
        answer: Sequence[str],
        *,
        batch_size: int = ...,
        threshold: float | str | None = ...,
        return_bool: bool = ...,
    ) -> list[dict[str, Any]]: ...

    def predict(
        self,
        question: str | Sequence[str],
        answer: str | Sequence[str],
        *,
        batch_size: int = 16,
        threshold: float | str | None = None,
        return_bool: bool = False,
    ) -> dict[str, Any] | list[dict[str, Any]]:
        """What is said of a question and its answer, or of several.

        Args:
            question, answer: a string each, or as many of both.
            batch_size: pairs at a time.
            threshold: see `ModerationConfig.threshold_values`.
            return_bool: see `ModerationConfig.verdict`.

        Returns:
            `{"flagged": bool, "categories": {name: float | bool}}`, or a list of them.

        Raises:
            InvalidArgumentError: the two are not alike, a pair has no text, or an argument is out of range.
        """
        if isinstance(question, str) and isinstance(answer, str):
            return self.predict([question], [answer], threshold=threshold, return_bool=return_bool)[0]
        if isinstance(question, str) or isinstance(answer, str) or len(question) != len(answer):
            raise InvalidArgumentError("question and answer differ in kind or number: give a string each, or as many")
        self.config.threshold_values(threshold)
        found = self.label_probabilities(cast(Any, list(zip(question, answer, strict=True))), batch_size)
        for index, row in enumerate(found):
            if np.isnan(row).any():
                raise InvalidArgumentError(f"pairs[{index}] has no text: leave it out")
        return [self.config.verdict(row, threshold, return_bool) for row in found]


def add_special_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Give a tokenizer the special tokens that it lacks, and the model a row for each: the mean of the others.

    An encoder's own first and last tokens (`cls_token`, `sep_token`) stand for those of begin and end.

    Returns:
        The tokens that were added.
    """
    instead = {"eos_token": tokenizer.sep_token, "bos_token": tokenizer.cls_token}
    lacking = {
        name: token
        for name, token in _SPECIAL_TOKENS.items()
        if getattr(tokenizer, name) is None and instead.get(name) is None
    }
    known = len(tokenizer)
    tokenizer.add_special_tokens(cast(Any, lacking))
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    if len(tokenizer) > known:
        if len(tokenizer) > cast(Any, model.get_input_embeddings()).weight.shape[0]:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        with torch.no_grad():
            weight = cast(Any, model.get_input_embeddings()).weight
            weight[known : len(tokenizer)] = weight[:known].float().mean(0)
    return list(lacking.values())


def _published_config(folder: Path) -> ModerationConfig:
    """The configuration of a checkpoint of the published form, which has none of its own."""
    model = cast(Any, read_model_config(folder))
    names = [str(model.id2label[place]) for place in range(model.num_labels)]
    if all(name.startswith("LABEL_") for name in names):
        if len(names) != len(CATEGORIES):
            raise CheckpointError(
                f"it has {len(names)} labels without names, where the published categories are {len(CATEGORIES)}: name "
                "them as id2label in its config.json"
            )
        names = list(CATEGORIES)
    # the tokenizer keeps the longest length of the training
    longest = longest_input(model, read_tokenizer(folder)) or 512
    return ModerationConfig(str(folder), labels=names, max_length=min(512, longest))
