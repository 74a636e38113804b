"""A tiny random language model that reads every text, a byte a token."""

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WIDTHS = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def byte_tokenizer(merges=()):
    """The end token, every byte, and what pairs of tokens are joined to."""
    tokens = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    tokenizer = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, list(merges)))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def byte_model(merges=(), seed=0, context=512):
    """The model and its tokenizer."""
    torch.manual_seed(seed)
    tokenizer = byte_tokenizer(merges)
    ends = {"eos_token_id": 0, "pad_token_id": 0, "bos_token_id": None}
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": context, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**WIDTHS, **sizes, **ends)).eval(), tokenizer


def save_byte_model(folder, **how):
    for part in byte_model(**how):
        part.save_pretrained(folder)
    return folder
