"""Kinds of trunks with states of their own: what decoding asks of each is right, with a cache or without, or refused.

The others are in `eval/trunk_kinds.py`.
"""

import pytest
import torch

from rectify import DeadEndQNetwork, InvalidArgumentError, RectificationProcessor, Tilt
from rectify.evaluation.trunk_kinds import build, draw, try_kind

KINDS = {
    "openai-gpt": "right without a cache",  # takes none
    "lfm2": "right without a cache",  # convolutions, whose states are not kept for each position
    "recurrent_gemma": "right without a cache",  # what stands at padding is read by a convolution
    "rwkv": "right without a cache",
    "minimax": "right without a cache",  # its own cache does not reorder all that it holds
    "phi3": "right",  # longer texts are rotated in another way
    "modernbert-decoder": "right",  # its output embedding does not read the last state
    "roberta": "right without a cache",  # counts the tokens that are no padding
    "deepseek_v3": "right",  # latent attention
    "gemma3_text": "right",  # windows in some layers
    "bloom": "right",  # distances instead of positions
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_whole_texts(kind):
    assert try_kind(kind, build(kind)) == KINDS[kind]


def test_what_a_model_keeps_in_itself_is_left_there():
    model, ids = build("recurrent_gemma"), draw(2, 6)
    options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    expected = model.generate(ids, **options)
    network = DeadEndQNetwork.from_trunk(model, shared=True, rank=4)
    processor = RectificationProcessor(network, Tilt(beta=0.0), model=model, do_sample=False)
    assert torch.equal(model.generate(ids, logits_processor=[processor], **options), expected)


@pytest.mark.parametrize("kind", ["xlnet", "xlm", "cpmant"])
def test_what_reads_on_both_sides_is_refused(kind):
    with pytest.raises(InvalidArgumentError, match="not causal: two texts with one beginning"):
        try_kind(kind, build(kind))
