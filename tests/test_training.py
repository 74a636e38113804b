"""The Monte Carlo loss against a loop, and that it teaches a head the risk of each token."""

import math

import pytest
import torch

from rectify.heads import LowRankHead
from rectify.training.q_loss import monte_carlo_loss


def test_the_loss_is_the_mean_cross_entropy_of_the_counted_tokens():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, generator=generator)
    reward = torch.tensor([0.0, -0.3, -1.0])
    mask = torch.rand(3, 4, generator=generator) < 0.6
    terms = []
    for row in range(3):
        for place in range(4):
            if mask[row, place]:
                risk = 1 / (1 + math.exp(-logits[row, place].item()))
                y = -reward[row].item()
                terms.append(-y * math.log(risk) - (1 - y) * math.log(1 - risk))
    assert monte_carlo_loss(logits, reward, mask).item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)


def test_nothing_counted_is_no_loss():
    assert monte_carlo_loss(torch.zeros(1, 2), torch.zeros(1), torch.zeros(1, 2, dtype=torch.bool)) == 0


def test_a_head_learns_the_frequency_of_toxic_endings():
    torch.manual_seed(0)
    head = LowRankHead(hidden_size=4, vocab_size=3, rank=3, mlp_size=0, base_rate=0.2)
    head.start_from_embeddings(torch.randn(3, 4))
    states = torch.randn(1, 4).expand(60, 4)
    actions = torch.arange(60) % 3
    # token 0 never ends badly, token 1 in a quarter of the cases, token 2 always
    toxic = torch.where(actions == 1, (torch.arange(60) // 3 % 4 == 0).float(), (actions == 2).float())
    optimizer = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(400):
        optimizer.zero_grad()
        logits = head.risk_logits(states, actions)[:, None]
        monte_carlo_loss(logits, -toxic, torch.ones_like(logits, dtype=torch.bool)).backward()
        optimizer.step()
    risk = -head(states[:1])[0]
    torch.testing.assert_close(risk, torch.tensor([0.0, 0.25, 1.0]), atol=0.03, rtol=0)
