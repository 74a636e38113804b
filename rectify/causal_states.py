"""A further causal model over any prefixes: its states and next-token logits, of which only what is new is computed.

Methods run it beside the model that generates: an expert, a classifier's backbone, or the model itself on other words.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from rectify.causal_body import causal_body
from rectify.context import context_length
from rectify.errors import InvalidArgumentError
from rectify.growing_cache import growing_cache
from rectify.packed_attention import Packing, can_pack, packed
from rectify.prefix_memo import MASKED, PrefixMemo
from rectify.thread_lock import ThreadLock
from rectify.trunk_probe import abilities_of, close_for, gap, own_cache_of, probe_texts, tried, undisturbed
from rectify.trunk_states import Abilities, hidden_states, input_device, kept_within, takes_positions, text_states

_SAME = 0.01  # of the largest state: what two runs of the same weights may differ by

# a trunk that attends to packed rows reads nothing else meanwhile, for whoever that is
_locks: weakref.WeakKeyDictionary[nn.Module, ThreadLock] = weakref.WeakKeyDictionary()


class CausalStates:
    """A causal trunk in the form that `PrefixMemo` runs.

    Args:
        trunk: a causal model without its output embedding.
    """

    def __init__(self, trunk: PreTrainedModel) -> None:
        self.trunk = trunk
        self.config: Any = trunk.config.get_text_config()
        self._takes_positions = takes_positions(trunk)
        self._lock = _locks.setdefault(trunk, ThreadLock())

    @property
    def abilities(self) -> Abilities:
        """What the trunk was seen to do; raises `InvalidArgumentError` where it is not causal."""
        return abilities_of(self.trunk)

    @property
    def branches(self) -> bool:
        """Whether `encode_branches` gives the states that the texts have alone; tried on a few tokens."""
        return tried(self.trunk, "branches", lambda _: self._may_branch() and self._branches_well())

    def _may_branch(self) -> bool:
        """Whether every layer reads the whole text: windows are longer than a trial."""
        layers = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        bounded = getattr(self.config, "sliding_window", None) and not hasattr(self.config, "layer_types")
        odd = any(getattr(self.config, name, None) for name in ("alibi", "attention_layers"))  # Falcon's, GPT-Neo's
        whole = layers == {"full_attention"} and not bounded and not odd
        masked = self.trunk.config._attn_implementation in ("eager", "sdpa")
        return whole and masked and self._takes_positions and self.abilities.caches

    def _branches_well(self) -> bool:
        """Whether next tokens side by side, not all of which are asked for, have the states of whole texts."""
        first, second = probe_texts(self.trunk, 9, 5)
        ids, tokens = first[:5].repeat(2, 1), torch.stack((first[5:8], second[5:8]))
        mask, real = torch.ones_like(ids), torch.ones_like(tokens, dtype=torch.bool)
        real[1, 1] = False
        if self.abilities.pads:
            ids[1, 0] = mask[1, 0] = 0
        apart = torch.eye(3, dtype=torch.bool, device=ids.device).repeat(2, 1, 1)
        seen = torch.cat((mask.bool()[:, None].expand(-1, 3, -1), apart), -1)[:, None]
        try:
            cache = growing_cache()
            self._run(ids, mask if self.abilities.pads else None, cache)
            found = self._run_branches(tokens, seen, mask.sum(-1, keepdim=True).expand(-1, 3), cache, real)
            whole = torch.stack(
                [
                    self._run(torch.cat((row[kept.bool()].expand(3, -1), of_row[:, None]), 1))[:, -1]
                    for row, kept, of_row in zip(ids, mask, tokens, strict=True)
                ]
            )
        except Exception:  # a model may fail in any way at what it was not made for, and then it is not asked to
            return False
        return gap(found[real][None], whole[real][None]) <= close_for(whole.dtype)

    @property
    def context(self) -> int | None:
        """Longest prefix in tokens that the model was made for, or `None` where it names no limit."""
        return context_length(self.config)

    def check(self, prefixes: Tensor, name: str, more: int = 0) -> None:
        """Refuse what the model cannot read.

        Args:
            prefixes: `[B, T]` int64, `MASKED` at padding.
            name: what messages call the model.
            more: tokens that it reads after each prefix.

        Raises:
            InvalidArgumentError: the prefixes are empty, or longer than the model's context.
        """
        if not prefixes.shape[1]:
            raise InvalidArgumentError("input_ids are empty: give generate token ids, not inputs_embeds")
        if self.context is not None and prefixes.shape[1] + more > self.context:
            longest = int((prefixes != MASKED).sum(-1).max()) + more
            if longest > self.context:
                raise InvalidArgumentError(
                    f"the {name} would read {longest} tokens, and its context is {self.context}: shorten the prompts, "
                    "or generate fewer tokens"
                )

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Hidden states of the last positions, `[B, T, hidden_size]`; see `hidden_states` and `text_states`."""
        with self._lock:
            if cache is not None:
                return self._run(input_ids, attention_mask, cache)
            return text_states(self.trunk, input_ids, attention_mask, self.abilities, self._takes_positions)

    def encode_branches(self, tokens: Tensor, seen: Tensor, positions: Tensor, cache: Cache, real: Tensor) -> Tensor:
        """The states after several next tokens of each prefix; see `BranchingModel.encode_branches`."""
        with self._lock:
            return self._run_branches(tokens, seen, positions, cache, real)

    def _run(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        return hidden_states(self.trunk, input_ids, attention_mask, cache, self._takes_positions)

    def _run_branches(self, tokens: Tensor, seen: Tensor, positions: Tensor, cache: Cache, real: Tensor) -> Tensor:
        unseen = torch.finfo(self.trunk.dtype).min
        mask = torch.zeros(seen.shape, dtype=self.trunk.dtype, device=seen.device).masked_fill(~seen, unseen)
        # an accelerator's step waits for its memory, and computes the padding meanwhile
        if tokens.device.type != "cpu" or not can_pack(self.trunk) or bool(real.all()):
            return self.trunk(
                input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state
        packing = Packing(real, mask, cache)
        with packed(self.trunk):
            states = self.trunk(
                input_ids=packing.pack(tokens),
                position_ids=packing.pack(positions),
                use_cache=False,
                packing=packing,
            ).last_hidden_state
        return packing.unpack(states)


class NextTokenLogits:
    """The next-token logits of a causal language model, as a function of prefixes.

    Args:
        model: a causal language model whose logits are its output embedding of its last hidden states; put in
            evaluation mode. It may be the model that generates: nothing else of it is changed.
        name: what messages call it.
        use_cache: reuse states between calls; `False` is the slow reference.

    Raises:
        InvalidArgumentError: the model makes its logits in another way.
    """

    def __init__(self, model: PreTrainedModel, name: str = "model", use_cache: bool = True) -> None:
        self.model = cast(PreTrainedModel, model.eval())  # with dropout it would be no function of the prefix
        self.name = name
        outputs = model.get_output_embeddings()
        if not isinstance(outputs, nn.Module) or model.config.is_encoder_decoder:
            raise self._refusal("it is no decoder with an output embedding")
        self.states = CausalStates(causal_body(model, name))
        self._apart = own_cache_of(self.states.trunk).steps
        self._outputs = outputs
        self._check_outputs()
        self._memo = PrefixMemo(self.states, use_cache)

    @property
    def context(self) -> int | None:
        """See `CausalStates.context`."""
        return self.states.context

    def clear(self) -> None:
        """Forget the states of all prefixes; needed only after the model's weights change."""
        self._memo.clear()

    @torch.no_grad()
    def __call__(self, prefixes: Tensor) -> Tensor:
        """The logits of the token that follows each prefix.

        Args:
            prefixes: `[B, T]` int64, `MASKED` at padding, which may stand anywhere and counts for nothing; each row
                has a token.

        Returns:
            `[B, V]` on the model's device, float32 or better.

        Raises:
            InvalidArgumentError: the prefixes are empty, or longer than the model's context.
        """
        self.states.check(prefixes, self.name)
        with nullcontext() if self._apart else kept_within(self.states.trunk):
            hidden = self._memo.last_hidden(prefixes.to(input_device(self.model)))
        logits = self._outputs(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def _check_outputs(self) -> None:
        """Refuse a model that does something before or after its output embedding."""
        caught: list[tuple[Tensor, Tensor]] = []

        def catch(module: nn.Module, args: tuple[Any, ...], made: Tensor) -> None:
            caught.append((args[0], made))

        ids = torch.arange(min(8, self.states.config.vocab_size), device=input_device(self.model))[None]
        handle = self._outputs.register_forward_hook(catch)
        try:
            with undisturbed(self.model):
                logits = self.model(input_ids=ids, use_cache=False).logits
                hidden = self.states.encode(ids)
        finally:
            handle.remove()
        if len(caught) != 1 or not torch.equal(caught[0][1].to(logits.dtype), logits):
            raise self._refusal("it changes what its output embedding gives, as by scaling or soft-capping")
        read = caught[0][0]
        if read.shape != hidden.shape or (read - hidden).abs().max() > _SAME * hidden.abs().max():
            raise self._refusal("its output embedding does not read its last hidden states")

    def _refusal(self, reason: str) -> InvalidArgumentError:
        return InvalidArgumentError(
            f"the {self.name} is a {type(self.model).__name__} whose logits cannot be made step by step ({reason}): "
            "give a causal model without that, such as GPT-2 or Llama"
        )
