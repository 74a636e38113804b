"""Every kind of causal model that transformers builds, in tiny form, and what decoding asks of it as a trunk.

Whatever the memo answers is compared with a run of the trunk over one text alone.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from rectify import DeadEndQNetwork, RectificationProcessor, Tilt
from rectify.causal_states import CausalStates
from rectify.prefix_memo import MASKED, PrefixMemo

VOCABULARY, LENGTH = 97, 18
CLOSE, CLOSE_IN_DOUBLE = 1e-4, 1e-5  # norms are of single precision all the same
RULE = Tilt(beta=2.0)

# what the fields of a configuration are set to, by expressions for their whole names
SIZES = {
    r"vocab_size|n_vocab|.*_vocab_size|vocab_size_per_layer_input|unpadded_vocab_size": VOCABULARY,
    r"max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|max_target_positions|model_max_length": 256,
    r"num_hidden_layers|n_layers?|num_layers|decoder_layers|num_decoder_layers|num_blocks|encoder_layers": 2,
    r"num_encoder_layers|depth|conf_num_hidden_layers|num_layers_per_stack": 1,
    r"num_attention_heads|n_heads?|.*attention_heads|num_heads": 4,
    r".*key_value_heads|num_kv_heads": 2,
    r"hidden_size|n_embd|d_model|emb_dim|embedding_dim|.*embedding_size|word_embed_proj_dim|lru_width": 32,
    r"head_dim|.*_head_dim|kv_channels|attention_head_size|dim_head|d_head|mamba_d_head|mamba_headdim|d_kv": 8,
    r"rotary_dim": 4,
    r"qk_head_dim": 16,
    r".*intermediate_size|n_inner|d_ff|ffn_dim|.*_ffn_dim|dff|dim_ff|feed_forward_size|ffn_hidden_size|d_inner": 48,
    r"expert_ffn_hidden_size|intermediate_size_mlp": 48,
    r"num_experts|num_local_experts|n_routed_experts|moe_num_experts": 4,
    r"num_experts_per_tok|num_experts_per_token|moe_top_k|moe_k|moe_topk|top_k|topk_group|n_group|num_expert_group": 2,
    r"n_group|topk_group": 1,
    r"sliding_window|attention_window_size|window_size|attention_chunk_size|local_attention|sliding_window_size": 6,
    r"keep_window_size": 64,
    r"q_lora_rank|router_hidden_size|d_rel|adapter_rank": 16,
    r"kv_lora_rank|o_lora_rank|laurel_rank|hc_lowrank": 8,
    r"hidden_size_per_layer_input": 8,
    r"state_size|ssm_state_size|mamba_d_state": 8,
    r"mamba_n_heads|mamba_num_heads|linear_num_(key|value)_heads|linear_num_heads": 4,
    r"(mamba_|mamba2_)?chunk_size|mamba_chunk_size": 8,
    r"time_step_rank|mamba_dt_rank": 2,
    r"index_n_heads": 2,
    r"index_topk": 64,
    r"num_kv_shared_layers|num_nextn_predict_layers": 0,
    r"image_size": 28,
    r"patch_size": 14,
    r"n_groups|mamba_n_groups|mamba_ngroups": 1,
    r"encoder_hash_byte_group_vocab": 100,
    r"block_size|index_block_size": 8,
}

LAYERS = {"num_hidden_layers": 2}
MAMBA = {"use_mamba_kernels": False}
# what single kinds need besides, or instead; `None` drops a field
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16},
    "granitemoehybrid": {"mamba_d_head": 16},
    "falcon_h1": {"mamba_d_ssm": 32},
    "mamba2": {"head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "reformer": {"axial_pos_shape": (16, 16), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "local"]},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "num_hidden_layers": 4,
    },
    "hrm_text": {"num_hidden_layers": None, "num_layers_per_stack": 2},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, **MAMBA},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "kimi_linear": {"num_experts_per_token": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"]},
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "deepseek_v4": {"layer_types": None, "num_hidden_layers": 4},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "zaya": {"num_experts_per_tok": 1},
    "xmod": {"default_language": "en_XX"},
    "phi3": {
        "max_position_embeddings": 256,
        "original_max_position_embeddings": 12,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [3.0] * 4,
            "original_max_position_embeddings": 12,
        },
    },
}


def small(config: PreTrainedConfig, kind: str = "", given: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a configuration's fields are set to: sizes by their names, special tokens within the vocabulary."""
    found: dict[str, Any] = {}
    last = VOCABULARY - 1
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found[name] = small(value)
        elif isinstance(value, int) and not isinstance(value, bool):
            for pattern, size in SIZES.items():
                if re.fullmatch(pattern, name):
                    found[name] = size
            if name.endswith(("token_id", "token_index")) and value >= VOCABULARY:
                found[name], last = last, last - 1
        elif name.endswith("token_id") and isinstance(value, list):
            found[name] = [2]
    found |= {"initializer_range": 0.3} if hasattr(config, "initializer_range") else {}
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        found[name] = ("pad_token_id", "bos_token_id", "eos_token_id").index(name)
    if "kv_lora_rank" in found:  # all heads read one latent
        found["num_key_value_heads"] = found.get("num_attention_heads", 4)
    for name in ("layer_types", "layers_block_type", "block_types"):
        read_only = isinstance(getattr(type(config), name, None), property)
        if isinstance(vars(config).get(name), list | tuple) and not read_only:
            kinds = [*dict.fromkeys(getattr(config, name))]  # one layer of each kind
            found[name] = kinds * (2 if len(kinds) == 1 else 1)
            found["num_hidden_layers"] = len(found[name])
    found |= given or {}
    return {name: value for name, value in found.items() if value is not None}


