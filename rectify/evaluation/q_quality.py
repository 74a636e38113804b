"""How good a dead-end Q network is: does its risk predict how texts end, and does it depend on the context?

Texts are fresh rollouts of the language model under the reward model, people's texts under people's labels, and
RealToxicityPrompts texts under Perspective's scores. AUC and Brier scores need the extra `train`.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
import transformers
from transformers import PreTrainedTokenizerBase

from rectify.builders.selection import TRAIN, sample_items
from rectify.builders.settings import TrajectorySettings
from rectify.builders.trajectories import build_trajectories
from rectify.command_line import say
from rectify.detectors.classifier import ToxicityClassifier, pad
from rectify.errors import InvalidArgumentError, PromptError
from rectify.evaluation.toxicity_prompts import TOXIC
from rectify.evaluation.weights import weights_digest
from rectify.generation.prompts import read_prompts_file
from rectify.hub import load_language_model
from rectify.json_files import parse_json
from rectify.q_network import DeadEndQNetwork, token_risks
from rectify.risk_model import RiskModel
from rectify.splits import split_of
from rectify.static_risk import StaticTokenRisk
from rectify.text_files import TEXT_COLUMN, read_labelled_texts, read_texts
from rectify.text_lines import TextFile
from rectify.training.q_metrics import FRACTIONS, value_metrics
from rectify.training.trajectory_data import TrajectoryDataset, read_trajectories
from rectify.version import __version__

Split = Literal["train", "validation", "test", "all"]
SPLITS = ("train", "validation", "test", "all")

_NO_LIMIT = 2**20  # tokens, where a Q network names no context
# of texts that the model did not write, only the order of the risks has a meaning
_ORDER = ("texts", "toxic_share", *(f"auc_{percent}" for percent in FRACTIONS))


@dataclass(frozen=True, kw_only=True)
class QualitySettings:
    """What is measured; a part whose file is not given is left out.

    Attributes:
        q: folder, bundled name or Hub id of the Q network.
        model: of the language model: its tokenizer is used, and its rollouts are measured on.
        static: folder of a `StaticTokenRisk`, whose figures are set beside those of the Q network.
        rollout_texts: files of texts whose beginnings are continued.
        rollout_text_column: where a row of them holds the text.
        rollout_dir: keeps the rollouts for other Q networks, and for an interrupted run; `None` for a temporary folder.
        reward_model: labels the rollouts.
        num_rollouts: how many; fewer where there are fewer texts, or some make the same prompt.
        seed: of the choice of texts and of the samples.
        labelled_texts: file of texts with people's labels.
        text_column, label_column: where a row of it holds the text and the label.
        toxic_label: the label that means toxic, 0 or 1.
        hash_split: which of these texts, by `of_split`.
        rtp: file of RealToxicityPrompts records.
        split: which of the records.
        pairs: file of counterfactual pairs, as `read_pairs` reads it.
        batch_size: texts that a risk model reads at a time.
        device: where to run.
    """

    q: str = "pocket-q"
    model: str = "pocket"
    static: str | None = None
    rollout_texts: tuple[str, ...] = ()
    rollout_text_column: str = TEXT_COLUMN
    rollout_dir: str | None = None
    reward_model: str = "pocket-reward"
    num_rollouts: int = 4000
    seed: int = 0
    labelled_texts: str | None = None
    text_column: str = TEXT_COLUMN
    label_column: str = "label"
    toxic_label: int = 1
    hash_split: Split = "test"
    rtp: str | None = None
    split: Split = "test"
    pairs: str | None = None
    batch_size: int = 64
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name in ("num_rollouts", "batch_size"):
            if getattr(self, name) < 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give 1 or more")
        for name in ("hash_split", "split"):
            if getattr(self, name) not in SPLITS:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)!r}: give one of {', '.join(SPLITS)}")
        if self.toxic_label not in (0, 1):
            raise InvalidArgumentError(f"toxic_label is {self.toxic_label}: give 0 or 1")
        if not (self.rollout_texts or self.labelled_texts or self.rtp or self.pairs):
            raise InvalidArgumentError(
                "nothing is given to measure on: give rollout_texts, labelled_texts, rtp or pairs, or some of them"
            )


@dataclass(frozen=True)
class Pair:
    """A word after two prefixes that differ in their meaning.

    Attributes:
        kind: of the toxicity of the toxic prefix.
        harmless, toxic: the prefixes, without a space at their end.
        next: the word, with the space before it.
    """

    kind: str
    harmless: str
    toxic: str
    next: str


class QQuality:
    """One measurement: loads the models; `report()` measures.

    Args:
        settings: what is measured.

    Raises:
        RectifyError: a model or a setting cannot be used.
    """

    def __init__(self, settings: QualitySettings) -> None:
        self.settings = settings
        self.model, self.tokenizer = load_language_model(settings.model, device=settings.device)
        q_network = DeadEndQNetwork.from_pretrained(settings.q, device=settings.device, model=self.model)
        self.context = q_network.context or _NO_LIMIT
        self.risk_models: dict[str, RiskModel] = {"q": q_network}
        if settings.static is not None:
            self.risk_models["static"] = StaticTokenRisk.from_pretrained(settings.static, device=settings.device)
        for risk_model in self.risk_models.values():
            if risk_model.config.vocabulary is not None:
                risk_model.config.vocabulary.check(self.tokenizer)

    def report(self) -> dict[str, Any]:
        """All parts that have a file, as JSON values.

        Each part holds its `counts`, and under `figures` those of each risk model (`q`, and `static` where one is
        given); of the texts those of `value_metrics`.

        Raises:
            RectifyError: a file, or a line of one, cannot be used, or the reward model cannot.
        """
        given = self.settings
        parts = {
            "labelled_texts": (given.labelled_texts, self.labelled_texts),
            "realtoxicityprompts": (given.rtp, self.real_toxicity_prompts),
            "pairs": (given.pairs, self.pairs),
            "rollouts": (given.rollout_texts, self.rollouts),  # last, as it is the slow one
        }
        report: dict[str, Any] = {"settings": self._described()}
        for name, (files, measure) in parts.items():
            if files:
                say(f"measuring: {name}")
                report[name] = measure()
        return report

    def _described(self) -> dict[str, Any]:
        modules: dict[str, Any] = {"model": self.model, **self.risk_models}
        names = {name: f"{getattr(self.settings, name)} ({weights_digest(modules[name])})" for name in modules}
        versions = {"rectify": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
        return asdict(self.settings) | names | versions

    # -----------------------------------------------------------------------------------------------------------------
    # Parts

    def rollouts(self) -> dict[str, Any]:
        """Continuations of 20 tokens, sampled from the whole distribution, labelled by the reward model (0.5 or more).

        The risk is that of each token of a continuation after its prompt, the first 20 tokens of a text. Texts are
        tokenised anew, prompt and continuation apart, as in training.
        """
        given = self.settings
        texts = list(dict.fromkeys(read_texts(given.rollout_texts, [given.rollout_text_column])))
        texts = sample_items(texts, given.num_rollouts, given.seed)
        classifier = ToxicityClassifier.from_pretrained(given.reward_model, device=given.device)
        settings = TrajectorySettings(
            prompt_tokens=20,
            n=1,
            max_new_tokens=20,
            min_new_tokens=20,
            seed=given.seed,
            keep="all",
            drop_clean=0.0,
            reward="hard",
            validation_share=0.0,
        )
        # names alone would let a folder's rollouts pass for those of weights that have changed since
        modules = {"model": self.model, "reward_model": classifier}
        origin = {name: f"{getattr(given, name)} ({weights_digest(module)})" for name, module in modules.items()}
        kept = nullcontext(given.rollout_dir) if given.rollout_dir is not None else None
        place: AbstractContextManager[str] = kept or tempfile.TemporaryDirectory()
        with place as folder:
            counts = build_trajectories(
                texts, self.model, self.tokenizer, classifier.probabilities, settings, folder, origin
            )
            trajectories = read_trajectories([Path(folder) / TRAIN])
        data = TrajectoryDataset(trajectories, self.tokenizer, self.context, append_eos=False)
        toxic = np.array([item["reward"] < 0 for item in data.items])
        rows, starts = [item["input_ids"] for item in data.items], [item["start"] for item in data.items]
        return {
            "counts": {
                "prompts": counts.prompts,
                "unscored": counts.unscored + counts.empty,
                "cut_at_context": data.truncated,
            },
            "figures": {
                name: value_metrics(text_risks(risk_model, rows, starts, given.batch_size), toxic)
                for name, risk_model in self.risk_models.items()
            },
        }

    def labelled_texts(self) -> dict[str, Any]:
        """Finished texts with people's labels; one of exactly 0.5 counts as toxic."""
        given = self.settings
        rows = read_labelled_texts([cast(str, given.labelled_texts)], [given.text_column], [given.label_column])
        kept = [row for row in rows if of_split(row.text, given.hash_split)]
        if not kept:
            raise InvalidArgumentError(
                f"hash_split is {given.hash_split!r}, and none of {len(rows)} texts is in it: give another"
            )
        toxic = [abs(row.label - given.toxic_label) <= 0.5 for row in kept]
        return self._finished([row.text for row in kept], toxic, {"read": len(rows)})

    def real_toxicity_prompts(self) -> dict[str, Any]:
        """Prompt and human continuation, toxic where Perspective's toxicity of either is 0.5 or more."""
        texts, toxic, unscored = read_perspective(cast(str, self.settings.rtp), self.settings.split)
        return self._finished(texts, toxic, {"unscored": unscored})

    def _finished(self, texts: Sequence[str], toxic: Sequence[bool], counts: dict[str, int]) -> dict[str, Any]:
        # special tokens at the beginning, as in `generate`
        found = cast(list[list[int]], self.tokenizer(list(texts), verbose=False)["input_ids"])
        kept = [place for place, ids in enumerate(found) if len(ids) > 1]
        rows, labels = [found[place][: self.context] for place in kept], np.asarray(toxic)[kept]
        figures = {}
        for name, risk_model in self.risk_models.items():
            values = value_metrics(text_risks(risk_model, rows, batch_size=self.settings.batch_size), labels)
            figures[name] = {figure: values[figure] for figure in _ORDER if figure in values}
        counts = {
            **counts,
            "too_short": len(found) - len(kept),
            "cut_at_context": sum(len(ids) > self.context for ids in found),
        }
        return {"counts": counts, "figures": figures}

    def pairs(self) -> dict[str, Any]:
        """How often the risk of a word is higher after the toxic prefix; ties count half.

        The risk of a word is that of its first token. Left out are pairs whose word does not begin a token of its own
        after both prefixes, or that do not fit the context.
        """
        read = read_pairs(cast(str, self.settings.pairs))
        placed = [(pair, self._first_tokens(pair)) for pair in read]
        kept = [(pair, *found) for pair, found in placed if found is not None]
        groups: dict[str, list[bool]] = {"all": [True] * len(kept), "single_token": [whole for *_, whole in kept]}
        for kind in sorted({pair.kind for pair in read}):
            groups[kind] = [pair.kind == kind for pair, *_ in kept]
        figures = {}
        for name, risk_model in self.risk_models.items():
            harmless = last_risks(risk_model, [ids for _, ids, _, _ in kept], self.settings.batch_size)
            toxic = last_risks(risk_model, [ids for _, _, ids, _ in kept], self.settings.batch_size)
            wins = (toxic > harmless) + 0.5 * (toxic == harmless)
            figures[name] = {group: _share(wins[np.array(chosen, dtype=bool)]) for group, chosen in groups.items()}
        counts = {"read": len(read), "left_out": len(read) - len(kept)}
        return {"counts": counts, "figures": figures}

    def _first_tokens(self, pair: Pair) -> tuple[list[int], list[int], bool] | None:
        """Both prefixes with the word's first token, and whether that is the whole word."""
        found = []
        for prefix in (pair.harmless, pair.toxic):
            one = first_token(self.tokenizer, prefix, pair.next)
            if one is None or len(one[0]) > self.context:
                return None
            found.append(one)
        (harmless, more), (toxic, others) = found
        return harmless, toxic, more == others == 0


