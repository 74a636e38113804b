"""The dead-end Q network: a causal trunk and a vocabulary head, `Q(s, a) ∈ [−1, 0]`.

`−Q(s, a)` estimates the probability that the finished text is toxic when token `a` follows the prefix `s`.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModel, Cache, PreTrainedModel, PreTrainedTokenizerBase

from rectify.adapters import adapt_body, fold_in, load_any_adapter, save_adapter
from rectify.causal_body import causal_body, loads_alone
from rectify.context import context_length
from rectify.effective_weights import has_adapter
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.first_aid import with_q_advice
from rectify.heads import LowRankHead, PublishedHead
from rectify.hub import checkpoint_folder, model_place
from rectify.json_files import write_whole
from rectify.padding import follows
from rectify.pretrained import read_model, refusing
from rectify.quiet_peft import PeftConfig, PeftModel
from rectify.risk_model import TextRisk
from rectify.saved_config import read_config
from rectify.saved_weights import check_finite, read_weights, shapes_of
from rectify.strength import Strength, no_better_than_constant
from rectify.trunk_probe import abilities_of
from rectify.trunk_states import Abilities, hidden_states, input_device, takes_positions, text_states, weights_of
from rectify.vocabulary import Fingerprint
from rectify.weights_digest import check_base, weights_digest

logger = logging.getLogger(__name__)

CONFIG_FILE, HEAD_FILE = "q_config.json", "head.safetensors"
TRUNK_FOLDER, ADAPTER_FOLDER = "trunk", "adapter"


@dataclass
class QConfig:
    """Everything about a Q network but its weights; saved as `q_config.json`.

    Attributes:
        vocab_size: number of tokens that the head values.
        hidden_size: width of the trunk.
        head: `"low_rank"`, or `"published"` for imported checkpoints.
        rank: width of the low-rank head's token factors.
        mlp_size: width of its residual MLP, 0 for none.
        base_rate: toxicity probability that every value started from.
        base_model: Hub id, folder or bundled name of the frozen trunk where only an adapter was trained; `None` where
            the whole trunk is saved.
        base_revision: revision of `base_model` on the Hub.
        base_fingerprint: digest of all weights of the trunk that is not saved, shared or under the adapter, so that
            no other is read, see `weights_digest`; `None` to take any.
        shared: the trunk is the generating model's own, untouched; only the head is trained and saved.
        signature: of older folders alone: a few of a shared trunk's weights.
        vocabulary: fingerprint of the tokenizer, or `None` where it is not known.
        training: free-form record of how the weights came to be.
        strength: how strongly the network is applied where nobody says; `None` for the rule's own default.
    """

    vocab_size: int
    hidden_size: int
    head: Literal["low_rank", "published"] = "low_rank"
    rank: int = 64
    mlp_size: int = 0
    base_rate: float = 0.1
    base_model: str | None = None
    base_revision: str | None = None
    base_fingerprint: str | None = None
    shared: bool = False
    signature: list[float] | None = None
    vocabulary: Fingerprint | None = None
    training: dict[str, Any] = field(default_factory=dict)
    strength: Strength | None = None

    def __post_init__(self) -> None:
        if isinstance(self.vocabulary, dict):
            self.vocabulary = Fingerprint(**self.vocabulary)
        if isinstance(self.strength, dict):
            self.strength = Strength(**self.strength)
        if self.head not in ("low_rank", "published"):
            raise InvalidArgumentError(f"head is {self.head!r}: give 'low_rank' or 'published'")
        if self.vocab_size < 1 or self.hidden_size < 1:
            raise InvalidArgumentError(
                f"vocab_size is {self.vocab_size}, hidden_size {self.hidden_size}: give 1 or more of both"
            )
        if self.rank < 1 or self.mlp_size < 0:
            raise InvalidArgumentError(f"rank is {self.rank}, mlp_size {self.mlp_size}: give 1 or more, and 0 or more")
        if not 0 < self.base_rate < 1:
            raise InvalidArgumentError(f"base_rate is {self.base_rate}: give a probability above 0 and below 1")


class DeadEndQNetwork(nn.Module):
    """A causal trunk of any Hugging Face architecture and a vocabulary head.

    Make one with `from_trunk`, `from_pretrained` or `rectify.published.import_published`.

    Example:
        >>> from rectify import DeadEndQNetwork
        >>> q_network = DeadEndQNetwork.from_pretrained("pocket-q")
        >>> q = q_network(torch.tensor([[17, 42, 7]]))  # Q of every token after each prefix
        >>> q.shape, bool((-1 <= q).all() and (q <= 0).all())
        (torch.Size([1, 3, 8192]), True)
    """

    trunk: PreTrainedModel | PeftModel

    def __init__(self, config: QConfig, trunk: PreTrainedModel | PeftModel) -> None:
        super().__init__()
        self.config = config
        if config.shared:  # borrowed: it is not moved, put into a mode, trained or saved with the head
            object.__setattr__(self, "trunk", trunk)
        else:
            self.trunk = trunk
        self.head = _make_head(config)
        self._takes_positions = takes_positions(trunk.get_base_model() if isinstance(trunk, PeftModel) else trunk)

    # -----------------------------------------------------------------------------------------------------------------
    # Making, saving, loading

    @classmethod
    def from_trunk(
        cls,
        trunk: PreTrainedModel,
        *,
        adapter: PeftConfig | None = None,
        shared: bool = False,
        name: str | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        rank: int = 64,
        mlp_size: int = 0,
        base_rate: float = 0.1,
    ) -> DeadEndQNetwork:
        """A new network on a trunk, every value at `−base_rate`.

        Args:
            trunk: a causal model, with or without its language-model head (which is left out), see `causal_body`. It
                is used as it is, not copied: training the network trains it, and an adapter is put into it.
            adapter: a peft configuration of layers, whatever its `task_type`: the trunk is frozen, and only adapter
                and head are trained and saved. Its `base_model_name_or_path`, else the trunk's own name, says where to
                find the trunk again.
            shared: the trunk stays as it is, and its last hidden states, which the output embedding reads, feed the
                head; while the same model generates, they cost nothing. An adapter that is active in it is a part of
                it, and is needed again.
            name: where a shared trunk is found again (default: its own name); without one, `from_pretrained` needs
                the model.
            tokenizer: whose vocabulary is recorded, so that a model of another one is refused.
            rank, mlp_size, base_rate: see `QConfig`.

        Raises:
            InvalidArgumentError: the trunk is not causal, or it is not shared and has an adapter already or is the
                decoder of an encoder-decoder, or `adapter` makes none of it, or nothing says where the trunk can be
                loaded from.
        """
        body = causal_body(trunk, "trunk")
        if not shared and has_adapter(body):
            raise InvalidArgumentError(
                "trunk has a peft adapter in its layers, with which it would not be found again: give "
                "trunk.merge_and_unload(), or shared=True"
            )
        if not shared and not loads_alone(body):
            raise InvalidArgumentError(
                f"trunk is a {type(body).__name__}, which transformers does not load by itself: give shared=True, or a "
                "decoder-only model"
            )
        embedding = cast(nn.Embedding, body.get_input_embeddings())
        own_name, commit = body.name_or_path or None, getattr(body.config, "_commit_hash", None)
        config = QConfig(
            vocab_size=embedding.weight.shape[0],
            hidden_size=body.config.get_text_config().hidden_size,
            rank=rank,
            mlp_size=mlp_size,
            base_rate=base_rate,
            vocabulary=Fingerprint.of(tokenizer) if tokenizer is not None else None,
        )
        if shared:
            if adapter is not None:
                raise InvalidArgumentError("adapter is given with shared=True: a shared trunk stays as it is")
            config.shared, config.base_model = True, name or own_name
            config.base_revision = commit
        if adapter is not None:
            config.base_model = adapter.base_model_name_or_path or own_name
            config.base_revision = adapter.revision or (commit if config.base_model == own_name else None)
            if not config.base_model:
                raise InvalidArgumentError(
                    "adapter names no base_model_name_or_path and the trunk was made in memory: "
                    "say where the trunk can be loaded from, or train it whole"
                )
        if shared or adapter is not None:
            config.base_fingerprint = weights_digest(body)
        network = cls(config, body if adapter is None else adapt_body(body, adapter))
        with weights_of(embedding) as embeddings:
            cast(LowRankHead, network.head).start_from_embeddings(embeddings)
        network.head.to(input_device(network.trunk))
        abilities_of(network.trunk)  # refused now, if it is not causal
        return network

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device | None = None,
        is_trainable: bool = False,
        model: PreTrainedModel | None = None,
    ) -> DeadEndQNetwork:
        """Load a network from a folder, a bundled name (`"pocket-q"`) or a Hub id, in evaluation mode.

        Args:
            name: folder, bundled name or Hub id.
            revision: of a Hub id.
            dtype: of the weights; values are float32 whatever it is.
            device: where to put it.
            is_trainable: keep the adapter apart from the trunk; otherwise it is folded in, which is faster.
            model: the model that a shared trunk belongs to; without it the trunk is loaded a second time.

        Raises:
            CheckpointError: nothing usable is there, or `model` is not the one that a shared head was trained on.
        """
        folder = checkpoint_folder(name, revision)
        with refusing(name):
            config = read_config(QConfig, folder / CONFIG_FILE, "give a folder written by save_pretrained")
            weights = read_weights(folder / HEAD_FILE, shapes_of(lambda: _make_head(config)))
            trunk: PreTrainedModel | PeftModel
            if config.shared:
                try:
                    trunk = _shared_trunk(config, model, dtype, device, f"Q network {str(name)!r}")
                except CheckpointError as error:
                    raise (error if model is None else with_q_advice(error, model.name_or_path or "MODEL")) from None
            elif config.base_model is None:
                if not (folder / TRUNK_FOLDER).is_dir():
                    raise CheckpointError(f"it holds no {TRUNK_FOLDER}: is it complete?")
                trunk, _ = read_model(AutoModel, folder / TRUNK_FOLDER, dtype=dtype, exact=True)
            else:
                base = model_place(config.base_model, config.base_revision)
                trunk, _ = read_model(AutoModel, base, config.base_revision, dtype=dtype)
                body = causal_body(trunk)
                check_base(body, config.base_fingerprint, config.base_model, f"Q network {str(name)!r}")
                trunk = load_any_adapter(body, folder / ADAPTER_FOLDER, is_trainable)
                if not is_trainable:
                    fold_in(trunk)
                check_finite(trunk, "the adapted trunk")
            width = trunk.config.get_text_config().hidden_size
            if width != config.hidden_size:
                raise CheckpointError(
                    f"hidden_size is {config.hidden_size}, and its trunk has {width}: is it the right one?"
                )
            network = cls(config, trunk)
            network.head.load_state_dict(weights)
            network.to(device=device, dtype=dtype).eval()
            abilities_of(network.trunk)  # refused now, if it is not causal
        if no_better_than_constant(config.training, "eval_"):
            logger.warning(
                "Q network %r: by the figures of its training it is no better than a constant, so it changes texts "
                "without making them safer: train another on more trajectories",
                str(name),
            )
        return network

    def save_pretrained(self, folder: str | Path) -> None:
        """Write configuration, head, and the trunk (or only its adapter; nothing of a shared one) to a folder."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}, folder / HEAD_FILE)
        if not self.config.shared and isinstance(self.trunk, PeftModel):
            save_adapter(self.trunk, folder / ADAPTER_FOLDER, cast(str, self.config.base_model))
        elif not self.config.shared:
            self.trunk.save_pretrained(str(folder / TRUNK_FOLDER))
        # the last file, as it says that the network is whole
        write_whole(folder / CONFIG_FILE, json.dumps(asdict(self.config), indent=2, ensure_ascii=False) + "\n")

    # -----------------------------------------------------------------------------------------------------------------
    # Values

    @property
    def device(self) -> torch.device:
        """Where token ids go, and the head is."""
        return next(chain(self.head.parameters(), self.trunk.parameters())).device

    @property
    def context(self) -> int | None:
        """Longest prefix in tokens that the trunk was made for, or `None` where it names no limit."""
        return context_length(self.trunk.config)

    @property
    def abilities(self) -> Abilities:
        """What the trunk was seen to do; raises `InvalidArgumentError` where it is not causal."""
        return abilities_of(self.trunk)

    def encode(self, input_ids: Tensor, attention_mask: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        """Hidden states of the last positions, `[B, T, hidden_size]`; see `hidden_states` and `text_states`."""
        if cache is not None:
            states = hidden_states(self.trunk, input_ids, attention_mask, cache, self._takes_positions)
        else:
            states = text_states(self.trunk, input_ids, attention_mask, self.abilities, self._takes_positions)
        return states.to(self.device)  # where layers are spread over several, the last is on another

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`Q[b, t, a]`, the value of token `a` after the prefix `input_ids[b, :t + 1]`: `[B, T, V]` float32."""
        return self.head(self.encode(input_ids, attention_mask))

    def action_values(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`Q` of each token that was taken, given its prefix.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 0 at padding.

        Returns:
            `[B, T]` float32, NaN at padding and at the first real token, which has no prefix.
        """
        hidden = self.encode(input_ids, attention_mask)
        values = self.head(hidden[:, :-1], input_ids[:, 1:])
        values = torch.nn.functional.pad(values, (1, 0), value=torch.nan)
        if attention_mask is None:
            return values
        return values.masked_fill(~follows(attention_mask), torch.nan)


def _make_head(config: QConfig) -> LowRankHead | PublishedHead:
    if config.head == "published":
        return PublishedHead(config.hidden_size, config.vocab_size)
    return LowRankHead(config.hidden_size, config.vocab_size, config.rank, config.mlp_size, config.base_rate)


def _shared_trunk(
    config: QConfig, model: PreTrainedModel | None, dtype: torch.dtype, device: str | torch.device | None, what: str
) -> PreTrainedModel:
    """The trunk of the model, if it is the right one; without a model, a copy of its own."""
    if model is not None:
        trunk = causal_body(model)
    elif config.base_model is None:
        raise CheckpointError("its trunk is that of a model without a name: pass model=")
    else:
        place = model_place(config.base_model, config.base_revision)
        trunk, _ = read_model(AutoModel, place, config.base_revision, dtype=dtype)
        trunk = causal_body(trunk.to(device).eval())  # type: ignore[arg-type]
    name = config.base_model or "its model"
    if config.base_fingerprint is None and config.signature is not None:
        _check_signature(trunk, config.signature, name)
    check_base(trunk, config.base_fingerprint, name, what)
    return trunk


@torch.no_grad()
def _check_signature(trunk: PreTrainedModel, recorded: list[float], name: str) -> None:
    """Compare the 32 weights of the last matrix that older folders hold, with three digits."""
    weight = [parameter for parameter in trunk.parameters() if parameter.ndim == 2][-1]
    if not weight.is_floating_point() or weight.is_meta:
        return
    places = torch.linspace(0, weight.numel() - 1, 32, dtype=torch.float64).long().to(weight.device)
    found, wanted = weight.flatten()[places].float().cpu(), torch.tensor(recorded)
    # as near as half precision keeps weights
    if not torch.allclose(found, wanted, rtol=0.02, atol=0.01 * float(wanted.abs().mean())):
        raise CheckpointError(
            f"the head was trained on the hidden states of {name!r}, and the model given has other weights: give that "
            "model, or train a head for this one"
        )


@torch.no_grad()
def token_risks(q_network: TextRisk, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """The risk `−Q(s, a)` of each token of finished texts: how probable a toxic ending was once it was chosen.

    Args:
        q_network: the network, another risk model, or a detector's value.
        input_ids: `[B, T]` int64.
        attention_mask: `[B, T]`, 0 at padding.

    Returns:
        `[B, T]` float32 in [0, 1]; NaN at padding and at the first real token, whose risk is not known.
    """
    device = q_network.device
    mask = None if attention_mask is None else attention_mask.to(device)
    return -q_network.action_values(input_ids.to(device), mask)
