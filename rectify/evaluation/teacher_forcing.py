"""The probability that a method gives to texts of people, each token after the human text before it.

The perplexity of what a method generates can be lowered by narrowing the policy; that of clean human text cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import FloatTensor, LongTensor
from transformers import PreTrainedModel

from rectify.evaluation.fluency import CUT, FLOOR, ForcedLikelihood, counted_places, model_logits, text_batch
from rectify.methods.method import MethodProcessor
from rectify.q_network import DeadEndQNetwork
from rectify.rule import Rule
from rectify.trunk_states import input_device

_LOGITS = 1 << 26


@torch.no_grad()
def forced_nll(
    model: PreTrainedModel,
    processor: MethodProcessor,
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
    batch_size: int = 64,
) -> ForcedLikelihood:
    """Negative log-likelihood of continuations under a method and under the model as it is.

    The processor is called as in generation, with the human text in place of what was sampled, and so any method can be
    measured.

    Args:
        model: a causal language model in evaluation mode.
        processor: of a method that was bound without warpers.
        prompts, continuations: token ids, at least one each.
        batch_size: texts at a time.
    """
    order = sorted(range(len(prompts)), key=lambda row: (len(prompts[row]), len(continuations[row])))
    nll = base_nll = 0.0
    cut = removed = 0
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        # padded on the right, so that every prefix begins with its text
        batch = text_batch(
            [prompts[row] for row in rows], [continuations[row] for row in rows], device=input_device(model)
        )
        logits = model_logits(model, batch)
        processor.reset()
        processor.set_attention_mask(batch.attention_mask[:, :1])  # nothing before a text
        for column in range(min(len(prompts[row]) for row in rows), batch.input_ids.shape[1]):
            counted = batch.counted[:, column]
            if not counted.any():
                continue
            scores = logits[:, column - 1].float()
            tokens = batch.input_ids[:, column, None]
            base = scores.log_softmax(-1).gather(-1, tokens)[:, 0].double()
            prefixes = batch.input_ids[:, :column]
            policy = processor(cast(LongTensor, prefixes), cast(FloatTensor, scores.clone())).log_softmax(-1)
            forced = policy.gather(-1, tokens)[:, 0].double()
            gone = (forced == -torch.inf) & counted
            forced = torch.where(gone, base - FLOOR, forced)
            nll -= float(forced[counted].sum())
            base_nll -= float(base[counted].sum())
            cut += int((base - forced > CUT)[counted].sum())
            removed += int(gone.sum())
    processor.reset()
    processor.set_attention_mask(None)
    return ForcedLikelihood(nll, base_nll, sum(map(len, continuations)), cut, removed)


@torch.no_grad()
def ruled_nll(
    model: PreTrainedModel,
    network: DeadEndQNetwork,
    rules: Sequence[Rule],
    prompts: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[int]],
) -> list[ForcedLikelihood]:
    """`forced_nll` of several rules on one Q network, which reads each text once for all of them.

    Args:
        model: a causal language model in evaluation mode.
        network: in evaluation mode, of the model's vocabulary and on its device.
        rules: those that are feasible whatever the values.
        prompts, continuations: token ids, at least one each.

    Returns:
        One for each rule.
    """
    order = sorted(range(len(prompts)), key=lambda row: len(prompts[row]) + len(continuations[row]))
    sums, base_nll, tokens = torch.zeros(len(rules), 3, dtype=torch.float64), 0.0, 0
    while order:
        longest = len(prompts[order[-1]]) + len(continuations[order[-1]])
        size = max(1, _LOGITS // (longest * network.config.vocab_size))
        rows, order = order[-size:], order[:-size]
        batch = text_batch([prompts[row] for row in rows], [continuations[row] for row in rows], device=model.device)
        logits, hidden = model_logits(model, batch), network.encode(batch.input_ids, batch.attention_mask)
        width = min(logits.shape[-1], network.config.vocab_size)  # the model's may be padded
        for row, column in counted_places(batch, width):
            policy = logits[row, column - 1, :width].float().log_softmax(-1)
            survival = network.head.log_survival(hidden[row, column - 1])[:, :width]
            chosen = batch.input_ids[row, column][:, None]
            base = policy.gather(-1, chosen).double()
            base_nll -= float(base.sum())
            tokens += len(base)
            for place, rule in enumerate(rules):
                forced = rule.apply(policy, survival).log_policy.gather(-1, chosen).double()
                gone = forced == -torch.inf
                forced = torch.where(gone, base - FLOOR, forced)
                sums[place] += torch.stack((-forced.sum(), (base - forced > CUT).sum(), gone.sum())).cpu()
    return [ForcedLikelihood(nll, base_nll, tokens, int(cut), int(removed)) for nll, cut, removed in sums.tolist()]
