"""Data by which a model learns to detoxify itself, from prompts to training examples, in stages.

    prompts → spans → mask → rephrase → continue → score → examples

Each stage but the last reads the file of the one before, and appends to `STAGE.jsonl` one record for each of its kept
ones. What is there is not made again; a line that a kill has torn is. A file that was begun with other settings, or
from another file, is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from rectify.builders import cmd_stages as make
from rectify.builders.cmd_records import (
    SCHEMA,
    ChainExample,
    ContinuedPrompt,
    MaskedPrompt,
    RephrasedPrompt,
    ScoredContinuations,
    ScoredPrompt,
    SpannedPrompt,
    read_records,
    to_json,
)
from rectify.builders.cmd_settings import CmdSettings
from rectify.builders.masking import Find
from rectify.builders.selection import Counts, write_split
from rectify.builders.trajectories import made_folder
from rectify.errors import InvalidArgumentError
from rectify.generation.generator import Generator, shared_context
from rectify.generation.output import GenerationFile
from rectify.generation.prompts import Prompt, numbered
from rectify.json_files import file_sha256, read_object, sha256_of
from rectify.rephrasing.filler import Filler
from rectify.scoring.scores import Scorer

STAGES = ("prompts", "spans", "mask", "rephrase", "continue", "score", "examples")

_KINDS: dict[str, type[ScoredPrompt]] = {
    "prompts": ScoredPrompt,
    "spans": SpannedPrompt,
    "mask": MaskedPrompt,
    "rephrase": RephrasedPrompt,
    "continue": ContinuedPrompt,
    "score": ScoredContinuations,
}

Item = TypeVar("Item")


@dataclass(frozen=True)
class CmdTools:
    """What the stages work with; each is made when the first stage needs it.

    Attributes:
        scorer: judges prompts, masked and rephrased texts, and continuations.
        find: finds toxic spans.
        filler: fills masks.
        generator: the target model, with the numbers of `CmdSettings`.
        similarity: of prompts and rephrased texts; `None` for no gate.
        names: of all of them but the scorer, as a resumed build must have them: `find`, `filler`, `model`,
            `similarity`.
    """

    scorer: Callable[[], Scorer]
    find: Callable[[], Find]
    filler: Callable[[], Filler]
    generator: Callable[[], Generator]
    similarity: Callable[[], make.Similarity] | None = None
    names: dict[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True)
class StageCounts:
    """What a stage did.

    Attributes:
        stage: its name.
        read: records, or texts, that it was given.
        kept: records that it handed on.
        dropped: the others, by reason.
    """

    stage: str
    read: int
    kept: int
    dropped: dict[str, int]


class CmdBuild:
    """One build in one folder.

    Args:
        output_dir: made where it is missing.
        tools: see `CmdTools`.
        settings: how.
        texts: the prompts; needed by the stage prompts alone. Of equal ones, one counts.

    Raises:
        InvalidArgumentError: the folder cannot be made.
    """

    def __init__(
        self,
        output_dir: str | Path,
        tools: CmdTools,
        settings: CmdSettings | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        self.folder, self.tools, self.texts = made_folder(output_dir), tools, texts
        self.settings = settings or CmdSettings()

    def run(self, stages: Sequence[str] = STAGES) -> list[StageCounts]:
        """Run stages, in their order; those before them must be done.

        Returns:
            The counts of these stages.

        Raises:
            InvalidArgumentError: a stage before them is not done, a file was begun with other settings, or there is no
                continuation to shun in the whole set.
            TrajectoryError: a file does not hold what a stage writes.
        """
        unknown = [stage for stage in stages if stage not in STAGES]
        if unknown or not stages:
            raise InvalidArgumentError(f"stages hold {unknown[0] if unknown else 'none'!r}: give {', '.join(STAGES)}")
        runs = (self.prompts, self.spans, self.mask, self.rephrase, self.continue_, self.score, self.examples)
        return [stage() for name, stage in zip(STAGES, runs, strict=True) if name in stages]

    # -----------------------------------------------------------------------------------------------------------------
    # Stages

    def prompts(self) -> StageCounts:
        """Score the distinct prompts; the longest first, so that batches hold similar lengths."""
        if not self.texts:
            raise InvalidArgumentError("texts are not given, or hold nothing: name files for the stage prompts")
        texts = sorted(dict.fromkeys(self.texts), key=len, reverse=True)
        scorer = self.tools.scorer()
        score = make.score_with(scorer)
        given = {**_described(scorer), "texts": sha256_of(texts), "given": len(self.texts)}
        return self._stage("prompts", texts, given, lambda batch: make.score_prompts(batch, score))

    def spans(self) -> StageCounts:
        """Find the toxic spans of the toxic prompts."""
        prompts = self._kept("prompts", ScoredPrompt)
        find = self.tools.find()
        return self._stage("spans", prompts, self._named("find"), lambda batch: make.find_spans(batch, find))

    def mask(self) -> StageCounts:
        """Mask them, and more until what is left is safe."""
        prompts = self._kept("spans", SpannedPrompt)
        find, scorer = self.tools.find(), self.tools.scorer()
        score = make.score_with(scorer)
        given = self._named("find") | _described(scorer)
        return self._stage("mask", prompts, given, lambda batch: make.mask(batch, find, score))

    def rephrase(self) -> StageCounts:
        """Fill the masks with words that make a safe text."""
        prompts = self._kept("mask", MaskedPrompt)
        filler, scorer = self.tools.filler(), self.tools.scorer()
        score, settings = make.score_with(scorer), self.settings
        similarity = self.tools.similarity() if self.tools.similarity is not None else None
        given = self._named("filler", "similarity") | _described(scorer) | settings.of_rephrasing
        return self._stage(
            "rephrase",
            prompts,
            given | {"filler_name": filler.name},
            lambda batch: make.rephrase_prompts(
                batch, filler, score, settings.attempts, similarity, settings.min_similarity
            ),
        )

    def continue_(self) -> StageCounts:
        """Continue the safe prompts by the target model; those without room for it are dropped."""
        prompts = self._kept("rephrase", RephrasedPrompt)
        generator = self.tools.generator()
        context = shared_context(generator.model)
        texts = numbered(Prompt.of(prompt.steps.safe_text(prompt.prompt)) for prompt in prompts)

        def continued(batch: list[tuple[RephrasedPrompt, Prompt]]) -> list[ContinuedPrompt]:
            unusable = generator.unusable([text for _, text in batch], context)
            usable = [text for place, (_, text) in enumerate(batch) if place not in unusable]
            made = iter(generator.continue_batch(usable) if usable else ())
            found = [() if place in unusable else [one.text for one in next(made)] for place in range(len(batch))]
            return make.add_continuations([record for record, _ in batch], found)

        given = self._named("model") | self.settings.of_continuation | {"dtype": str(generator.model.dtype)}
        return self._stage("continue", list(zip(prompts, texts, strict=True)), given, continued)

    def score(self) -> StageCounts:
        """Score the continuations, each alone."""
        prompts = self._kept("continue", ContinuedPrompt)
        scorer = self.tools.scorer()
        score = make.score_with(scorer)
        return self._stage("score", prompts, _described(scorer), lambda batch: make.score_continuations(batch, score))

    def examples(self) -> StageCounts:
        """Write `train.jsonl` and `validation.jsonl`, of `ChainExample` records, all or nothing; it is not resumed.

        Raises:
            InvalidArgumentError: none of the examples has a continuation to shun.
        """
        prompts = self._kept("score", ScoredContinuations)
        found = [make.chain_example(prompt, self.settings.positive, self.settings.negative) for prompt in prompts]
        examples = [example for example in found if example is not None]
        make.check_contrast(examples, f"output_dir {str(self.folder)!r}")
        counts = Counts()
        write_split(
            self.folder,
            [(example.prompt, to_json(example)) for example in examples],
            self.settings.validation_share,
            counts,
        )
        dropped = len(prompts) - len(examples)
        return StageCounts("examples", len(prompts), len(examples), {"toxic": dropped} if dropped else {})

    # -----------------------------------------------------------------------------------------------------------------
    # Files

    def path(self, stage: str) -> Path:
        """The file of a stage but the last."""
        return self.folder / f"{stage}.jsonl"

    def _stage(
        self,
        stage: str,
        items: list[Item],
        given: dict[str, Any],
        work: Callable[[list[Item]], Sequence[ScoredPrompt]],
    ) -> StageCounts:
        """Complete a stage's file."""
        settings = {"schema": SCHEMA, "records": len(items), "batch_size": self.settings.batch_size, **given}
        before = STAGES.index(stage) - 1
        if before >= 0:
            settings["input_sha256"] = file_sha256(self.path(STAGES[before]))
        file = GenerationFile(self.path(stage), settings)
        file.complete(
            items,
            self.settings.batch_size,
            lambda batch, _: list(map(to_json, work(batch))),
            lambda record, item: record["prompt"] == _prompt_of(item),
            stage,
        )
        return self.counts(stage)

    def _kept(self, stage: str, kind: type[Item]) -> list[Item]:
        """The records that a stage handed on."""
        records = self._records(stage)
        return [record for record in records if record.dropped is None]  # type: ignore[misc]

    def _records(self, stage: str) -> list[ScoredPrompt]:
        wanted = self._settings(stage)["records"]
        with self.path(stage).open("rb") as file:
            done = sum(line.endswith(b"\n") for line in file)
        if done != wanted:
            raise InvalidArgumentError(f"{str(self.path(stage))!r} holds {done} of {wanted} records: run {stage} first")
        return list(read_records(self.path(stage), _KINDS[stage]))

    def _settings(self, stage: str) -> dict[str, Any]:
        beside = self.path(stage).with_name(f"{stage}.jsonl.settings.json")
        if not self.path(stage).exists() or not beside.exists():
            raise InvalidArgumentError(f"output_dir {str(self.folder)!r} holds no {stage}.jsonl: run {stage} first")
        return read_object(beside)

    def counts(self, stage: str) -> StageCounts:
        """The counts of a stage but the last, when it is done."""
        records = self._records(stage)
        dropped = Counter(record.dropped for record in records if record.dropped is not None)
        kept = len(records) - dropped.total()
        repeated = self._settings(stage).get("given", len(records)) - len(records)
        if repeated:
            dropped["repeated"] = repeated
        return StageCounts(stage, len(records) + repeated, kept, dict(dropped))

    def _named(self, *names: str) -> dict[str, str | None]:
        return {name: self.tools.names.get(name) for name in names}


def _prompt_of(item: Any) -> str:
    """The prompt of what a stage makes a record of: a text, a record, or a record and something beside it."""
    item = item[0] if isinstance(item, tuple) else item
    return item if isinstance(item, str) else item.prompt


def _described(scorer: Scorer) -> dict[str, str]:
    return {"scorer": scorer.name, "scorer_revision": scorer.revision}


def contrast(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Of the toxic and of the other training examples: how many have something to shun, and how many there are."""
    examples = list(read_records(Path(folder) / "train.jsonl", ChainExample))
    return {
        name: (sum(bool(each.negatives) for each in some), len(some))
        for name, some in (
            ("toxic", [each for each in examples if each.masked is not None]),
            ("other", [each for each in examples if each.masked is None]),
        )
    }
