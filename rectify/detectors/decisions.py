"""What detectors of any kind say of texts, as records: label, confidence, what was written, and who decided."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from rectify.detectors.cascade import predicted
from rectify.detectors.instruction import GREEDY, Answer, InstructionConfig, InstructionDetector
from rectify.errors import InvalidArgumentError
from rectify.generation.output import GenerationFile
from rectify.hub import available_device
from rectify.json_files import sha256_of, write_whole
from rectify.resumable import records_of
from rectify.sampling import Sampling
from rectify.scoring.cascade import CascadeConfig, calibrated, free_memory, load_part
from rectify.scoring.scores import ATTRIBUTES

UNPARSED = "unparsed"
"""The label of a text whose answer could not be read; it counts neither as toxic nor as not."""
COLUMNS = ("text", "label", "confidence", "toxicity", "decided_by", "output")
_CHUNK = 256

Record = dict[str, Any]
Decide = Callable[[Sequence[str]], list[Record]]


@dataclass(frozen=True, kw_only=True)
class Writing:
    """How a detector that writes answers does.

    Attributes:
        write: have it write answers even where its template has nothing before the label, so that none need be written.
        sampling: how tokens are chosen.
        max_new_tokens: of an answer.
        seed: of sampling.
        batch_size: texts at a time.
    """

    write: bool = False
    sampling: Sampling = GREEDY
    max_new_tokens: int = 200
    seed: int = 0
    batch_size: int = 32


def decisions(
    spec: str,
    texts: Sequence[str],
    writing: Writing,
    device: str | None = None,
    output: str | Path | None = None,
    allow: Sequence[str] = (),
) -> list[Record]:
    """What a detector says of texts, in their order.

    A cascade's two detectors are in memory one after the other: the small one judges all texts, is freed, and the large
    one judges those that are left to it.

    Args:
        spec: `instruction:PATH`, `cascade:PATH`, or any other scorer's name.
        texts: them.
        writing: how answers are written.
        device: where models run; `None` for an accelerator if there is one.
        output: a file of JSON lines that gets the records, and from which a killed run goes on.
        allow: of a cascade, see `CascadeConfig.from_pretrained`.

    Returns:
        Records with `text`, `label` (that of the template, else toxic or non-toxic; `unparsed` without one),
        `confidence` in it, `toxicity`, both from 0 to 1 or `None`, `decided_by`, `output` as it was written, and, where
        there are any, `problem`, `incomplete` and the fields of the answer. Of a cascade both are calibrated, and the
        confidence is that the text is toxic, or is not, as the label has it.

    Raises:
        InvalidArgumentError: the output was begun otherwise.
        RectifyError: a detector cannot be used.
    """
    kind, _, path = spec.partition(":")
    if kind != "cascade":
        return _one(spec, texts, writing, device, output)
    config = CascadeConfig.from_pretrained(path, allow)
    how = {name: value for name, value in asdict(config).items() if name != "training"}
    final = _file(spec, texts, writing, output, **how)
    if final is not None:
        final.check(texts, _is_of)
    if final is not None and final.done == len(texts):
        return _records_of(final)
    beside = [None if output is None else Path(f"{output}.{part}.jsonl") for part in ("small", "large")]
    first = _one(config.small, texts, writing, device, beside[0], allow)
    small = np.array([np.nan if record["toxicity"] is None else record["toxicity"] for record in first])
    places = np.flatnonzero(config.escalated(small)).tolist()
    rest = [texts[place] for place in places]
    second = _one(config.large, rest, writing, device, beside[1], allow) if places else []
    _calibrate(first, config.small, config.small_temperature)
    _calibrate(second, config.large, config.large_temperature)
    for place, record in zip(places, second, strict=True):
        first[place] = record
    if final is not None:
        final.append(first[final.done :])
        for used in filter(None, beside):
            used.unlink(missing_ok=True)
            used.with_name(f"{used.name}.settings.json").unlink(missing_ok=True)
    return first


def _calibrate(records: list[Record], spec: str, temperature: float) -> None:
    kind, _, path = spec.partition(":")
    toxic = InstructionConfig.from_pretrained(path).template.toxic if kind == "instruction" else ("toxic",)
    for record in records:
        if record["toxicity"] is not None:
            toxicity = float(calibrated(np.array([record["toxicity"]]), temperature)[0])
            # a label that was sampled, or one of three, need not be what the probability speaks for
            record["toxicity"], record["confidence"] = toxicity, toxicity if record["label"] in toxic else 1 - toxicity


def _file(
    spec: str, texts: Sequence[str], writing: Writing, output: str | Path | None, **settings: Any
) -> GenerationFile | None:
    if output is None:
        return None
    how = {name: repr(value) for name, value in asdict(writing).items() if name != "batch_size"}
    return GenerationFile(output, {"detector": spec, "texts": sha256_of(list(texts)), **how, **settings})


def _one(
    spec: str,
    texts: Sequence[str],
    writing: Writing,
    device: str | None,
    output: str | Path | None,
    allow: Sequence[str] = (),
) -> list[Record]:
    """The records of a detector that is no cascade; it is in memory no longer than that."""
    file = _file(spec, texts, writing, output)
    if file is not None:
        file.check(texts, _is_of)
    records = _records_of(file)
    if len(records) < len(texts):
        _decide_rest(spec, texts, writing, device, file, records, allow)
        free_memory()
    return records


def _decide_rest(
    spec: str,
    texts: Sequence[str],
    writing: Writing,
    device: str | None,
    file: GenerationFile | None,
    records: list[Record],
    allow: Sequence[str],
) -> None:
    """Add the records that are lacking."""
    answers = spec.startswith("instruction:")
    decide = _by_answers(spec, writing, device) if answers else _by_scores(spec, device, allow)
    with tqdm(total=len(texts), initial=len(records), unit="text", disable=None) as bar:
        for start in range(len(records), len(texts), _CHUNK):
            some = decide(texts[start : start + _CHUNK])
            records += some
            bar.update(len(some))
            if file is not None:
                file.append(some)


def _records_of(file: GenerationFile | None) -> list[Record]:
    return [] if file is None or not file.done else list(records_of(file.path))


def _is_of(record: Record, text: str) -> bool:
    return record["text"] == text and record.keys() >= set(COLUMNS)


def _by_scores(spec: str, device: str | None, allow: Sequence[str]) -> Decide:
    scorer = load_part(spec, device, allow)
    if "TOXICITY" not in scorer.attributes:
        raise InvalidArgumentError(f"detector is {spec!r}, which scores no {ATTRIBUTES[0]}: give another")

    def decide(texts: Sequence[str]) -> list[Record]:
        scores = scorer.score(texts)
        records = []
        for text, toxicity, reason in zip(texts, scores["TOXICITY"].tolist(), scores.reasons, strict=True):
            label = "toxic" if toxicity >= 0.5 else "non-toxic"
            sure = max(toxicity, 1 - toxicity)
            record = _record(text, label, sure, toxicity, spec) if reason is None else _record(text, *_NOTHING, spec)
            records.append(record | ({"problem": str(reason)} if reason is not None else {}))
        return records

    return decide


_NOTHING = (UNPARSED, None, None)


def _record(text: str, label: str, sure: float | None, toxicity: float | None, spec: str, output: str = "") -> Record:
    return dict(zip(COLUMNS, (text, label, sure, toxicity, spec, output), strict=True))


def _by_answers(spec: str, writing: Writing, device: str | None) -> Decide:
    detector = InstructionDetector.from_pretrained(spec.partition(":")[2], device=available_device(device))
    template = detector.config.template

    def decide(texts: Sequence[str]) -> list[Record]:
        if writing.write or template.before:
            answers = detector.answers(
                texts,
                sampling=writing.sampling,
                max_new_tokens=writing.max_new_tokens,
                seed=writing.seed,
                batch_size=writing.batch_size,
            )
        else:
            answers = []
            for row in detector.label_probabilities(texts, writing.batch_size):
                place = int(predicted(row[None])[0][0])
                output = template.write(detector.config.labels[place]) if place >= 0 else ""
                answers.append(Answer(output, template.parse(output), row))
        return [_answered(text, answer, detector, spec) for text, answer in zip(texts, answers, strict=True)]

    return decide


def _answered(text: str, answer: Answer, detector: InstructionDetector, spec: str) -> Record:
    parsed = answer.parsed
    if parsed.label is None:
        return _record(text, *_NOTHING, spec, answer.output) | {"problem": str(parsed.problem)}
    sure = float(answer.probabilities[detector.config.labels.index(parsed.label)])
    toxicity = float(detector.toxicity(answer.probabilities[None])[0])
    record = _record(text, parsed.label, sure, toxicity, spec, answer.output)
    return record | ({"incomplete": True} if parsed.incomplete else {}) | dict(parsed.fields)


def write_table(records: Sequence[Record], path: str | Path) -> None:
    """Write records as a CSV file with a header, whole or not at all; fields that a record lacks are empty."""
    names = list(dict.fromkeys([*COLUMNS, *(name for record in records for name in record)]))
    table = io.StringIO()
    writer = csv.DictWriter(table, names, restval="")
    writer.writeheader()
    writer.writerows(records)
    write_whole(Path(path), table.getvalue())
