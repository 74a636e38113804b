"""The generating model's own hidden states, caught while it computes its logits: what makes a shared trunk free."""

from __future__ import annotations

import sys
import weakref
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.generation.candidate_generator import CandidateGenerator

from rectify.errors import InvalidArgumentError
from rectify.prefix_memo import MASKED, PrefixMemo
from rectify.risk_model import RiskModel


@dataclass
class _Reading:
    """What the model has read, as far as it is known, and the states that its output embedding read last.

    Attributes:
        text: `[B, end]` ids; a prompt of embeddings has none and is not counted.
        fed: how many of them the last forward call was given.
        hidden: `[B, T, H]`, of the last T.
    """

    text: Tensor
    fed: int
    hidden: Tensor | None = None

    def last_hidden(self, prefixes: Tensor) -> Tensor | None:
        """The state after each prefix, `[B, H]`; `None` where these are not the prefixes that the model has read."""
        if self.hidden is None or prefixes.shape[0] != self.text.shape[0]:
            return None
        asked, end = prefixes.shape[1], self.text.shape[1]
        place = asked - end + self.hidden.shape[1] - 1
        if not 0 <= place < self.hidden.shape[1]:
            return None
        # padding may be written with any id
        seen = self.text[:, :asked].masked_fill(prefixes == MASKED, MASKED)
        if not torch.equal(seen, prefixes):
            begin = end - self.fed
            if not begin or not torch.equal(seen[:, begin:], prefixes[:, begin:]):
                return None
            if not _rows_of(prefixes[:, :begin], seen[:, :begin]):
                return None
            # beam search has put the rows of its cache into another order
            self.text = torch.cat((prefixes[:, :begin], self.text[:, begin:]), 1)
        return self.hidden[:, place]


def _rows_of(rows: Tensor, among: Tensor) -> bool:
    """Whether each row is one of the others, by a hash of 64 bits."""
    draw = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (rows.shape[1],), generator=draw).to(rows.device)
    return bool(torch.isin((rows * weights).sum(-1), (among * weights).sum(-1)).all())


class TrunkTap:
    """The last hidden states of prefixes under a Q network whose trunk is the generating model itself.

    A forward pre-hook on the model's output embedding catches the states that the logits are computed from; another on
    its trunk tells which ids they belong to. Where they belong to other prefixes than those asked for, the trunk is run
    over these, so that the answer is a function of the prefix.

    Args:
        q_network: a network with a shared trunk.
        model: the causal model whose trunk it is.
        use_cache: for the prefixes that the model has not just read; see `PrefixMemo`.

    Raises:
        InvalidArgumentError: the model has no output embedding.
    """

    def __init__(self, q_network: RiskModel, model: PreTrainedModel, use_cache: bool = True) -> None:
        self.trunk = cast(nn.Module, model.base_model)
        self._fallback = PrefixMemo(q_network, use_cache)
        self.outputs = model.get_output_embeddings()
        if not isinstance(self.outputs, nn.Module):
            raise InvalidArgumentError(
                f"model is a {type(model).__name__}, without an output embedding: give a causal one"
            )
        self.clear()
        # the model outlives the tap, and must not keep it alive; a copy of the model has a copy of its hooks
        tap = weakref.ref(self)

        def before_trunk(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if (alive := tap()) is not None and module is alive.trunk:
                alive._begin(args, kwargs)

        def before_outputs(module: nn.Module, args: tuple[Any, ...]) -> None:
            if (alive := tap()) is not None and module is alive.outputs:
                alive._catch(args[0])

        for handle in (
            self.trunk.register_forward_pre_hook(before_trunk, with_kwargs=True),
            self.outputs.register_forward_pre_hook(before_outputs),
        ):
            weakref.finalize(self, handle.remove)

    def clear(self) -> None:
        """Forget everything."""
        self._reading: _Reading | None = None
        self._unseen = 0
        self._fallback.clear()

    def last_hidden(self, prefixes: Tensor) -> Tensor | None:
        """Hidden state after each prefix.

        Args:
            prefixes: `[B, T]` int64, `MASKED` at padding positions.

        Returns:
            `[B, hidden_size]`; `None` where a draft is made, as in assisted decoding, whose scores are another model's.

        Raises:
            InvalidArgumentError: another model's `generate` asks.
        """
        state = None if self._reading is None else self._reading.last_hidden(prefixes)
        if state is not None:
            return state
        asking = _asking()
        if isinstance(asking, CandidateGenerator):
            return None
        if asking is not None and asking.base_model is not self.trunk:
            raise InvalidArgumentError(
                f"the processor is bound to another {type(self.trunk).__name__} than the model that generates: make "
                "one with from_pretrained(..., model=model) for each model"
            )
        if not prefixes.shape[1]:
            raise InvalidArgumentError("input_ids are empty, and the model has not been run: run it first")
        return self._fallback.last_hidden(prefixes)

    def _begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        embeddings = kwargs.get("inputs_embeds")
        fed = ids if ids is not None else embeddings
        if fed is None:
            return
        count, past = fed.shape[1], _past(fed.shape[1], kwargs)
        known = self._reading.text if self._reading is not None else fed[:, :0]
        if past is None:
            past = self._unseen + known.shape[1] if count == 1 else 0
        if ids is None:
            self._unseen, self._reading = past + count, _Reading(fed.new_empty(len(fed), 0, dtype=torch.long), 0)
            return
        if past == 0:
            self._unseen = 0
        before = past - self._unseen
        if before == 0:
            self._reading = _Reading(ids.detach(), count)
        elif len(known) and len(ids) % len(known) == 0 and known.shape[1] >= before:
            # a prompt that was read once may be continued several times
            known = known[:, :before].repeat_interleave(len(ids) // len(known), 0)
            self._reading = _Reading(torch.cat((known, ids.detach()), 1), count)
        else:
            self._reading = None

    def _catch(self, hidden: Tensor) -> None:
        if self._reading is not None and hidden.ndim == 3:
            self._reading.hidden = hidden.detach()


def _past(fed: int, kwargs: dict[str, Any]) -> int | None:
    """How many positions the model had read before; `None` where its cache, a recurrent model's, does not tell."""
    cache, mask = kwargs.get("past_key_values", kwargs.get("cache_params")), kwargs.get("attention_mask")
    if cache is not None:
        try:
            return int(cache.get_seq_length())
        except ValueError:
            return None
    return mask.shape[1] - fed if isinstance(mask, Tensor) and mask.ndim == 2 else 0


def _asking() -> PreTrainedModel | CandidateGenerator | None:
    """Whose scores are being processed: those of the innermost `generate` under way, or of a draft for a model's."""
    model, frame = None, sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name in ("generate", "get_candidates"):
            owner = frame.f_locals.get("self")
            if isinstance(owner, CandidateGenerator):
                return owner
            if model is None and isinstance(owner, PreTrainedModel):
                model = owner
        frame = cast(Any, frame.f_back)
    return model
