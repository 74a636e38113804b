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


@dataclass(frozen=True)
class _Caught:
    """What one forward call of the model was given, and the states that its output embedding read.

    Attributes:
        ids: `[B, F]` the ids that were fed, `None` where embeddings were.
        end: positions of the text after them, `None` where that is not known; those of a prompt of embeddings are not
            counted, as they have no ids.
        hidden: `[B, T, H]` of the last T of them.
    """

    ids: Tensor | None
    end: int | None
    hidden: Tensor

    def last_hidden(self, prefixes: Tensor) -> Tensor | None:
        """The state after each prefix, `[B, H]`; `None` where these are not the prefixes that the model has read."""
        end = prefixes.shape[1] if self.end is None else self.end
        place = prefixes.shape[1] - end + self.hidden.shape[1] - 1
        if not 0 <= place < self.hidden.shape[1] or prefixes.shape[0] != self.hidden.shape[0]:
            return None
        if self.ids is not None:
            begin = end - self.ids.shape[1]
            given = prefixes[:, max(begin, 0) :]
            fed = self.ids[:, max(-begin, 0) : prefixes.shape[1] - begin]
            # padding may be written with any id
            if not torch.equal(fed.masked_fill(given == MASKED, MASKED), given):
                return None
        return self.hidden[:, place]


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
        self._fed: tuple[Tensor | None, int | None] | None = None
        self._unseen = 0
        self._caught: _Caught | None = None
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
        state = None if self._caught is None else self._caught.last_hidden(prefixes)
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
        past = _past(fed.shape[1], kwargs)
        if ids is None:
            self._unseen = (past or 0) + fed.shape[1]
        elif past == 0:
            self._unseen = 0
        self._fed = ids, None if past is None else past + fed.shape[1] - self._unseen

    def _catch(self, hidden: Tensor) -> None:
        self._caught = None
        if self._fed is not None and hidden.ndim == 3:
            ids, end = self._fed
            self._caught = _Caught(None if ids is None else ids.detach(), end, hidden.detach())


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