def build(kind: str) -> PreTrainedModel:
    """A tiny random model of a kind."""
    defaults = AutoConfig.for_model(kind)
    own = dict(OWN.get(kind, {}))
    nested = {name: own.pop(name) for name in [*own] if isinstance(getattr(defaults, name, None), PreTrainedConfig)}
    values = small(defaults, kind, own)
    for name, inner in nested.items():
        values[name] |= inner
    torch.manual_seed(0)
    config = type(defaults)(**values)
    for one in (config, config.get_text_config()):
        if getattr(one, "is_decoder", True) is False and not config.is_encoder_decoder:
            one.is_decoder = True
    return AutoModelForCausalLM.from_config(config, attn_implementation=own.get("attn_implementation")).eval()


# ---------------------------------------------------------------------------------------------------------------------
# What is asked of each


class Wrong(Exception):
    """An answer that is not that of a run over the text alone."""


def draw(rows: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 80, (rows, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def alone(trunk: PreTrainedModel, row: Tensor) -> Tensor:
    """The state after one text without padding, mask or cache."""
    return cast(Any, trunk)(input_ids=row[row != MASKED][None], use_cache=False).last_hidden_state[0, -1]


def compare(found: Tensor, trunk: PreTrainedModel, prefixes: Tensor, what: str) -> None:
    for number, (state, row) in enumerate(zip(found, prefixes, strict=True)):
        expected = alone(trunk, row)
        gap = float((state - expected).abs().max() / expected.abs().max().clamp_min(1))
        if not gap <= (CLOSE_IN_DOUBLE if state.dtype == torch.float64 else CLOSE):
            raise Wrong(f"{what}, row {number}: {gap:.1e}")


def prefixes_asked() -> Iterator[tuple[str, Tensor]]:
    """Prefixes as decoding asks for them."""
    ids = draw(3, LENGTH)
    for length in range(7, LENGTH + 1):
        yield "growing", ids[:, :length]
    yield "several at once", torch.cat((ids, draw(3, 3, 1)), 1)
    yield "rolled back", ids[:, :9]
    yield "rows permuted", torch.cat((ids[[2, 0, 0, 1], :9], draw(4, 1, 2)), 1)
    padded = ids.clone()
    padded[0, :5] = padded[1, :1] = MASKED
    for length in (10, 11, 12, LENGTH):
        yield "padded", padded[:, :length]
    written = ids.clone()
    written[0, 6] = written[1, 8] = 0
    for length in (6, 7, 9, 10):
        yield "a padding token in the text", written[:, :length]
    other = draw(3, 10, 3)
    other[1, 3:6] = MASKED
    yield "padded between", other
    yield "short", other[:, :2]


def try_memo(network: DeadEndQNetwork, trunk: PreTrainedModel) -> bool:
    """Whether the memo kept a cache."""
    memo, slow = PrefixMemo(network), PrefixMemo(network, use_cache=False)
    for what, prefixes in prefixes_asked():
        compare(memo.last_hidden(prefixes), trunk, prefixes, what)
    for what, prefixes in [*prefixes_asked()][-6:]:
        compare(slow.last_hidden(prefixes), trunk, prefixes, f"{what}, without a cache")
    return memo.use_cache


def try_branches(trunk: PreTrainedModel) -> None:
    states = CausalStates(trunk)
    memo, ids, tokens = PrefixMemo(states), draw(2, 10), draw(2, 3, 4)
    ids[1, :3] = MASKED
    for length in (8, 9, 10):
        found = memo.branch_states(ids[:, :length], tokens)
        for place in range(3):
            texts = torch.cat((ids[:, :length], tokens[:, place, None]), 1)
            compare(found[:, place], trunk, texts, "branches")


def try_training(network: DeadEndQNetwork, trunk: PreTrainedModel) -> None:
    """The states of texts that are padded on the right."""
    ids, mask = draw(3, 12), torch.ones(3, 12, dtype=torch.long)
    mask[0, 5:] = mask[1, 11:] = 0
    with torch.no_grad():
        states = network.encode(ids, mask)
    for length in (1, 4, 5, 11, 12):
        rows = (mask.sum(-1) >= length).nonzero()[:, 0]
        compare(states[rows, length - 1], trunk, ids[rows, :length], "padded on the right")


class Watched(RectificationProcessor):
    """Compares the states that are caught with those of the texts alone."""

    network: DeadEndQNetwork
    what: str

    def decide(self, input_ids: Tensor, scores: Tensor) -> Any:
        assert self._q is not None
        real = self._padding.real(input_ids)
        prefixes = input_ids.masked_fill(~real, MASKED)
        found = self._q.memo.last_hidden(prefixes)
        assert found is not None
        compare(found, cast(PreTrainedModel, self.network.trunk), prefixes, self.what)
        return super().decide(input_ids, scores)


def try_shared(model: PreTrainedModel, network: DeadEndQNetwork, number: int | None) -> None:
    ids, mask = draw(3, 6), torch.ones(3, 6, dtype=torch.long)
    mask[0, :3] = 0
    options: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 2}
    for what, given in (
        ("shared, greedy", {}),
        ("shared, padded", {"attention_mask": mask}),
        ("shared, beams", {"num_beams": 3}),
    ):
        settings: dict[str, Any] = {"attention_mask": torch.ones_like(mask), "do_sample": False, **given, **options}
        try:
            cast(Any, model).generate(ids, **settings)
        except Exception:  # what transformers cannot do itself is not asked for
            continue
        processor = Watched(network, RULE, model=model, do_sample=False, attention_mask=settings["attention_mask"])
        processor.network, processor.what = network, what  # type: ignore[attr-defined]
        cast(Any, model).generate(ids, logits_processor=[processor], **settings)


def try_kind(kind: str, model: PreTrainedModel) -> str:
    network = DeadEndQNetwork.from_trunk(model, rank=4)
    trunk = cast(PreTrainedModel, network.trunk)
    kept = try_memo(network, trunk)
    try_training(network, trunk)
    try_branches(trunk)
    with tempfile.TemporaryDirectory() as folder:
        network.save_pretrained(Path(folder) / "q")
        again = DeadEndQNetwork.from_pretrained(Path(folder) / "q")
    again = again.to(network.head.tokens.weight.dtype)
    ids = draw(2, 8)
    with torch.no_grad():
        gap = float((again(ids) - network(ids)).abs().max())
    if not gap <= CLOSE:
        raise Wrong(f"loaded again: {gap:.1e}")
    shared = DeadEndQNetwork.from_trunk(model, shared=True, rank=4)
    if model.can_generate():
        try_shared(model, shared, None)
    return "right" if kept else "right without a cache"
