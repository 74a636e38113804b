"""Random decisions, hostile ones among them, and what must be true of every answer."""

from __future__ import annotations

import math
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from rectify.errors import InvalidArgumentError
from rectify.evaluation.rule_reference import caps_of, clear_of_thresholds, log_normalised, risky_tokens, specified
from rectify.processor import RectificationProcessor
from rectify.rule import Advantage, Cap, Mask, Rectified, Rule, Tilt, rectify, rectify_candidates, rectify_support
from rectify.static_risk import StaticRiskConfig, StaticTokenRisk
from rectify.support import support_of

_INF = math.inf
OVER = 1e-5
"""How far above its cap a probability may be."""
CLOSE = 2e-5
"""How far a policy may be from the reference."""

PATHS = ("rectify", "truncated", "support", "candidates", "processor")
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BANS = (-_INF, -1e5, -65504.0, -1e9, -1e30, torch.finfo(torch.bfloat16).min, torch.finfo(torch.float32).min, math.nan)
_ORDINARY = 100.0
_EXACT = 1e6  # what the reference, which knows no float beyond float64, can tell apart to the last digits asked for


@dataclass
class Case:
    """A batch of decisions.

    Attributes:
        path: which function decides.
        rule: the rule.
        scores: `[B, V]` as a model and other processors give them.
        log_survival: `[B, V]` as a risk model gives it.
        banned: `[B, V]` bool, tokens that were banned on purpose, where nothing else can be meant.
        sampling: settings of the processor.
        kept: `[B, V]` bool, what truncation leaves; `None` for all.
    """

    path: str
    rule: Rule
    scores: Tensor
    log_survival: Tensor
    banned: Tensor
    sampling: dict[str, Any] = field(default_factory=dict)
    kept: Tensor | None = None


@dataclass
class Found:
    """Counts, and the faults: each a line that says of which batch."""

    counts: Counter[str] = field(default_factory=Counter)
    over: float = 0.0
    gap: float = 0.0
    faults: list[str] = field(default_factory=list)


