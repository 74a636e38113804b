"""How the weights of a base model are known again, whatever they are kept in: by a few numbers of each of them.

Of each weight a digest holds two sums of all its values under fixed signs, and some of the values. The sums show a
change anywhere, the values show small changes everywhere. Two digests of float32 weights, or of the same half-precision
ones, agree to within what float32 arithmetic leaves open. Where one side was rounded to bfloat16 or float16, values may
differ by half a unit of that format's last place, which is all that rounding can do, and sums by some hundredths of the
weight's norm: a base that was trained on is told apart where its weights moved by about a thousandth of themselves, and
a change of a few values of a large weight is not seen. Weights restored from 8 or 4 bits are compared to a quarter of
their norm, which tells other weights apart and not those that were trained on.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rectify.effective_weights import Weight, effective_weights
from rectify.errors import CheckpointError
from rectify.hub import check_weights

logger = logging.getLogger(__name__)

_MARK = "w1"
_FULL, _BFLOAT16, _FLOAT16, _BOTH, _COARSE, _UNREAD = range(6)  # the first four by the formats that hold the values
_APART, _FOLDED = 8, 16
_SUMS = 2
_SAMPLES, _LEAST, _MOST = 512, 2, 16
_BLOCK, _BLOCKS = 4096, 512  # values under one row of signs, and rows at a time
_ARITHMETIC = 1e-5  # relative: what folding an adapter in and out again leaves open
_SPREAD = 12  # standard deviations of a sum of rounding errors
_QUANTIZED = 0.5  # the mean square of relative differences: of 4 bits about 0.01, of other weights 2
_BITS = {_BFLOAT16: 8, _FLOAT16: 11}
"""Of a significand: rounding changes a value of `[2^e, 2^(e+1))` by `2^(e − bits)` at most."""
_FLOAT16_STEP = 2.0**-24
_ROUNDINGS = 4  # of a weight into which an adapter was folded


@dataclass(frozen=True)
class _Sketch:
    """The numbers that are kept of a model's weights.

    Attributes:
        rows: that its input embeddings had; those that pad them afterwards do not count.
        ids: `[W]` uint64 hashes of names and shapes.
        kinds: `[W]` uint8: the format that holds all values of the weight, or how it was read.
        apart: `[W]` bool: whether it is a part of an adapter.
        folded: `[W]` bool: whether an adapter is folded in.
        sums: `[W, 2]` float64.
        values: `[W, K]` float64, at places that depend on the number of values alone.
    """

    rows: int
    ids: np.ndarray
    kinds: np.ndarray
    apart: np.ndarray
    folded: np.ndarray
    sums: np.ndarray
    values: np.ndarray

    def __str__(self) -> str:
        table = np.zeros(len(self.ids), dtype=_row(self.values.shape[1]))
        table["id"], table["kind"] = self.ids, self.kinds + _APART * self.apart + _FOLDED * self.folded
        table["numbers"] = np.concatenate([self.sums, self.values], 1)
        text = base64.b64encode(table.tobytes()).decode("ascii")
        return f"{_MARK}:{self.rows}:{self.values.shape[1]}:{text}"

    @classmethod
    def read(cls, text: str) -> _Sketch:
        try:
            mark, rows, samples, table = (*text.split(":"), "", "", "")[:4]
            if mark != _MARK or text.count(":") != 3 or not samples.isdecimal() or not _LEAST <= int(samples) <= _MOST:
                raise ValueError("it is damaged, or of another rectify")
            found = np.frombuffer(base64.b64decode(table, validate=True), dtype=_row(int(samples)))
            numbers = found["numbers"].astype(np.float64)
            kinds = found["kind"]
            flags = (kinds & _APART) > 0, (kinds & _FOLDED) > 0
            return cls(int(rows), found["id"], kinds % _APART, *flags, numbers[:, :_SUMS], numbers[:, _SUMS:])
        except (ValueError, binascii.Error) as error:
            raise CheckpointError(
                f"base_fingerprint is no digest of weights ({error}): put back the file, or train anew"
            ) from error


def _row(samples: int) -> np.dtype:
    return np.dtype([("id", "<u8"), ("kind", "u1"), ("numbers", "<f4", (_SUMS + samples,))])


def weights_digest(body: nn.Module) -> str | None:
    """The digest of the weights of a body, for `check_base`; `None` where none of them can be read.

    Layers with an active adapter count with it folded in. It takes one pass over the weights, wherever they are.

    Args:
        body: of a model, without its output embedding or head.
    """
    weights = sum(1 for _ in body.parameters())
    samples = min(_MOST, max(_LEAST, -(-_SAMPLES // max(1, weights))))
    sketch = _sketch(body, None, samples)[0]
    return None if (sketch.kinds == _UNREAD).all() else str(sketch)


def check_base(
    body: nn.Module, recorded: str | None, name: str, what: str, of_files: Callable[[], str | None] | None = None
) -> None:
    """Refuse other weights than those that something was trained on; where none are recorded, say so in one line.

    Args:
        body: see `weights_digest`.
        recorded: the `base_fingerprint` of a configuration: a digest; in older folders `hub.weights_fingerprint`.
        name: of the model.
        what: was trained, such as a folder; a message calls it so.
        of_files: gives the `hub.weights_fingerprint` of the model, for older folders; `None` where none held it.

    Raises:
        CheckpointError: they are others.
    """
    if recorded is None:
        logger.warning(
            "%s: it records no digest of the weights of %r that it was trained on, so any are taken; "
            "`python -m rectify.record_base FOLDER` records those that are there",
            what,
            name,
        )
    elif of_files is None or recorded.startswith(f"{_MARK}:"):
        check_digest(body, recorded, name)
    else:
        check_weights(name, recorded, of_files())


def comparable(*fingerprints: str | None) -> bool:
    """Whether equal weights make such fingerprints equal: they are known, and all digests or none."""
    return None not in fingerprints and len({str(each).startswith(f"{_MARK}:") for each in fingerprints}) == 1


def short(fingerprint: str) -> str:
    """A fingerprint as messages show it."""
    return hashlib.sha256(fingerprint.encode()).hexdigest()[:12] if ":" in fingerprint else fingerprint


def check_digest(body: nn.Module, recorded: str, name: str) -> None:
    """Refuse other weights than those that something was trained on, as far as they can be told apart.

    One line is logged where some of the weights, quantised or not here, could not be compared.

    Args:
        body: see `weights_digest`.
        recorded: its digest in the training.
        name: of the model.

    Raises:
        CheckpointError: they are others.
    """
    before = _Sketch.read(recorded)
    now, names, scale = _sketch(body, before.rows, before.values.shape[1])
    places = {int(each): place for place, each in enumerate(before.ids)}
    both = [(places[int(each)], place) for place, each in enumerate(now.ids) if int(each) in places]
    old, new = (np.array(column, dtype=int) for column in zip(*both, strict=True)) if both else (np.empty(0, int),) * 2
    read = (before.kinds[old] != _UNREAD) & (now.kinds[new] != _UNREAD)
    differing = new[read & ~_agree(before, old, now, new, scale)]
    unread = len(before.ids) - int(read.sum())
    if set(before.ids[before.apart]) != set(now.ids[now.apart]):
        raise _others(name, "an adapter that is not folded in is active now or was then, and is another or missing")
    if not _is_quantized(body) and len(both) < max(len(before.ids), len(now.ids)):
        missing = len(before.ids) - len(both)
        added = [name for name, each in zip(names, now.ids, strict=True) if int(each) not in places]
        what = f"{len(added)} that the training had not, such as {added[0]!r}" if added else f"{missing} fewer"
        raise _others(name, f"they are named or shaped otherwise: {what}")
    if len(differing):
        raise _others(name, f"{len(differing)} of {len(names)} differ, such as {names[differing[0]]!r}")
    if not read.any():
        logger.warning(
            "%r: none of its weights can be read here, so whether they are those of the training is not checked", name
        )
    elif unread:
        logger.warning(
            "%r: %d of its %d weights, quantised or not loaded, are not checked against those of the training",
            name,
            unread,
            len(before.ids),
        )


def _others(name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"it was trained on other weights of {name!r} than those given ({reason}): put the former back, or train anew; "
        "in the configuration, null for base_fingerprint takes any"
    )


def _is_quantized(body: nn.Module) -> bool:
    return getattr(getattr(body, "config", None), "quantization_config", None) is not None


# ---------------------------------------------------------------------------------------------------------------------
# Numbers of weights


def _sketch(body: nn.Module, rows: int | None, samples: int) -> tuple[_Sketch, list[str], np.ndarray]:
    """The numbers of a body's weights, their names, and `[W, 2]` norms and sizes; of the embeddings the first rows."""
    try:
        embeddings: Any = cast(PreTrainedModel, body).get_input_embeddings()
        embeddings = embeddings.get_base_layer() if hasattr(embeddings, "get_base_layer") else embeddings
    except (AttributeError, NotImplementedError):
        embeddings = None
    size = 0
    names, ids, kinds, apart, folded, table, scale = [], [], [], [], [], [], []
    for weight in effective_weights(body):
        inputs = weight.module is embeddings and weight.name.endswith("weight")
        if inputs:
            size = rows or weight.shape[0]
            weight = _first_rows(weight, size)
        kind, numbers, norm = _numbers(weight, samples)
        names.append(weight.name)
        ids.append(_id(weight))
        kinds.append(kind)
        apart.append(weight.apart)
        folded.append(weight.folded)
        table.append(numbers)
        scale.append((norm, math.prod(weight.shape)))
    numbers = np.array(table, dtype=np.float64).reshape(-1, _SUMS + samples)
    columns = np.array(ids, np.uint64), np.array(kinds, np.uint8), np.array(apart, bool), np.array(folded, bool)
    sketch = _Sketch(size, *columns, numbers[:, :_SUMS], numbers[:, _SUMS:])
    return sketch, names, np.array(scale, dtype=np.float64).reshape(-1, 2)


