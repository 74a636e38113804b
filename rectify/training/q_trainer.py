"""Training of a dead-end Q network with `transformers.Trainer`."""

from __future__ import annotations

from copy import deepcopy
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback

from rectify.heads import LowRankHead
from rectify.q_network import DeadEndQNetwork
from rectify.training.q_loss import LossKind, expected_values, lambda_returns, polyak_update, q_loss
from rectify.training.trainer import AdapterTrainer, ModelTraining

# states whose whole vocabulary is valued at once under a behaviour policy
_STATES = 512
_UNCOUNTED = -100.0


class QLearning(ModelTraining):
    """A Q network together with its targets and its loss, in the form that `Trainer` expects.

    The target network is a slow copy of the head on the live trunk's states, as in the published system.

    Args:
        network: the network to be trained.
        td_lambda, gamma, q_min, q_max: see `lambda_returns`.
        loss: see `q_loss`.
        behavior_model: a causal language model of the same vocabulary; its policy weighs the next actions (expected
            SARSA). `None` for the action that was taken (SARSA). Not read if λ is 1.
    """

    def __init__(
        self,
        network: DeadEndQNetwork,
        *,
        td_lambda: float = 1.0,
        gamma: float = 1.0,
        q_min: float = -1.0,
        q_max: float = 0.0,
        loss: LossKind = "cross_entropy",
        behavior_model: PreTrainedModel | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.target_head = deepcopy(network.head).requires_grad_(False) if td_lambda < 1 else None
        self.td_lambda = td_lambda
        self.returns: dict[str, float] = {"gamma": gamma, "td_lambda": td_lambda, "q_min": q_min, "q_max": q_max}
        self.loss: LossKind = loss
        # in a tuple, so that it is neither trained nor saved
        self._behavior = () if behavior_model is None else (behavior_model.eval().requires_grad_(False),)

    @property
    def head(self) -> LowRankHead:
        """The online head."""
        return cast(LowRankHead, self.network.head)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        counted: Tensor,
        labels: Tensor,
        hidden: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Loss of a batch, and in evaluation the risk of each token.

        Args:
            input_ids, attention_mask, counted, labels, hidden: see `trajectory_data.collate`.

        Returns:
            `loss`, a scalar; in evaluation also `risks` `[B, T − 1]`, −100 where a token does not count.
        """
        if hidden is None:
            hidden = self.network.encode(input_ids, attention_mask)
        actions = input_ids[:, 1:]
        taken = attention_mask[:, 1:].bool() & attention_mask[:, :-1].bool()
        counted = counted[:, 1:] & taken
        logits = self.head.risk_logits(hidden[:, :-1], actions)
        next_values = None if self.target_head is None else self._next_values(hidden, input_ids, attention_mask)
        targets = lambda_returns(labels.float(), next_values, taken, **self.returns)
        output = {"loss": q_loss(logits, targets, counted, self.loss)}
        if not self.training:
            output["risks"] = logits.sigmoid().masked_fill(~counted, _UNCOUNTED)
        return output

    @torch.no_grad()
    def _next_values(self, hidden: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """`[B, T − 1]`: the target value of the state that each action leads to."""
        head = cast(LowRankHead, self.target_head)
        if not self._behavior:
            values = head(hidden[:, :-1], input_ids[:, 1:])
            return nn.functional.pad(values[:, 1:], (0, 1))
        model = self._behavior[0].to(hidden.device)
        positions = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        policy = model(input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False)
        width = head.tokens.out_features
        pairs = zip(
            policy.logits[:, 1:, :width].flatten(0, 1).split(_STATES),
            hidden[:, 1:].flatten(0, 1).split(_STATES),
            strict=True,
        )
        values = torch.cat([expected_values(logits, head.risk_logits(states)) for logits, states in pairs])
        return values.view(len(input_ids), -1)


class PolyakCallback(TrainerCallback):
    """Moves the target head towards the online one after every optimiser step."""

    def __init__(self, rate: float) -> None:
        self.rate = rate

    def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        learning = cast(QLearning, getattr(model, "module", model))
        if learning.target_head is not None:
            polyak_update(learning.target_head, learning.head, self.rate)


class QTrainer(AdapterTrainer):
    """The Trainer of a `QLearning`; its checkpoints hold the target head too."""

    frozen_but_saved = ("target_head.",)