def fuzz(decisions: int, seed: int) -> Found:
    """Decide so many random states, and note every fault."""
    found, number = Found(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of risks that are no numbers: they are meant
        while found.counts["decisions"] < decisions:
            case = draw(np.random.default_rng([seed, number]))
            for fault in _faults(case, found):
                found.faults.append(f"batch {number}, {case.path}, {case.rule}: {fault}")
            found.counts["decisions"] += len(case.scores)
            found.counts[case.path] += len(case.scores)
            number += 1
    return found


# --- drawing


def draw(random: np.random.Generator) -> Case:
    """A batch."""
    rows, width = int(random.integers(1, 9)), max(1, int(5000 ** random.random()))
    path, rule = PATHS[random.integers(len(PATHS))], _rule(random)
    if path == "processor":
        rows = min(rows, width)  # a row is known by a token
    scale = 10 ** random.uniform(-3, 30) if random.random() < 0.5 else 10 ** random.uniform(-1, 1)
    scores = torch.from_numpy(random.standard_normal((rows, width)) * scale)
    if random.random() < 0.3:
        scores = scores.log_softmax(-1)
    elif scale <= _ORDINARY and random.random() < 0.3:
        scores += random.choice([-300.0, 40.0, 300.0, 1000.0])
    dtypes = _DTYPES if scale <= _ORDINARY else (torch.float32, torch.float64) if scale > 1e4 else _DTYPES
    scores = scores.to(dtypes[random.integers(len(dtypes))])
    banned = torch.zeros(scores.shape, dtype=torch.bool)
    if random.random() < 0.5:
        share = random.choice([0.05, 0.5, 0.95])
        for ban in random.choice(len(_BANS), random.integers(1, 3), replace=False):
            at = torch.from_numpy(random.random(scores.shape) < share)
            at[torch.arange(rows), torch.from_numpy(random.integers(0, width, rows))] &= bool(random.random() < 0.02)
            value = max(_BANS[ban], torch.finfo(scores.dtype).min) if _BANS[ban] > -_INF else _BANS[ban]
            scores = scores.masked_fill(at, value)
            banned = banned & ~at | at & (scale <= _ORDINARY or not math.isfinite(value))
    if random.random() < 0.05:
        scores[random.integers(rows), random.integers(width)] = _INF
    if scale <= _ORDINARY:  # where every token is banned by a number, those are scores like others
        best = scores.masked_fill(banned, -_INF).amax(-1, keepdim=True)
        banned &= ~torch.isfinite(scores) | (best > -_INF)
    banned &= scores != _INF
    case = Case(path, rule, scores, _log_survival(random, scores.shape), banned)
    if path == "processor":
        case.sampling = _sampling(random)
    elif path != "rectify":
        share = random.choice([0.02, 0.3])
        kept = torch.from_numpy(random.random(scores.shape) < share)
        case.kept = kept.scatter(-1, scores.double().nan_to_num(nan=-_INF, posinf=1e300).argmax(-1, keepdim=True), True)
    return case


def _rule(random: np.random.Generator) -> Rule:
    floor = float(random.choice([1e-7, 1e-7, 0.01]))
    margin = [None, None, 0.0, 0.1, 0.4, 1.0][random.integers(6)]
    kind = random.integers(4)
    if kind == 0:
        return Tilt(beta=float(random.choice([0, 0.5, 1, 6, 30, 1e4])), epsilon=margin, p_min=floor)
    if kind == 1:
        return Mask(threshold=float(random.choice([0, 0.25, 0.5, 0.97, 1])), epsilon=margin, p_min=floor)
    if kind == 2:
        return Advantage(tau=float(random.choice([0, 0.05, 0.1, 0.5, 1])), epsilon=margin, p_min=floor)
    return Cap(epsilon=0.1 if margin is None else margin, p_min=floor)


def _log_survival(random: np.random.Generator, shape: torch.Size) -> Tensor:
    risk = random.random(shape) ** random.choice([0.2, 1, 8])
    survival = 1 - np.where(random.random(shape) < 0.2, random.choice([0, 1, 1e-9]), risk)
    with np.errstate(divide="ignore"):
        values = torch.from_numpy(np.log(survival))
    dtype = _DTYPES[random.integers(len(_DTYPES))]
    if random.random() < 0.4:
        # certain harm, denormal survival, rounding above 0; and what is none
        strange = [-_INF, -103.0, -744.0, 1e-45, 1e-7, math.nan, math.nan, _INF, 1e-3, 5.0]
        for value in random.choice(strange, random.integers(1, 3), replace=False):
            values[torch.from_numpy(random.random(shape) < random.choice([0.01, 0.3]))] = value
    if random.random() < 0.1:
        values[random.integers(shape[0])] = random.choice([math.nan, _INF, -_INF, 1.0])
    return values.to(dtype)


def _sampling(random: np.random.Generator) -> dict[str, Any]:
    settings: dict[str, Any] = {"do_sample": True}
    if random.random() < 0.5:
        settings["temperature"] = float(random.choice([1e-12, 0.1, 0.5, 0.8, 2.0]))
    truncations: list[dict[str, Any]] = [{}, {"top_k": 3}, {"top_p": 0.5}, {"top_p": 0.95, "min_p": 0.05}]
    truncations.append({"typical_p": 0.7})
    return settings | truncations[random.integers(len(truncations))]


# --- deciding


class _RowHead(nn.Module):
    """Values of rows, by their numbers."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.register_buffer("table", values)

    def log_survival(self, hidden: Tensor, actions: Tensor | None = None) -> Tensor:
        rows = cast(Tensor, self.table)[hidden[..., 0].long()]
        return rows if actions is None else rows.gather(-1, actions)


class _Table(StaticTokenRisk):
    """A risk model of given values: those of the row whose number a prefix ends with."""

    def __init__(self, values: Tensor) -> None:
        width = values.shape[-1]
        super().__init__(np.zeros(width), StaticRiskConfig(width, base_rate=0.1, prior=1.0))
        self.head = cast(Any, _RowHead(values))

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Any = None) -> Tensor:
        return input_ids[..., None].float()


@dataclass
class Decided:
    """An answer, and what it was an answer to: scores before and after truncation, and the tokens whose risk counts."""

    result: Rectified
    scores: Tensor
    unwarped: Tensor | None
    asked: Tensor


def _decide(case: Case) -> Decided:
    scores, survival, rule = case.scores, case.log_survival, case.rule
    every = torch.ones_like(scores, dtype=torch.bool)
    if case.path == "rectify":
        return Decided(rectify(scores, survival, rule), scores, None, every)
    if case.path == "processor":
        processor = RectificationProcessor(_Table(survival), rule, **case.sampling)
        ids = torch.arange(len(scores))[:, None]
        result = cast(Rectified, processor.decide(ids, scores))
        scaled, warped = processor._warped(ids, scores)
        called = processor(ids, scores)
        if not torch.equal(called, result.scores) or processor.statistics().unread != int(result.unread.sum()):
            raise AssertionError("a call differs from what it counts")
        return Decided(result, warped, scaled if case.sampling.keys() - {"do_sample", "temperature"} else None, every)
    truncated = scores.masked_fill(~cast(Tensor, case.kept), -_INF)
    if case.path == "truncated":
        return Decided(rectify(truncated, survival, rule, scores), truncated, scores, every)
    support = support_of(truncated, scores.shape[-1])
    if support is None:
        raise InvalidArgumentError("truncation left no token")
    if case.path == "support":

        def of_some(rows: Tensor | None, tokens: Tensor | None) -> Tensor:
            return survival.gather(-1, cast(Tensor, tokens)) if rows is None else survival[rows]

        return Decided(rectify_support(truncated, support, of_some, rule, scores), truncated, scores, every)
    result = rectify_candidates(truncated, support, survival.gather(-1, support.tokens), rule, scores)
    asked = support.spread(torch.zeros(support.tokens.shape), scores.shape[-1]) == 0
    return Decided(result, truncated, None, asked)


# --- judging


def _faults(case: Case, found: Found) -> Iterator[str]:
    """What is wrong with the answer to a batch."""
    nothing_left = [row for row in range(len(case.scores)) if not _left(case, row)]
    try:
        decided = _decide(case)
    except InvalidArgumentError as error:
        found.counts["refused: no token left"] += len(case.scores)
        if not nothing_left or "no token" not in str(error):
            yield f"refused: {error}"
        return
    if nothing_left:
        yield f"row {nothing_left[0]} has no token left, and was not refused"
        return
    result = decided.result
    base = case.scores if case.path in ("support", "candidates", "processor") else case.log_survival
    given = torch.promote_types(torch.promote_types(case.scores.dtype, base.dtype), torch.float32)
    if result.scores.dtype != given:
        yield f"the result is {result.scores.dtype}, not {given}"
    for row in range(len(case.scores)):
        yield from (f"row {row}: {fault}" for fault in _row_faults(case, decided, row, found))


def _left(case: Case, row: int) -> bool:
    """Whether a row has a token that is not banned, where it is decided."""
    kept = torch.ones_like(case.banned[row]) if case.kept is None else case.kept[row]
    scores = case.scores[row].double()
    return bool((~_bans(scores) & kept & ~scores.isnan()).any())


def _bans(scores: Tensor) -> Tensor:
    """The tokens of `[V]` float64 scores that are banned, by the definition."""
    known = scores.nan_to_num(nan=-_INF, posinf=_INF, neginf=-_INF)
    best = float(known.max())
    size = 0.0 if best == _INF else abs(best)
    return (known == -_INF) | ((known <= -(2.0**13)) & (known <= -32 * size))


def _row_faults(case: Case, decided: Decided, row: int, found: Found) -> Iterator[str]:
    result, rule = decided.result, case.rule
    scores = result.scores[row].double()
    dead_end, widened, flagged = (bool(each[row]) for each in (result.dead_end, result.widened, result.unread))
    for name, happened in (("dead ends", dead_end), ("widened", widened), ("unread", flagged)):
        found.counts[name] += happened
    if scores.isnan().any() or (scores == _INF).any() or not math.isfinite(float(scores.logsumexp(-1))):
        yield "no finite policy"
        return
    if not math.isfinite(float(result.moved[row])) or not 0 <= float(result.moved[row]) <= 1:
        yield f"moved is {float(result.moved[row])}"
    policy = scores.softmax(-1).numpy()
    banned = case.banned[row] | _bans(case.scores[row].double())
    found.counts["banned tokens"] += int(banned.sum())
    if (scores[banned] > -_INF).any():
        yield "a banned token returned"
    # the policies that were decided, and the risks
    log_survival = case.log_survival[row].double()
    unread = (~(log_survival <= 1e-6)).numpy()
    survival = np.where(unread, 0, log_survival.clamp(max=0).exp().numpy())
    allowed = ~banned.numpy() & decided.asked[row].numpy()
    support = allowed & (decided.scores[row] > -_INF).numpy()
    whole = allowed if widened or dead_end else support
    if (policy[~whole] > 0).any():
        yield "a token outside the policy has a probability"
    if flagged != (unread & whole).any():
        yield f"unread is {flagged}"
    if unread[whole].all() and not dead_end:
        yield "no risk is known, and it is no dead end"
    if not dead_end:
        if rule.epsilon is not None:
            over = float((policy - caps_of(survival - 1, rule.epsilon, rule.p_min)).max())
            found.over = max(found.over, over)
            if over > OVER:
                yield f"{over:.2g} above a cap"
        if rule.removes and (policy[unread] > 0).any():
            yield "a token of unknown risk was not removed"
        if isinstance(rule, Mask) and (policy[survival < rule.threshold - 1e-6] > 0).any():
            yield "a token under the threshold was not removed"
    if not (unread & whole).any() and case.scores.dtype != torch.float64:
        yield from _unlike_reference(decided, row, rule, survival - 1, support, allowed, policy, found)


def _unlike_reference(
    decided: Decided,
    row: int,
    rule: Rule,
    q: np.ndarray,
    support: np.ndarray,
    allowed: np.ndarray,
    policy: np.ndarray,
    found: Found,
) -> Iterator[str]:
    """How an answer differs from the reference, where that is finite and rounding decides nothing."""

    def known(scores: Tensor, tokens: np.ndarray) -> np.ndarray:
        values = np.where(tokens, scores[row].double().numpy(), -_INF)
        return np.where(values == _INF, 2.0**126, values)

    given = known(decided.scores, support)
    whole = None
    if decided.unwarped is not None:
        whole = known(decided.unwarped, allowed)
    for each in (given, whole):
        if each is not None and np.ptp(each[each > -_INF]) > _EXACT:
            found.counts["too far apart to compare"] += 1
            return
        if each is not None and not _clear(rule, log_normalised(each), q):
            found.counts["too near a threshold to compare"] += 1
            return
    expected = specified(rule, given, q, whole)
    found.counts["compared"] += 1
    gap = float(np.abs(policy - expected.policy).max())
    found.gap = max(found.gap, gap)
    if gap > CLOSE:
        yield f"{gap:.2g} from the reference"
    if (bool(decided.result.widened[row]), bool(decided.result.dead_end[row])) != (expected.widened, expected.dead_end):
        yield f"widened and dead end should be {expected.widened} and {expected.dead_end}"


def _clear(rule: Rule, log_p: np.ndarray, q: np.ndarray) -> bool:
    if isinstance(rule, Mask) and (np.abs(1 + q - rule.threshold) < 1e-6).any():
        return False
    if not clear_of_thresholds(rule, log_p, q, 1e-5):
        return False
    if rule.epsilon is None:
        return True
    kept = (log_p > -_INF) & ~risky_tokens(rule, log_p, q)
    return bool(abs(caps_of(q, rule.epsilon, rule.p_min)[kept].sum() - 1) > 1e-4)