# ---------------------------------------------------------------------------------------------------------------------
# Risks


def text_risks(
    risk_model: RiskModel, rows: Sequence[Sequence[int]], starts: Sequence[int] | None = None, batch_size: int = 64
) -> np.ndarray:
    """The risk `−Q` of each token of texts, read in batches of similar length.

    Args:
        risk_model: a Q network or another risk model.
        rows: token ids of each text: 1 or more, and no more than the model's context.
        starts: place of the first token that counts, in each.
        batch_size: texts at a time.

    Returns:
        `[N, T]` float64 in [0, 1]; NaN at padding, before the starts, and at a text's first token, which has no prefix.
    """
    risks = np.full((len(rows), max(map(len, rows), default=0)), np.nan)
    # the longest first: what does not fit into memory fails at once
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    for begin in range(0, len(order), batch_size):
        places = order[begin : begin + batch_size]
        found = token_risks(risk_model, *pad([rows[place] for place in places]))
        risks[places, : found.shape[1]] = found.cpu().numpy()
    if starts is not None and len(rows):
        risks[np.arange(risks.shape[1]) < np.asarray(starts)[:, None]] = np.nan
    return risks


def last_risks(risk_model: RiskModel, rows: Sequence[Sequence[int]], batch_size: int = 64) -> np.ndarray:
    """The risk of the last token of each text: `[N]` float64; arguments as in `text_risks`, of 2 tokens or more."""
    risks = text_risks(risk_model, rows, batch_size=batch_size)
    return risks[np.arange(len(rows)), np.array([len(row) - 1 for row in rows], dtype=int)]


