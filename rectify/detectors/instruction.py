"""The instruction-style detector: a causal language model that is asked about a text, and how sure it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapted_model import load_adapted
from rectify.adapters import save_adapter
from rectify.chat_template import chat_prompt
from rectify.context import context_length
from rectify.detectors.classifier import check_texts
from rectify.detectors.config import check_temperature
from rectify.detectors.templates import Parsed, Template
from rectify.errors import InvalidArgumentError
from rectify.evaluation.fluency import prompted_nll
from rectify.generation.generator import Continuation, Generator
from rectify.generation.prompts import Prompt
from rectify.hub import checkpoint_folder
from rectify.json_files import check_format_version, write_json
from rectify.quiet_peft import PeftModel
from rectify.sampling import Sampling
from rectify.saved_config import read_config

CONFIG_FILE = "instruction_config.json"
FORMAT_VERSION = 1
ANSWER_TOKENS = 200
GREEDY = Sampling(do_sample=False)


@dataclass
class InstructionConfig:
    """Everything about a detector but its weights; saved as `instruction_config.json` beside them.

    Attributes:
        base_model: Hub id, folder or bundled name of the frozen language model, whose tokenizer is used.
        template: the question, and the form of the answer.
        base_revision: revision of `base_model` on the Hub.
        max_length: tokens of a text that are read, from its start.
        chat: whether the question is put as the user's message of the tokenizer's chat template.
        temperature: that the labels' log-probabilities are divided by.
        base_fingerprint: digest of the weights of `base_model`, see `weights_digest`; `None` to take any.
        training: free-form record of how the weights came to be.
        format_version: of the folder's files.
    """

    base_model: str
    template: Template
    base_revision: str | None = None
    max_length: int = 256
    chat: bool = False
    temperature: float = 1.0
    base_fingerprint: str | None = None
    training: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        if isinstance(self.template, dict):
            self.template = Template(**self.template)
        if self.max_length < 1:
            raise InvalidArgumentError(f"max_length is {self.max_length}: give 1 or more")
        check_temperature("temperature", self.temperature)
        check_format_version(self.format_version, FORMAT_VERSION)

    @property
    def labels(self) -> list[str]:
        """The template's labels."""
        return list(self.template.labels)

    @classmethod
    def from_pretrained(cls, name: str | Path, revision: str | None = None) -> InstructionConfig:
        """That of a folder or a Hub id.

        Raises:
            CheckpointError: there is none, or it cannot be used.
        """
        path = checkpoint_folder(name, revision) / CONFIG_FILE
        return read_config(cls, path, "give a folder of `rectify train instruction`")

    def save_pretrained(self, folder: str | Path, model: PeftModel) -> None:
        """Write it and a model's adapter to a folder; the language model that is adapted stays where it is."""
        save_adapter(model, Path(folder), self.base_model)
        write_json(Path(folder) / CONFIG_FILE, asdict(self))


@dataclass(frozen=True)
class Answer:
    """What the detector says of a text.

    Attributes:
        output: the answer as it was written.
        parsed: what it says.
        probabilities: `[L]` float64 of the labels where the answer has its label, which sum to 1; NaN without one.
    """

    output: str
    parsed: Parsed
    probabilities: np.ndarray


