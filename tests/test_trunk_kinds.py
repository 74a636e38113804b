"""Kinds of trunks with states of their own: what decoding asks of each is right, with a cache or without, or refused.

The others are in `eval/trunk_kinds.py`.
"""

import pytest

from rectify import InvalidArgumentError
from rectify.evaluation.trunk_kinds import build, try_kind

KINDS = {
    "openai-gpt": "right without a cache",  # takes none
    "lfm2": "right without a cache",  # convolutions, whose states are not kept for each position
    "recurrent_gemma": "right without a cache",  # what stands at padding is read by a convolution
    "rwkv": "right without a cache",
    "minimax": "right without a cache",  # its own cache does not reorder all that it holds
    "phi3": "right",  # longer texts are rotated in another way
    "modernbert-decoder": "right",  # its output embedding does not read the last state
    "roberta": "right",  # counts positions from the padding token
    "deepseek_v3": "right",  # latent attention
    "gemma3_text": "right",  # windows in some layers
    "bloom": "right",  # distances instead of positions
}


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_whole_texts(kind):
    assert try_kind(kind, build(kind)) == KINDS[kind]


@pytest.mark.parametrize("kind", ["xlnet", "xlm", "cpmant"])
def test_what_reads_on_both_sides_is_refused(kind):
    with pytest.raises(InvalidArgumentError, match="not causal: two texts with one beginning"):
        try_kind(kind, build(kind))
