"""What `train_q.py` can be told; flags that the published system had keep their names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from rectify.errors import InvalidArgumentError


@dataclass
class ModelArguments:
    """The network."""

    model_name_or_path: str = field(metadata={"help": "causal model to start from: a folder, a Hub id or 'pocket'"})
    tokenizer_name: str | None = field(default=None, metadata={"help": "its tokenizer, if it lies elsewhere"})
    trunk: Literal["own", "shared"] = field(
        default="own",
        metadata={
            "help": "own: a trunk beside the generating model; shared: its own hidden states, untouched, and a head"
        },
    )
    rank: int = field(default=64, metadata={"help": "width of the head's token factors"})
    mlp_size: int = field(default=0, metadata={"help": "width of the head's residual MLP, 0 for none"})
    lora_r: int = field(default=0, metadata={"help": "rank of a LoRA adapter; 0 trains and saves the whole trunk"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale of the adapter (default: twice lora_r)"})
    strength_model: str | None = field(
        default=None,
        metadata={
            "help": "model that is to be rectified, for which a strength is chosen and stored: at most 1.05 times the "
            "perplexity of clean validation texts (default: the one that made the trajectories, where their folder "
            "tells, else model_name_or_path; none: choose none)"
        },
    )

    def __post_init__(self) -> None:
        for name, least in (("rank", 1), ("mlp_size", 0), ("lora_r", 0)):
            if getattr(self, name) < least:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give {least} or more")
        if self.trunk == "shared" and self.lora_r:
            raise InvalidArgumentError(f"lora_r is {self.lora_r} with trunk 'shared', which stays as it is: give 0")


@dataclass
class DataArguments:
    """The trajectories."""

    train_file: list[str] = field(
        metadata={"help": 'JSON lines: {"text", "reward"} or {"prompt", "continuation", "reward"}, reward in [-1, 0]'}
    )
    validation_file: list[str] = field(default_factory=list, metadata={"help": "the same, for evaluation"})
    validation_split_percentage: float = field(
        default=5,
        metadata={
            "help": "share of train_file for evaluation without the above, by the hash of the prompt, or of a text's "
            "first words"
        },
    )
    block_size: int = field(default=1024, metadata={"help": "longest trajectory in tokens; the rest is cut off"})
    append_eos: bool = field(
        default=True, metadata={"help": "end trajectories with the end token, to learn the risk of ending there"}
    )
    ignore_prompt: bool = field(
        default=True, metadata={"help": "leave the tokens of a separate prompt out of the loss: they are no actions"}
    )
    calibration_file: list[str] = field(
        default_factory=list,
        metadata={"help": "rollouts of the model, to which scale and shift of the risk's logits are fitted at the end"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.validation_split_percentage < 100:
            raise InvalidArgumentError(
                f"validation_split_percentage is {self.validation_split_percentage}: give a number between 0 and 100"
            )
        if self.block_size < 2:
            raise InvalidArgumentError(f"block_size is {self.block_size}: give 2 tokens or more")


@dataclass
class LossArguments:
    """The targets and the loss."""

    td_lambda: float = field(
        default=1.0, metadata={"help": "λ of the returns: 0 one-step SARSA (the published one), 1 Monte Carlo"}
    )
    gamma: float = field(default=1.0, metadata={"help": "discount γ"})
    q_min: float = field(default=-1.0, metadata={"help": "least target"})
    q_max: float = field(default=0.0, metadata={"help": "greatest target"})
    polyak_update_lr: float = field(
        default=0.1, metadata={"help": "share of the online head that enters the target head at each step"}
    )
    loss: Literal["cross_entropy", "squared_error"] = field(
        default="cross_entropy", metadata={"help": "distance of the risk to its target"}
    )
    behavior_model: str | None = field(
        default=None,
        metadata={"help": "language model whose policy weighs the next actions: expected SARSA (with td_lambda < 1)"},
    )

    def __post_init__(self) -> None:
        for name in ("td_lambda", "gamma", "polyak_update_lr"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidArgumentError(f"{name} is {getattr(self, name)}: give a number from 0 to 1")
        if not -1 <= self.q_min < self.q_max <= 0:
            raise InvalidArgumentError(
                f"q_min is {self.q_min} and q_max {self.q_max}: give -1 <= q_min < q_max <= 0, the range of the values"
            )
        if self.behavior_model is not None and self.td_lambda == 1:
            raise InvalidArgumentError(
                f"behavior_model is {self.behavior_model!r} with td_lambda 1: Monte Carlo asks no policy; "
                "give a smaller td_lambda, or leave behavior_model out"
            )
