"""How many tokens a model reads, whatever its configuration and its tokenizer say of it."""

from __future__ import annotations

from transformers import PretrainedConfig, PreTrainedTokenizerBase

_POSITIONS_BEGIN_AFTER_PADDING = {
    "camembert",
    "data2vec-text",
    "ibert",
    "longformer",
    "luke",
    "mpnet",
    "roberta",
    "roberta-prelayernorm",
    "xlm-roberta",
    "xlm-roberta-xl",
    "xmod",
}
"""Kinds of models that number positions from the padding id on."""


def context_length(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model was made for, 1 or more.

    Args:
        config: of the model; of one that reads more than text, that of its text part counts.

    Returns:
        The number, or `None` where there is no limit: where the configuration names none, as those of T5 and Mamba, or
        one that is no number above 0, as XLNet's −1.
    """
    text = config.get_text_config()
    longest = _limit(getattr(text, "max_position_embeddings", None))
    if longest is None or text.model_type not in _POSITIONS_BEGIN_AFTER_PADDING:
        return longest
    padding = getattr(text, "pad_token_id", None)
    return max(1, longest - 1 - (1 if padding is None else padding))


def longest_input(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return how many tokens both the model and its tokenizer allow; `None` where neither names a limit."""
    limits = (context_length(config), _limit(tokenizer.model_max_length))
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(value: object) -> int | None:
    """A limit as a whole number; tokenizers without one say 10³⁰."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1 << 40:
        return None
    return int(value) or None