class InstructionDetector:
    """A causal language model that answers a question about a text with a label, and may explain it.

    Args:
        config: see there.
        model: in evaluation mode.
        tokenizer: the model's.

    Raises:
        InvalidArgumentError: the tokenizer cannot tell the labels apart, or lacks what it needs.

    Example:
        >>> from rectify.detectors.instruction import InstructionDetector
        >>> detector = InstructionDetector.from_pretrained("my-detector")
        >>> detector.label_probabilities(["Have a nice day", "You are an idiot"])  # [2, L], a row for each text
        >>> detector.answers(["You are an idiot"])[0].output
    """

    def __init__(self, config: InstructionConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config, self.model, self.tokenizer = config, model, tokenizer
        tokenizer.padding_side = "left"
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        if not tokenizer.is_fast:
            raise InvalidArgumentError(
                f"tokenizer of {config.base_model!r} gives no offsets: give a model with a fast one"
            )
        if config.chat and not tokenizer.chat_template:
            raise InvalidArgumentError(f"chat is set, and {config.base_model!r} has no chat template: leave it out")
        self._check_labels()

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> InstructionDetector:
        """Load a detector in evaluation mode.

        Args:
            name: a folder written by `InstructionConfig.save_pretrained`, or a Hub id.
            revision: of a Hub id.
            device, dtype: where the weights are, and what of.

        Raises:
            CheckpointError: nothing usable is there.
        """
        config = InstructionConfig.from_pretrained(name, revision)
        folder = checkpoint_folder(name, revision)
        model, tokenizer = load_adapted(folder, config, dtype)
        return cls(config, model.to(device), tokenizer)  # type: ignore[arg-type]

    # -----------------------------------------------------------------------------------------------------------------
    # Prompts and token ids

    def prompt(self, text: str) -> str:
        """What the model is asked about a text, of which the first `max_length` tokens count."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = cast(list[tuple[int, int]], encoded["offset_mapping"])
        if len(offsets) > self.config.max_length:
            text = text[: offsets[self.config.max_length - 1][1]]
        return self.wrapped(self.config.template.ask(text))

    def wrapped(self, question: str) -> str:
        """A question as the model reads it: as it is, or in the chat template."""
        if not self.config.chat:
            return question
        written = chat_prompt(self.tokenizer, question)
        begin = self.tokenizer.bos_token
        # tokenizers that begin every text with that token would do so twice
        return written.removeprefix(begin) if begin and self._begins_with(begin) else written

    def _begins_with(self, token: str) -> bool:
        ids = cast(list[int], self.tokenizer("a")["input_ids"])
        return bool(ids) and ids[0] == self.tokenizer.convert_tokens_to_ids(token)

    def encode_prompt(self, prompt: str) -> list[int]:
        """Token ids of a prompt, with what the tokenizer begins a text with."""
        return cast(list[int], self.tokenizer(prompt)["input_ids"])

    def encode_answer(self, answer: str) -> list[int]:
        """Token ids of an answer, without an end token."""
        return cast(list[int], self.tokenizer(answer, add_special_tokens=False)["input_ids"])

    def _check_labels(self) -> None:
        _, choices = self._choices("", self.config.template.lead)
        for label, ids in zip(self.config.labels, choices, strict=True):
            if any(other is not ids and other[: len(ids)] == ids for other in choices):
                raise InvalidArgumentError(
                    f"labels {self.config.labels!r}: the tokens of {label!r} begin those of another in the vocabulary "
                    f"of {self.config.base_model!r}: give others"
                )

    def _choices(self, written: str, rest: str) -> tuple[list[int], list[list[int]]]:
        """How an answer may go on with each label.

        Args:
            written: the answer so far, as far as its tokens are fixed.
            rest: of it up to the label.

        Returns:
            The tokens that come first whatever the label, and those of each label, one or more.
        """
        known = self.encode_answer(written)
        ways = [self.encode_answer(written + rest + label) for label in self.config.labels]
        if any(way[: len(known)] != known for way in ways):
            known, ways = [], [self.encode_answer(rest + label) for label in self.config.labels]
        ways = [way[len(known) :] for way in ways]
        shared = 0
        while all(len(way) > shared + 1 for way in ways) and len({way[shared] for way in ways}) == 1:
            shared += 1
        return ways[0][:shared], [way[shared:] for way in ways]

    # -----------------------------------------------------------------------------------------------------------------
    # Labels

    def label_probabilities(self, texts: Sequence[str], batch_size: int = 32, progress: bool = False) -> np.ndarray:
        """How probable each label is, of the labels alone.

        Where the template has fields before the label, they are written first, each token the likeliest; else nothing
        is generated. The probability of a label is the product over its tokens, by the model's own logits: no warper
        of sampling has a part in it, the calibrated temperature alone has.

        Args:
            texts: them.
            batch_size: texts at a time, of nearly equal length.
            progress: show a progress bar.

        Returns:
            `[N, L]` float64, rows of sum 1 in the order of the texts; NaN for blank texts, and where what is written
            comes to no label.

        Raises:
            InvalidArgumentError: `batch_size` is below 1, a text is no valid Unicode, or prompts do not fit the
                model's context.
        """
        check_texts(texts)
        prompts = [self.prompt(text) if text.strip() else None for text in texts]
        return self.prompt_probabilities(prompts, batch_size, progress)

    def prompt_probabilities(
        self, prompts: Sequence[str | None], batch_size: int = 32, progress: bool = False
    ) -> np.ndarray:
        """`label_probabilities` after prompts as the model reads them; NaN where there is `None`."""
        if self.config.template.before:
            found = self.answer_prompts(prompts, batch_size=batch_size, progress=progress)
            return np.array([answer.probabilities for answer in found]).reshape(len(prompts), len(self.config.labels))
        heads, choices = self._choices("", self.config.template.lead)
        asked = {place: prompt for place, prompt in enumerate(prompts) if prompt is not None}
        usable, rows = list(asked), [[*self.encode_prompt(prompt), *heads] for prompt in asked.values()]
        result = np.full((len(prompts), len(self.config.labels)), np.nan)
        result[usable] = self._probabilities(rows, [choices] * len(rows), batch_size, progress)
        return result

    @property
    def room(self) -> int:
        """How many tokens `prompt_probabilities` needs after a prompt."""
        if self.config.template.before:
            return ANSWER_TOKENS
        heads, choices = self._choices("", self.config.template.lead)
        return len(heads) + max(map(len, choices))

    def toxicity(self, probabilities: np.ndarray) -> np.ndarray:
        """How probable it is that a text is toxic, `[N]`, from `[N, L]` probabilities of the labels; NaN stays."""
        places = [self.config.labels.index(label) for label in self.config.template.toxic]
        return probabilities[:, places].sum(-1)

    def _probabilities(
        self, prefixes: list[list[int]], choices: list[list[list[int]]], batch_size: int, progress: bool = False
    ) -> np.ndarray:
        """`[N, L]` float64 of each row's choices after its prefix."""
        if batch_size < 1:
            raise InvalidArgumentError(f"batch_size is {batch_size}: give 1 or more")
        self._check_room(prefixes, max((len(way) for ways in choices for way in ways), default=0))
        result = np.empty((len(prefixes), len(self.config.labels)))
        # the longest first: what does not fit into memory fails at once
        order = sorted(range(len(prefixes)), key=lambda place: -len(prefixes[place]))
        with tqdm(total=len(order), unit="text", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                nll = prompted_nll(
                    self.model,
                    [prefixes[place] for place in places],
                    [choices[place] for place in places],
                    batch_size * len(self.config.labels),
                ).nll.view(len(places), -1)
                result[places] = (-nll / self.config.temperature).softmax(-1).numpy()
                bar.update(len(places))
        return result

    def _check_room(self, prefixes: Sequence[Sequence[int]], more: int) -> None:
        context = context_length(self.model.config)
        longest = max(map(len, prefixes), default=0)
        if context is not None and longest + more > context:
            raise InvalidArgumentError(
                f"max_length is {self.config.max_length}: question, text and answer make {longest + more} tokens, "
                f"{self.config.base_model!r} reads {context}: give a lower one"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Answers

    def answers(self, texts: Sequence[str], **how: Any) -> list[Answer]:
        """Have answers to texts written, as `answer_prompts` does; blank texts are not asked about, and unparsed."""
        check_texts(texts)
        return self.answer_prompts([self.prompt(text) if text.strip() else None for text in texts], **how)

    def answer_prompts(
        self,
        prompts: Sequence[str | None],
        *,
        sampling: Sampling = GREEDY,
        max_new_tokens: int = ANSWER_TOKENS,
        seed: int = 0,
        batch_size: int = 32,
        progress: bool = False,
    ) -> list[Answer]:
        """Have answers written, parsed, and weighed where they have their label.

        Args:
            prompts: as the model reads them; no answer is written where there is `None`.
            sampling: how tokens are chosen; each the likeliest by default.
            max_new_tokens: of an answer.
            seed: of sampling; an answer does not depend on the other prompts.
            batch_size: prompts at a time, of nearly equal length.
            progress: show a progress bar.

        Raises:
            InvalidArgumentError: a number is out of range, or prompts do not fit the model's context.
        """
        if batch_size < 1 or max_new_tokens < 1:
            raise InvalidArgumentError(f"batch_size is {batch_size}, max_new_tokens {max_new_tokens}: give 1 or more")
        generator = Generator(self.model, self.tokenizer, sampling, max_new_tokens, seed=seed)
        asked = {place: prompt for place, prompt in enumerate(prompts) if prompt is not None}
        self._check_room([self.encode_prompt(prompt) for prompt in asked.values()], max_new_tokens)
        unknown = np.full(len(self.config.labels), np.nan)
        found = [Answer("", self.config.template.parse(""), unknown)] * len(prompts)
        order = sorted(asked, key=lambda place: -len(asked[place]))
        with tqdm(total=len(order), unit="text", disable=not progress) as bar:
            for start in range(0, len(order), batch_size):
                places = order[start : start + batch_size]
                written = generator.continue_batch([Prompt(asked[place]) for place in places])
                firsts = [row[0] for row in written]
                weighed = self._weigh([asked[place] for place in places], firsts, generator.ends, batch_size)
                for place, answer in zip(places, weighed, strict=True):
                    found[place] = answer
                bar.update(len(places))
        return found

    def _weigh(self, prompts: list[str], written: list[Continuation], ends: set[int], batch_size: int) -> list[Answer]:
        """Parse answers, and ask the model for the probabilities of the labels where each answer has its own."""
        answers, rows, choices, places = [], [], [], []
        for place, (prompt, one) in enumerate(zip(prompts, written, strict=True)):
            parsed = self.config.template.parse(one.text, bool(one.token_ids) and one.token_ids[-1] in ends)
            answers.append(Answer(one.text, parsed, np.full(len(self.config.labels), np.nan)))
            if parsed.label is None:
                continue
            kept, head = self._before_label(one, parsed.start)
            shared, ways = self._choices(head, one.text[len(head) : parsed.start])
            places.append(place)
            rows.append([*self.encode_prompt(prompt), *one.token_ids[:kept], *shared])
            choices.append(ways)
        for place, row in zip(places, self._probabilities(rows, choices, batch_size), strict=True):
            answers[place] = Answer(answers[place].output, answers[place].parsed, row)
        return answers

    def _before_label(self, written: Continuation, start: int) -> tuple[int, str]:
        """How many tokens of an answer are of the text before its label alone, and what they say.

        Blanks before the label are the label's, as most tokenizers have them.
        """
        kept, head = 0, ""
        limit = len(written.text[:start].rstrip())
        for count in range(1, len(written.token_ids)):
            text = cast(str, self.tokenizer.decode(list(written.token_ids[:count]), skip_special_tokens=True))
            if len(text) > limit:
                break
            if written.text.startswith(text):
                kept, head = count, text
        return kept, head
