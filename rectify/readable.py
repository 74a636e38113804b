"""Scores and risks as a decision can read them: without NaN, without infinities, and with every ban as `-inf`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from rectify.errors import InvalidArgumentError

# No model gives less to a token that it scores, and what is written to forbid one (-1e4, -65504, -1e9, the least
# number of a dtype) lies below.
_BAN = -(2.0**13)
# A model's scores share a magnitude, however large that is; a ban does not.
_FAR = 2.0**5
# Over a wider range, float32 tells tokens far below the best too coarsely apart.
_RANGE = 1024.0
COMPARABLE = 16.0
"""A normaliser beyond this is that of raw logits: it says nothing, and float32 is coarse there."""
# log(1 + Q) may round to just above 0.
_ROUNDING = 1e-6


def readable_scores(scores: Tensor, temperature: float = 1.0) -> Tensor:
    """The scores with every ban `-inf`, and every other entry a number.

    A ban is `-inf`, NaN (a token that the model could not score), or a score of −8,192 or less that is also at least
    32 times as far from 0 as the row's highest: it stays a ban wherever the policy is normalised, widened, or answers
    a dead end. Where every score of a row is so low, their differences count, as in `softmax`. `+inf` becomes the
    largest number that can be reckoned with.

    Args:
        scores: `[B, V]` of any floating dtype.
        temperature: by which they will be divided.

    Returns:
        `[B, V]` float32 or better, float64 where scores of a batch will lie more than 1,024 apart (if the device has
        it). The same tensor if nothing was to do.

    Raises:
        InvalidArgumentError: a row is left no token.
    """
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if not len(scores):
        return scores
    if not scores.shape[1]:
        raise InvalidArgumentError(f"scores have shape {tuple(scores.shape)}: give at least one token")
    lowest, highest = scores.amin(-1), scores.amax(-1)  # NaN where a row has one
    least, least_highest, most = torch.stack((lowest.amin(), highest.amin(), highest.amax())).tolist()
    if least == -math.inf and least_highest > -math.inf and most < math.inf:
        least = float(scores.where(scores > -math.inf, 0).amin())
    limit = torch.finfo(scores.dtype).max / 4
    if not (least > _BAN and least_highest > -math.inf and most <= limit):
        scores = _without_bans(scores, limit)
        found = scores.where(scores > -math.inf, 0)
        least, most = float(found.amin()), float(found.amax())
    wide = most - least > _RANGE * temperature and scores.device.type != "mps"  # which has no float64
    return scores.double() if wide else scores


def narrowed(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Scores in a dtype; large ones that it cannot hold exactly are shifted by row, which changes no policy."""
    if scores.dtype == dtype or not len(scores):
        return scores
    limit, highest = torch.finfo(dtype).max / 4, scores.amax(-1, keepdim=True)
    inexact = (scores.to(dtype).to(scores.dtype) != scores).any(-1, keepdim=True) & (highest.abs() > COMPARABLE)
    if bool(inexact.any()):
        scores = (scores - highest.where(inexact, 0)).clamp_min(-limit).where(scores > -math.inf, -math.inf)
    return scores.to(dtype)


def _without_bans(scores: Tensor, limit: float) -> Tensor:
    unread = scores.isnan()
    scores = scores.masked_fill(unread, -math.inf)
    best = scores.amax(-1, keepdim=True)
    if (empty := (best == -math.inf).squeeze(-1).nonzero()).numel():
        row = int(empty[0])
        why = "NaN: the model fails there, as in float16 beyond its range" if bool(unread[row].any()) else "-inf"
        raise InvalidArgumentError(
            f"scores leave no token in row {row}: every one is {why}. Mend the model's dtype, or the processors before"
        )
    # beside +inf, only absolute size can tell
    magnitude = best.masked_fill(best == math.inf, 0).abs_()
    banned = (scores <= _BAN) & (scores <= magnitude * -_FAR)
    return scores.clamp(-limit, limit).masked_fill_(banned, -math.inf)


def readable_survival(log_survival: Tensor) -> tuple[Tensor, Tensor | None]:
    """`log(1 + Q)` in which what is none (NaN, or a survival above 1) is that of certain harm, and where that was.

    Args:
        log_survival: of any shape; 0 or less, `-inf` for certain harm. Rounding may have it a millionth above 0.

    Returns:
        The values, the same tensor if nothing was to do; and a mask of what was no such value, `None` if nothing was.
    """
    highest = float(log_survival.amax()) if log_survival.numel() else 0.0
    if highest <= 0:  # not so if one is NaN
        return log_survival, None
    if highest <= _ROUNDING:
        return log_survival.clamp_max(0), None
    unread = ~(log_survival <= _ROUNDING)
    return log_survival.clamp_max(0).masked_fill_(unread, -math.inf), unread
