"""The processor that rectifies a model while `generate` runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import FloatTensor, LongTensor, Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from rectify.errors import InvalidArgumentError, VocabularyMismatchError
from rectify.padding import Padding
from rectify.prefix_memo import MASKED, PrefixMemo
from rectify.q_network import DeadEndQNetwork
from rectify.risk_model import RiskModel
from rectify.rule import Rectified, Rule, Tilt, rectify, rectify_support, support_of
from rectify.sampling import Sampling
from rectify.trunk_tap import TrunkTap

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
        widened: decisions whose truncated support was infeasible, and the whole policy was used.
        dead_ends: decisions for which no policy is feasible.
    """

    decisions: int
    capped: int
    moved: float
    widened: int
    dead_ends: int


class RectificationProcessor(LogitsProcessor):
    """Rectifies next-token scores with a dead-end Q network.

    For `model.generate(..., logits_processor=[processor], **processor.generate_kwargs())`. The sampling settings belong
    to the processor, which applies them before the rule; `generate_kwargs()` switches them off in `generate`. A call is
    a function of the prefix and the scores: one processor serves any number of prompts, one after the other, in greedy,
    sampling, beam and assisted decoding.

    Args:
        q_network: the dead-end Q network, or another risk model (`StaticTokenRisk`); put in evaluation mode.
        rule: how its values change the policy.
        model: the model to be rectified. Its vocabulary size is checked, and its generation_config gives the sampling
            settings that are not given here.
        tokenizer: the model's tokenizer. Its vocabulary is checked, and its padding token (else that of the model's
            generation_config) tells padding from text.
        attention_mask: see `set_attention_mask`.
        use_cache: reuse the trunk's states between calls; `False` is the slow reference.
        **sampling: the settings of `Sampling` (`do_sample`, `temperature`, `top_k`, `top_p` …). `do_sample=False`
            means that nothing is warped; leave it out to decide in the call of `generate`.

    Raises:
        VocabularyMismatchError: model or tokenizer have another vocabulary.
        InvalidArgumentError: a sampling setting is out of range.

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

    # it needs whole prefixes, and continuous batching gives the last token only
    supports_continuous_batching = False

    def __init__(
        self,
        q_network: RiskModel,
        rule: Rule | None = None,
        *,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool = True,
        **sampling: Any,
    ) -> None:
        unknown = sampling.keys() - Sampling.__dataclass_fields__.keys()
        if unknown:
            raise InvalidArgumentError(
                f"{sorted(unknown)[0]} is not a sampling setting: they are {', '.join(Sampling.__dataclass_fields__)}"
            )
        self.q_network = q_network.eval()  # with dropout it would be no function of the prefix
        self.rule = rule if rule is not None else Tilt()
        self.sampling = Sampling.resolve(model.generation_config if model is not None else None, **sampling)
        self._warpers = self.sampling.warpers(model.device if model is not None else q_network.device)
        self._truncates = self.sampling.truncates
        _keep_freed_memory()
        self._memo: PrefixMemo | TrunkTap = PrefixMemo(q_network, use_cache)
        if model is not None and getattr(q_network, "trunk", None) is model.base_model:
            self._memo = TrunkTap(q_network, model, use_cache)
        self._same_vocabulary = False
        if tokenizer is not None and q_network.config.vocabulary is not None:
            q_network.config.vocabulary.check(tokenizer)
            self._same_vocabulary = True
        if model is not None:
            self._check_width(model.config.get_text_config().vocab_size)
        self._padding = Padding(model, tokenizer)
        self.set_attention_mask(attention_mask)
        self.reset()

    @classmethod
    def from_pretrained(cls, name: str | Path, rule: Rule | None = None, **arguments: Any) -> RectificationProcessor:
        """A processor with the Q network of a folder, a bundled name or a Hub id, on the device of `model`."""
        model = arguments.get("model")
        device = model.device if model is not None else None
        return cls(DeadEndQNetwork.from_pretrained(name, device=device, model=model), rule, **arguments)

    # -----------------------------------------------------------------------------------------------------------------
    # Around a call of `generate`

    def generate_kwargs(self) -> dict[str, Any]:
        """What to pass to `generate` so that no warper follows the rule, whatever its generation_config says."""
        return self.sampling.generate_kwargs()

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
        """Forget the statistics and all cached states (needed after the network's weights were changed)."""
        self._memo.clear()
        self._sums: Tensor | None = None
        self._decisions = 0

    def statistics(self) -> Statistics:
        """What was done since the last `reset`; waits for the device once."""
        capped, moved, widened, dead_ends = self._sums.tolist() if self._sums is not None else (0.0,) * 4
        return Statistics(self._decisions, int(capped), moved, int(widened), int(dead_ends))

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
            InvalidArgumentError: the prefixes are empty or longer than the Q network's context, or the attention mask
                is that of other prompts.
        """
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
        hidden = self._last_hidden(input_ids, scores.shape[-1])
        if hidden is None:
            return None
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        warped = self._warpers(cast(LongTensor, input_ids), cast(FloatTensor, scores))
        width = scores.shape[-1]
        support = support_of(warped, width // _SUPPORT) if self._truncates else None
        if support is None:
            log_survival = self._log_survival(hidden, None, width).to(scores.device)
            return rectify(warped, log_survival, self.rule, unwarped=scores if self._truncates else None)

        def of_some(rows: Tensor | None, tokens: Tensor | None) -> Tensor:
            return self._log_survival(hidden if rows is None else hidden[rows], tokens, width).to(scores.device)

        return rectify_support(warped, support, of_some, self.rule, scores)

    @torch.no_grad()
    def next_token_log_survival(self, input_ids: Tensor, vocab_size: int | None = None) -> Tensor:
        """`log(1 + Q)` of every token after each prefix: `[B, T]` ids to `[B, vocab_size]` float32."""
        hidden = self._last_hidden(input_ids, vocab_size)
        if hidden is None:
            raise InvalidArgumentError("another model asks than the one whose hidden states the Q network reads")
        return self._log_survival(hidden, None, vocab_size)

    def _last_hidden(self, input_ids: Tensor, vocab_size: int | None) -> Tensor | None:
        """The states after the prefixes, `[B, H]`; `None` where an assistant drafts, which is left alone."""
        self._check_width(vocab_size)
        if not input_ids.shape[1] and not isinstance(self._memo, TrunkTap):
            raise InvalidArgumentError("input_ids are empty: give generate token ids, not inputs_embeds")
        real = self._padding.real(input_ids)
        context = self.q_network.context
        if context is not None and input_ids.shape[1] > context and (longest := int(real.sum(-1).max())) > context:
            raise InvalidArgumentError(
                f"the text is {longest} tokens long, and the Q network's context is {context}: "
                "generate fewer tokens, or use a Q network with a longer context"
            )
        prefixes = input_ids.masked_fill(~real, MASKED).to(self.q_network.device)
        return self._memo.last_hidden(prefixes)

    def _log_survival(self, hidden: Tensor, tokens: Tensor | None, vocab_size: int | None) -> Tensor:
        """`log(1 + Q)` in `[B, H]` states: `[B, vocab_size]`, or of `[B, K]` tokens."""
        hidden = hidden.to(self.q_network.device)
        own = self.q_network.config.vocab_size
        # rows that pad a model's embeddings stand for no token
        if tokens is not None:
            tokens = tokens.to(hidden.device)
            log_survival = self.q_network.head.log_survival(hidden, tokens.clamp_max(own - 1))
            return log_survival if vocab_size == own else log_survival.masked_fill(tokens >= own, -torch.inf)
        log_survival = self.q_network.head.log_survival(hidden)
        extra = 0 if vocab_size is None else vocab_size - own
        return torch.nn.functional.pad(log_survival, (0, extra), value=-torch.inf) if extra else log_survival

    def _check_width(self, vocab_size: int | None) -> None:
        own = self.q_network.config.vocab_size
        if vocab_size is not None and vocab_size != own and not self._same_vocabulary:
            raise VocabularyMismatchError(
                f"the model scores {vocab_size} tokens, the Q network {own}: use a Q network of the model's "
                "vocabulary, or pass the tokenizer if the model's embeddings are only padded"
            )

    def _count(self, result: Rectified) -> None:
        events = (result.capped, result.moved, result.widened, result.dead_end)
        sums = torch.stack([event.to(torch.float32).sum() for event in events])
        sums = sums if sums.device.type == "mps" else sums.double()  # MPS has no float64
        self._sums = sums if self._sums is None else self._sums + sums
        self._decisions += result.moved.shape[0]
