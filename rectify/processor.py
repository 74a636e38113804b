"""The processor that rectifies a model while `generate` runs."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from rectify.detector_value import DetectorValue
from rectify.errors import InvalidArgumentError
from rectify.padding import Padding
from rectify.prefix_memo import MASKED
from rectify.q_network import DeadEndQNetwork, token_risks
from rectify.q_value import QValue
from rectify.readable import narrowed, readable_scores, readable_survival
from rectify.risk_model import RiskModel
from rectify.rule import Rectified, Rule, Tilt, rectify, rectify_candidates, rectify_support
from rectify.sampling import Sampling
from rectify.strength import Strength
from rectify.support import Support, support_of
from rectify.thread_lock import ThreadLock
from rectify.trunk_states import input_device

Combination = Literal["product", "max"]

_SUPPORT = 8
"""Where truncation leaves this part of the vocabulary or less, only that is valued."""


@cache
def _keep_freed_memory() -> None:
    """Have the C library keep what one step frees for the next, where it would give it back to the system.

    glibc keeps twice the largest block below 32 MiB that was ever freed (mallopt(3), `M_TRIM_THRESHOLD`), so one such
    block will do. To fetch the same pages anew at each step takes longer than the rule.
    """
    torch.empty(2**25 - 2**16, dtype=torch.uint8)


@dataclass(frozen=True)
class Statistics:
    """What a processor did since the last reset; a decision is one row of one call, finished rows included.

    Attributes:
        decisions: how many next-token distributions were rectified.
        capped: tokens held at their cap or removed, over all decisions.
        moved: total variation distance to the base policy, summed over decisions.
        widened: decisions whose truncated support was infeasible, and tokens outside it were let in.
        dead_ends: decisions for which no policy is feasible.
        unread: decisions in which the risk of a token was no number, and was held to be the highest. More than 0 tells
            of a Q network or detector that fails.
    """

    decisions: int
    capped: int
    moved: float
    widened: int
    dead_ends: int
    unread: int


class RectificationProcessor(LogitsProcessor):
    """Rectifies next-token scores with a dead-end Q network, a detector of toxicity, or both.

    For `model.generate(..., logits_processor=[processor], **processor.generate_kwargs())`. The sampling settings belong
    to the processor, which applies them before the rule; `generate_kwargs()` switches them off in `generate`. A call is
    a function of the prefix and the scores: one processor serves any number of prompts, in greedy, sampling, beam and
    assisted decoding, and any number of threads, which are answered one after the other.

    Args:
        q_network: the dead-end Q network, or another risk model (`StaticTokenRisk`); put in evaluation mode. `None`
            where a detector alone tells the risk.
        rule: how its values change the policy (default: the `Tilt` that the Q network's training stored in its
            configuration, else that of β 6).
        model: the model to be rectified. Its vocabulary size is checked, and its generation_config gives the sampling
            settings that are not given here.
        tokenizer: the model's tokenizer. Its vocabulary is checked, and its padding token (else that of the model's
            generation_config) tells padding from text.
        attention_mask: see `set_attention_mask`.
        use_cache: reuse the states of the Q network's trunk between calls; `False` is the slow reference.
        detector: of toxicity. It values its candidates alone, and all other tokens are removed.
        combination: how Q network and detector make one risk: `"product"` of their survival probabilities, as if they
            told of unrelated harms, or the `"max"` of their risks.
        **sampling: the settings of `Sampling` (`do_sample`, `temperature`, `top_k`, `top_p` …). `do_sample=False`
            means that nothing is warped; leave it out to decide in the call of `generate`.

    Raises:
        VocabularyMismatchError: model or tokenizer have another vocabulary.
        InvalidArgumentError: a sampling setting is out of range, or there is neither Q network nor detector.

    Example:
        >>> from rectify import RectificationProcessor, load_language_model
        >>> model, tokenizer = load_language_model("pocket")
        >>> processor = RectificationProcessor.from_pretrained("pocket-q", model=model, tokenizer=tokenizer)
        >>> inputs = tokenizer("You are such a", return_tensors="pt")
        >>> options = processor.generate_kwargs()
        >>> ids = model.generate(**inputs, logits_processor=[processor], **options, min_new_tokens=9, max_new_tokens=9)
        >>> processor.statistics().decisions
        9
    """

    def __init__(
        self,
        q_network: RiskModel | None,
        rule: Rule | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        detector: DetectorValue | None = None,
        combination: Combination = "product",
        **sampling: Any,
    ) -> None:
        unknown = sampling.keys() - Sampling.__dataclass_fields__.keys()
        if unknown:
            raise InvalidArgumentError(
                f"{sorted(unknown)[0]} is not a sampling setting: they are {', '.join(Sampling.__dataclass_fields__)}"
            )
        if q_network is None and detector is None:
            raise InvalidArgumentError("q_network is None, and there is no detector: give one of them, or both")
        check_combination(combination)
        self._q = None if q_network is None else QValue(q_network, model, tokenizer, use_cache)
        self.detector, self.combination = detector, combination
        strength: Strength | None = getattr(getattr(q_network, "config", None), "strength", None)
        self.rule = rule if rule is not None else strength.make_rule() if strength is not None else Tilt()
        self.sampling = Sampling.resolve(model.generation_config if model is not None else None, **sampling)
        reader = q_network if q_network is not None else cast(DetectorValue, detector)
        self._scaling = self.sampling.scaling()
        self._truncating = self.sampling.truncating(input_device(model) if model is not None else reader.device)
        _keep_freed_memory()
        if model is not None and self._q is not None:
            self._q.check_width(model.config.get_text_config().vocab_size)
        self._lock = ThreadLock()
        self._padding = Padding(model, tokenizer)
        self.set_attention_mask(attention_mask)
        self.reset()

    @property
    def q_network(self) -> RiskModel | None:
        """The Q network, or another risk model; `None` where a detector alone tells the risk."""
        return None if self._q is None else self._q.q_network

    @classmethod
    def from_pretrained(
        cls, name: str | Path, rule: Rule | None = None, *, dtype: torch.dtype = torch.float32, **arguments: Any
    ) -> RectificationProcessor:
        """A processor with the Q network of a folder, a bundled name or a Hub id, on the device of `model`.

        Args:
            name: of the Q network.
            rule: how its values change the policy; see the class.
            dtype: of the Q network's weights; its values are float32 whatever it is.
            **arguments: of the class.
        """
        model = arguments.get("model")
        device = input_device(model) if model is not None else None
        return cls(DeadEndQNetwork.from_pretrained(name, dtype=dtype, device=device, model=model), rule, **arguments)

    # -----------------------------------------------------------------------------------------------------------------
    # Around a call of `generate`

    @property
    def supports_continuous_batching(self) -> bool:  # type: ignore[override]
        """No: it needs whole prefixes, and continuous batching, which asks here, gives the last token only."""
        warnings.warn(
            "continuous batching drops this processor, so that nothing is rectified: call generate, not generate_batch",
            RuntimeWarning,
            stacklevel=2,
        )
        return False

    def generate_kwargs(self, **more: Any) -> dict[str, Any]:
        """What to pass to `generate` so that no warper follows the rule, whatever its generation_config says.

        Args:
            **more: further arguments of `generate`, as in `generate_kwargs(do_sample=True, max_new_tokens=20)`.

        Raises:
            InvalidArgumentError: one of them is a sampling setting, which belongs to the processor, contradicts it, or
                has `generate` drop the processor (`cache_implementation="paged"`).
        """
        return self.sampling.generate_kwargs(**more)

    def set_attention_mask(self, attention_mask: Tensor | None) -> None:
        """Say where the next prompts have padding; `generate` does not pass that on.

        Without a mask, the tokenizer's padding tokens at the start of a row are padding. Where that token can also
        begin a text (it is the end or the begin token as well), those that *every* row of the batch begins with are
        text. Give the mask where this can be wrong; it holds until it is set again.

        Args:
            attention_mask: `[prompts, length]`, 0 at padding; or `None`.

        Raises:
            InvalidArgumentError: it is not two-dimensional.
        """
        self._padding.set_attention_mask(attention_mask)

    def reset(self) -> None:
        """Forget the statistics and all cached states (needed after a network's weights were changed)."""
        with self._lock:
            if self._q is not None:
                self._q.memo.clear()
            if self.detector is not None:
                self.detector.clear()
            self._sums: Tensor | None = None
            self._decisions = 0
            self._warned = False

    def statistics(self) -> Statistics:
        """What was done since the last `reset`; waits for the device once."""
        with self._lock:
            capped, moved, widened, dead_ends, unread = self._sums.tolist() if self._sums is not None else (0.0,) * 5
            return Statistics(self._decisions, int(capped), moved, int(widened), int(dead_ends), int(unread))

    # -----------------------------------------------------------------------------------------------------------------
    # One step

    @torch.no_grad()
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Rectified scores: `[B, V]`, float32 or better.

        Args:
            input_ids: `[B, T]` the prefixes, left padding included.
            scores: `[B, V]` logits or log-probabilities of the next tokens.

        Raises:
            VocabularyMismatchError: V is not the Q network's vocabulary size, and no tokenizer was given to show that
                the vocabularies agree.
            InvalidArgumentError: the prefixes are empty or longer than the context of Q network or detector, the
                attention mask is that of other prompts, or a row of the scores leaves no token.
        """
        with self._lock:
            result = self.decide(input_ids, scores)
            if result is None:
                return scores
            self._count(result)
            return result.scores

    @torch.no_grad()
    def decide(self, input_ids: Tensor, scores: Tensor) -> Rectified | None:
        """What a call does, row by row, without counting it; `None` where an assistant drafts, which is left alone.

        Arguments and errors are those of a call.
        """
        for name, given_rows in (("input_ids", input_ids), ("scores", scores)):
            if given_rows.ndim != 2:
                raise InvalidArgumentError(
                    f"{name} have shape {tuple(given_rows.shape)}: give a row for each prefix, two dimensions"
                )
        prefixes, hidden = self._state(input_ids, scores.shape[-1])
        if self._q is not None and hidden is None:
            return None
        given = torch.promote_types(scores.dtype, torch.float32)
        scores, warped = self._warped(input_ids, scores)
        if self.detector is not None:
            candidates = self.detector.candidates_of(warped, self.sampling.least)
            survival = self._candidate_log_survival(prefixes, hidden, candidates, scores.shape[-1])
            result = rectify_candidates(warped, candidates, survival.to(scores.device), self.rule, scores, checked=True)
            return result._replace(scores=narrowed(result.scores, given))
        states, width = cast(Tensor, hidden), scores.shape[-1]

        def of_some(rows: Tensor | None, tokens: Tensor | None) -> Tensor:
            return self._q_survival(states if rows is None else states[rows], tokens, width).to(scores.device)

        support = support_of(warped, width // _SUPPORT) if self._truncating else None
        if support is None:
            unwarped = scores if self._truncating else None
            result = rectify(warped, of_some(None, None), self.rule, unwarped, checked=True)
        else:
            result = rectify_support(warped, support, of_some, self.rule, scores, checked=True)
        return result._replace(scores=narrowed(result.scores, given))

    @torch.no_grad()
    def next_token_log_survival(self, input_ids: Tensor, vocab_size: int | None = None) -> Tensor:
        """`log(1 + Q)` of every token after each prefix: `[B, T]` ids to `[B, vocab_size]` float32.

        Raises:
            InvalidArgumentError: a detector tells the risk of its candidates alone; see `log_survival_of`.
        """
        if self.detector is not None or self._q is None:
            raise InvalidArgumentError("a detector values no other tokens than its candidates: ask log_survival_of")
        _, hidden = self._state(input_ids, vocab_size)
        return self._q.log_survival(_known(hidden), None, vocab_size)

    @torch.no_grad()
    def log_survival_of(self, input_ids: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
        """`log(1 + Q)` of some tokens after each prefix, as a call values them.

        Args:
            input_ids, scores: of a call.
            tokens: `[B, K]` int64.

        Returns:
            `[B, K]` float32, `-inf` where the risk is no number; NaN where a token is no candidate of the detector, and
            so is not valued.
        """
        prefixes, hidden = self._state(input_ids, scores.shape[-1])
        states = None if self._q is None else _known(hidden)
        if self.detector is None:
            return readable_survival(self._q_survival(cast(Tensor, states), tokens, scores.shape[-1]))[0]
        _, warped = self._warped(input_ids, scores)
        candidates = self.detector.candidates_of(warped, self.sampling.least)
        asked = candidates.spread(torch.zeros_like(candidates.tokens, dtype=warped.dtype), warped.shape[-1])
        real = asked.gather(-1, tokens) == 0
        found = self._candidate_log_survival(prefixes, states, Support(tokens, real), scores.shape[-1])
        return readable_survival(found)[0].masked_fill(~real, torch.nan)

    @torch.no_grad()
    def token_risks(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The risk of each token of finished texts by Q network and detector together; see `rectify.token_risks`."""
        risks = [
            token_risks(each, input_ids, attention_mask).to(input_ids.device)
            for each in (self.q_network, self.detector)
            if each is not None
        ]
        if len(risks) == 1:
            return risks[0]
        return torch.maximum(*risks) if self.combination == "max" else 1 - (1 - risks[0]) * (1 - risks[1])

    def _state(self, input_ids: Tensor, vocab_size: int | None) -> tuple[Tensor, Tensor | None]:
        """The prefixes with their padding `MASKED`, and the Q network's states after them, if it has any."""
        if self._q is not None:
            self._q.check_width(vocab_size)
        prefixes = input_ids.masked_fill(~self._padding.real(input_ids), MASKED)
        return prefixes, None if self._q is None else self._q.last_hidden(prefixes)

    def _warped(self, input_ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores in float32 or better, with their bans `-inf`: at the temperature, and truncated as well."""
        temperature = (self.sampling.temperature or 1.0) if self._scaling else 1.0
        read = cast(FloatTensor, readable_scores(scores, temperature))
        scaled = self._scaling(cast(LongTensor, input_ids), read)
        if len(scaled) and not bool(torch.isfinite(scaled.amax(-1)).all()):  # divided beyond what the dtype holds
            limit = torch.finfo(read.dtype).max / 4
            scaled = cast(FloatTensor, scaled.clamp(-limit, limit).where(read > -torch.inf, -torch.inf))
        return scaled, self._truncating(cast(LongTensor, input_ids), scaled)

    def _q_survival(self, hidden: Tensor, tokens: Tensor | None, vocab_size: int) -> Tensor:
        """`log(1 + Q)` of the Q network in states, NaN where it is no number; see `QValue.log_survival`."""
        q = cast(QValue, self._q)
        return self._checked(q.log_survival(hidden, tokens, vocab_size), "Q network", q.q_network)

    def _candidate_log_survival(
        self, prefixes: Tensor, hidden: Tensor | None, candidates: Support, vocab_size: int
    ) -> Tensor:
        """`log(1 + Q)` of candidates, by the detector and, if there is one, the Q network: `[B, K]`."""
        detector = cast(DetectorValue, self.detector)
        found = self._checked(detector.log_survival(prefixes, candidates), "detector", detector)
        if self._q is None or hidden is None:
            return found
        other = self._q_survival(hidden, candidates.tokens, vocab_size).to(found.device)
        return found + other if self.combination == "product" else torch.minimum(found, other)

    def _checked(self, log_survival: Tensor, kind: str, source: object) -> Tensor:
        """Values in which what is none is NaN, so that no combination with another's hides it; warns the first time."""
        log_survival, unread = readable_survival(log_survival)
        if unread is None:
            return log_survival
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"the {kind} ({type(source).__name__}) gives risks that are no numbers: those tokens count as the "
                "riskiest, and `statistics().unread` counts the decisions. Are its weights whole, and its dtype wide "
                "enough?",
                RuntimeWarning,
                stacklevel=2,
            )
        return log_survival.masked_fill(unread, torch.nan)

    def _count(self, result: Rectified) -> None:
        events = (result.capped, result.moved, result.widened, result.dead_end, result.unread)
        sums = torch.stack([event.to(torch.float32).sum() for event in events])
        sums = sums if sums.device.type == "mps" else sums.double()  # MPS has no float64
        self._sums = sums if self._sums is None else self._sums + sums
        self._decisions += result.moved.shape[0]


def check_combination(combination: str) -> None:
    """Refuse what is no way to make one risk of two.

    Raises:
        InvalidArgumentError: it is none.
    """
    if combination not in get_args(Combination):
        raise InvalidArgumentError(f"combination is {combination!r}: give one of {', '.join(get_args(Combination))}")


def _known(hidden: Tensor | None) -> Tensor:
    if hidden is None:
        raise InvalidArgumentError("another model asks than the one whose hidden states the Q network reads")
    return hidden