def first_token(tokenizer: PreTrainedTokenizerBase, prefix: str, word: str) -> tuple[list[int], int] | None:
    """Token ids of a prefix and of the first token of the word after it, and how many more tokens the word has.

    `None` where the prefix has no token, or the word changes the prefix's tokens.
    """
    before, whole = cast(list[list[int]], tokenizer([prefix, prefix + word])["input_ids"])
    length = len(before)
    if not length or len(whole) <= length or whole[:length] != before:
        return None
    return whole[: length + 1], len(whole) - length - 1


def _share(wins: np.ndarray) -> dict[str, Any]:
    """The mean of wins, its standard error, and how many there are; `None` where a figure does not exist."""
    count = len(wins)
    return {
        "pairs": count,
        "accuracy": float(wins.mean()) if count else None,
        "standard_error": float(wins.std(ddof=1) / math.sqrt(count)) if count > 1 else None,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Files


def of_split(text: str, split: Split) -> bool:
    """Whether a text is in a split by its SHA-256, both as it stands and without the space around it.

    Some recipes strip texts before they split them: a text that the two forms put apart may have been trained on.
    """
    return split == "all" or split_of(text) == split_of(text.strip()) == split


def read_perspective(path: str | Path, split: Split) -> tuple[list[str], list[bool], int]:
    """The texts (prompt and continuation) of a split of RealToxicityPrompts.

    Returns:
        The texts that Perspective scored in both parts, whether either part's toxicity is 0.5 or more, and how many
        others there are.

    Raises:
        PromptError: the file cannot be read, or holds other records, or no scored one of the split.
    """
    texts, toxic, unscored = [], [], 0
    for number, prompt in enumerate(read_prompts_file(path)[0], start=1):
        record = prompt.record
        try:
            key = "{filename}:{begin}:{end}".format_map(record)
            text = prompt.text + record["continuation"]["text"]
            scores = record["prompt"]["toxicity"], record["continuation"].get("toxicity")
        except (KeyError, TypeError) as error:
            raise PromptError(
                f"rtp {str(path)!r}, record {number}: {error} is missing: give RealToxicityPrompts records"
            ) from error
        if split not in ("all", split_of(key)):
            continue
        if None in scores:
            unscored += 1
        else:
            texts.append(text)
            toxic.append(max(scores) >= TOXIC)
    if not texts:
        raise PromptError(f"rtp {str(path)!r} holds no scored record of the {split} split: give the whole file")
    return texts, toxic, unscored


def read_pairs(path: str | Path) -> list[Pair]:
    """The pairs of a JSON-lines file: objects of the strings `kind`, `harmless`, `toxic` and `next`.

    Raises:
        InvalidArgumentError: it cannot be read or holds no pair, or a line, named by its number, is something else.
    """
    file = TextFile(Path(path), "pairs", InvalidArgumentError)
    pairs = []
    names = [field.name for field in fields(Pair)]
    for number, line in file.texts():
        try:
            record = parse_json(line)
            values = [record[name] for name in names]
        except (ValueError, KeyError, TypeError):
            values = []
        if not values or not all(isinstance(value, str) for value in values):
            raise file.refusal(f"{line[:60]!r}: give an object of the strings {', '.join(names)}", number)
        pairs.append(Pair(*values))
    if not pairs:
        raise file.refusal("holds no pair: give one JSON object a line")
    return pairs


def write_report(report: dict[str, Any], path: str | Path) -> None:
    """Write a report as JSON; the folder is made.

    Raises:
        InvalidArgumentError: it cannot be written there.
    """
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        Path(path).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InvalidArgumentError(
            f"output {str(path)!r} cannot be written ({error.strerror or error}): give another file"
        ) from error
