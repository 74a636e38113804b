"""Causal classifiers of random weights whose scores vary, and what they say of whole texts."""

import copy

import torch
from conftest import build_model, build_tokenizer
from transformers import JambaConfig, JambaForCausalLM

from rectify.detectors import ToxicityClassifier
from rectify.prefix_memo import MASKED

KINDS = ["gpt2", "llama", "sliding", "recurrent"]
SIZES = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.3}
HEADS = {"num_hidden_layers": 2, "num_attention_heads": 2}


def recurrent():
    """Jamba, the recurrent model that transformers makes classifiers of: one layer of Mamba and one of attention."""
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "num_experts_per_tok": 1}
    mamba = {"use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 2}
    torch.manual_seed(3)
    return JambaForCausalLM(JambaConfig(**SIZES, **HEADS, **layers, **mamba, num_key_value_heads=1, pad_token_id=0))


def build_classifier(folder, kind="llama", model=None, max_length=24, **settings):
    """A classifier on a model that is saved into a folder."""
    model = model or (recurrent() if kind == "recurrent" else build_model(kind, seed=3))
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    torch.manual_seed(1)
    classifier = ToxicityClassifier.from_backbone(str(folder), max_length=max_length, **settings)
    with torch.no_grad():
        for name, parameter in classifier.named_parameters():
            if parameter.requires_grad:
                parameter.add_((0.5 if "score" in name else 0.1) * torch.randn_like(parameter))
    return classifier.requires_grad_(False).eval()


@torch.no_grad()
def toxicity_of(classifier, prefixes, tokens):
    """The first label's probability of each whole text, of one prefix at a time, without padding or cache."""
    inner = classifier.model.get_base_model()
    if not inner._is_stateful:  # Mamba's layers have no float64
        inner = copy.deepcopy(inner).double()
    found = []
    for row, candidates in zip(prefixes, tokens, strict=True):
        texts = torch.stack([torch.cat((row[row != MASKED], token[None])) for token in candidates])
        hidden = inner.base_model(input_ids=texts, use_cache=False).last_hidden_state[:, -1]
        found.append(inner.score(hidden)[:, 0].double().sigmoid())
    return torch.stack(found)