def _first_rows(weight: Weight, rows: int) -> Weight:
    """The embeddings without rows that were added to pad them; as they are where some are missing."""
    if weight.shape[0] <= rows or weight.values is None:
        return weight
    return weight._replace(values=weight.values[:rows], shape=(rows, *weight.shape[1:]))


def _id(weight: Weight) -> int:
    text = f"{weight.name} {'x'.join(map(str, weight.shape))}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@torch.no_grad()
def _numbers(weight: Weight, samples: int) -> tuple[int, np.ndarray, float]:
    """The kind of a weight, its sums and values, and its norm."""
    if weight.values is None or not weight.values.numel():
        return _UNREAD, np.zeros(_SUMS + samples), 0.0
    flat = weight.values.reshape(-1)
    places = torch.from_numpy((_hashes(samples, 0) % np.uint64(flat.numel())).astype(np.int64))
    values = flat[places.to(flat.device)].double().cpu().numpy()
    sums, square, kinds = np.zeros((_SUMS, _BLOCK)), 0.0, {_BFLOAT16, _FLOAT16}
    for start, block in _blocks(flat):
        kinds = {kind for kind in kinds if _holds(kind, block)}
        wide = block.double() if block.device.type != "mps" else block.cpu().double()
        signs = torch.from_numpy(_signs(len(block), 1, start // _BLOCK)).to(wide.device)
        sums += (signs @ wide).cpu().numpy()
        square += float(wide.square().sum())
    kind = sum(kinds) if weight.exact else _COARSE
    total = (sums * _signs(_BLOCK, 2)).sum(-1)
    return kind, np.concatenate([total, values]), float(np.sqrt(square))


def _blocks(flat: Tensor) -> Iterator[tuple[int, Tensor]]:
    """`[R, 4096]` parts of a flat tensor, with their beginnings; the last is filled up with zeros."""
    step = _BLOCK * _BLOCKS
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        if short := -part.numel() % _BLOCK:
            part = torch.nn.functional.pad(part, (0, short))
        yield start, part.view(-1, _BLOCK)


def _holds(kind: int, values: Tensor) -> bool:
    """Whether a format holds values exactly."""
    dtype = torch.bfloat16 if kind == _BFLOAT16 else torch.float16
    return values.dtype == dtype or torch.equal(values.to(dtype).to(values.dtype), values)


def _signs(count: int, seed: int, start: int = 0) -> np.ndarray:
    """`[2, count]` float64 of 1 and −1: one sequence for each sum, from a place on."""
    return np.stack([1.0 - 2.0 * (_hashes(count, 2 * seed + which, start) >> np.uint64(63)) for which in range(_SUMS)])


def _hashes(count: int, seed: int, start: int = 0) -> np.ndarray:
    """The hashes (splitmix64) of the whole numbers from a place on, the same in every version of every library."""
    mixed = np.arange(start, start + count, dtype=np.uint64) + np.uint64(1 + (seed << 40))
    with np.errstate(over="ignore"):
        mixed *= np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


# ---------------------------------------------------------------------------------------------------------------------
# Comparison


def _agree(before: _Sketch, old: np.ndarray, now: _Sketch, new: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`[N]` bool: whether what is kept of pairs of weights can be of the same ones."""
    kinds, other, (norms, counts) = before.kinds[old], now.kinds[new], scale[new].T
    mean = (norms / np.sqrt(np.maximum(counts, 1)))[:, None]
    sums, values = before.sums[old] - now.sums[new], before.values[old] - now.values[new]
    sizes = np.abs(np.stack([before.values[old], now.values[new]]))
    spare = _ARITHMETIC * (sizes.max(0) + mean)
    spare_sums = _ARITHMETIC * norms
    # either may have been rounded to below a power of two, and the other not
    unit = np.exp2(np.floor(np.log2(sizes.min(0) * (1 + 2.0**-8) + _FLOAT16_STEP)))
    folded = (before.folded[old] | now.folded[new])[:, None]
    for kind, bits in _BITS.items():
        # what bfloat16 holds may have been made of float16
        rounded = (kinds != other) & np.isin([kinds, other], [_BFLOAT16, _BOTH, kind]).any(0)
        step = _FLOAT16_STEP / 2 if kind == _FLOAT16 else 0.0
        # base, adapter and sum each, and the base may be larger than the sum
        coarse_unit = np.where(folded, _ROUNDINGS * (sizes.max(0) + mean), unit)
        spare += rounded[:, None] * (coarse_unit * 2.0**-bits + step)
        spare_sums += rounded * _SPREAD * (2.0**-bits * norms + step * np.sqrt(counts))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        fine = (np.abs(sums) <= spare_sums[:, None]).all(-1) & (np.abs(values) <= spare).all(-1)
        parts = np.concatenate([sums / norms[:, None], values / np.maximum(sizes.max(0), mean)], 1)
        alike = np.square(np.nan_to_num(parts)).mean(-1) <= _QUANTIZED
    return np.where(np.isin([kinds, other], [_COARSE]).any(0), alike, fine)
