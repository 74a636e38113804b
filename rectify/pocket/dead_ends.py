"""Training of the pocket Q network: a LoRA adapter on the pocket language model and a low-rank head."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from peft import LoraConfig
from sklearn.metrics import brier_score_loss, roc_auc_score
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoModel, PreTrainedTokenizerBase, Trainer, set_seed

from rectify.heads import LowRankHead
from rectify.pocket.language_model import train_or_resume, training_arguments
from rectify.q_network import DeadEndQNetwork
from rectify.training.q_loss import monte_carlo_loss

logger = logging.getLogger(__name__)


class Trajectories(Dataset):
    """Token ids of prompt and continuation, where the continuation begins, and the reward."""

    def __init__(self, records: Sequence[dict], tokenizer: PreTrainedTokenizerBase) -> None:
        prompts = tokenizer([record["prompt"] for record in records])["input_ids"]
        continuations = tokenizer([record["continuation"] for record in records])["input_ids"]
        self.items = [
            {"ids": [*prompt, *continuation, tokenizer.eos_token_id], "start": len(prompt), "reward": record["reward"]}
            for prompt, continuation, record in zip(prompts, continuations, records, strict=True)
            if prompt and continuation
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict:
        return self.items[index]


def collate(items: Sequence[dict]) -> dict[str, Tensor]:
    """A right-padded batch; `labels` are the rewards."""
    length = max(len(item["ids"]) for item in items)
    ids = torch.zeros(len(items), length, dtype=torch.long)
    mask = torch.zeros(len(items), length, dtype=torch.long)
    counted = torch.zeros(len(items), length, dtype=torch.bool)
    for row, item in enumerate(items):
        end = len(item["ids"])
        ids[row, :end] = torch.tensor(item["ids"])
        mask[row, :end] = 1
        counted[row, item["start"] : end] = True
    reward = torch.tensor([item["reward"] for item in items])
    return {"input_ids": ids, "attention_mask": mask, "counted": counted, "labels": reward}


class _Training(nn.Module):
    """The network and its loss, in the form that `Trainer` expects."""

    def __init__(self, network: DeadEndQNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, input_ids: Tensor, attention_mask: Tensor, counted: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.network.encode(input_ids, attention_mask)
        logits = cast(LowRankHead, self.network.head).risk_logits(hidden[:, :-1], input_ids[:, 1:])
        return {"loss": monte_carlo_loss(logits, labels, counted[:, 1:])}


def train_q_network(
    language_model: Path,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[dict],
    validation: Sequence[dict],
    output: Path,
    epochs: float,
    seed: int,
) -> None:
    """Train on trajectories and save in bfloat16; the trunk is recorded as the bundled `"pocket"`."""
    set_seed(seed)
    trunk = AutoModel.from_pretrained(language_model, dtype=torch.float32)
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", base_model_name_or_path="pocket")
    base_rate = float(np.mean([-record["reward"] for record in train]))
    network = DeadEndQNetwork.from_trunk(
        trunk, adapter=adapter, tokenizer=tokenizer, rank=64, mlp_size=192, base_rate=base_rate
    )
    held = Trajectories(validation, tokenizer)
    trainer = Trainer(
        model=_Training(network),
        args=training_arguments(
            output.with_name(output.name + ".work"),
            seed=seed,
            learning_rate=2e-3,
            weight_decay=0.01,
            num_train_epochs=epochs,
            per_device_train_batch_size=128,
            per_device_eval_batch_size=256,
            eval_steps=250,
            save_steps=250,
            remove_unused_columns=False,
            label_names=["labels"],
        ),
        train_dataset=Trajectories(train, tokenizer),
        eval_dataset=held,
        data_collator=collate,
    )
    train_or_resume(trainer)
    network.eval()
    figures = _figures(network, held)
    logger.info("Q network, on %d validation rollouts: %s", len(held), figures)
    settings = {"loss": "monte_carlo", "trajectories": len(train), "epochs": epochs, "seed": seed}
    network.config.training = settings | figures
    network.to(torch.bfloat16).save_pretrained(output)


@torch.no_grad()
def _figures(network: DeadEndQNetwork, held: Trajectories) -> dict[str, Any]:
    """How well the risk of each token foretells the reward model's verdict (≥ 0.5) on the whole continuation."""
    risks, labels, first = [], [], []
    for start in range(0, len(held), 256):
        batch = collate(held.items[start : start + 256])
        values = -network.action_values(batch["input_ids"], batch["attention_mask"])
        counted = batch["counted"]
        risks.append(values[counted])
        labels.append((batch["labels"] <= -0.5)[:, None].expand_as(counted)[counted])
        first.append((counted.cumsum(-1) == 1)[counted])
    risk, label, begins = torch.cat(risks).numpy(), torch.cat(labels).numpy(), torch.cat(first).numpy()
    return {
        "auc_all_positions": round(float(roc_auc_score(label, risk)), 4),
        "auc_first_token": round(float(roc_auc_score(label[begins], risk[begins])), 4),
        "brier": round(float(brier_score_loss(label, risk)), 4),
        "brier_of_constant": round(float(label.mean() * (1 - label.mean())), 4),
    }
