"""Targets and losses against loops in float64, and the fixed point of each target on an enumerable MDP."""

import itertools
import math

import pytest
import torch

from rectify import DeadEndQNetwork
from rectify.heads import LowRankHead
from rectify.training.q_loss import expected_values, lambda_returns, polyak_update, q_loss
from rectify.training.q_trainer import QLearning


def slow_returns(reward, values, first, last, gamma, td_lambda, q_min, q_max):
    """The targets of the actions `first` … `last` of one row."""
    targets, later = {}, None
    for t in range(last, first - 1, -1):
        later = reward if t == last else gamma * ((1 - td_lambda) * values[t] + td_lambda * later)
        later = targets[t] = min(max(later, q_min), q_max)
    return targets


@pytest.mark.parametrize("td_lambda", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize(("gamma", "q_min", "q_max"), [(1.0, -1.0, 0.0), (0.9, -0.8, -0.05)])
def test_lambda_returns_are_those_of_the_recursion(td_lambda, gamma, q_min, q_max):
    generator = torch.Generator().manual_seed(0)
    reward = -torch.rand(4, generator=generator, dtype=torch.float64)
    values = -torch.rand(4, 6, generator=generator, dtype=torch.float64)
    spans = [(0, 5), (0, 2), (3, 5), (2, 2)]  # whole, right padding, left padding, one action
    taken = torch.zeros(4, 6, dtype=torch.bool)
    for row, (first, last) in enumerate(spans):
        taken[row, first : last + 1] = True
    found = lambda_returns(reward, values, taken, gamma=gamma, td_lambda=td_lambda, q_min=q_min, q_max=q_max)
    for row, (first, last) in enumerate(spans):
        slow = slow_returns(reward[row].item(), values[row].tolist(), first, last, gamma, td_lambda, q_min, q_max)
        assert found[row].tolist() == pytest.approx([slow.get(t, 0) for t in range(6)], abs=1e-12)


def test_monte_carlo_asks_no_values_and_one_step_targets_do():
    taken = torch.tensor([[True, True, False]])
    assert lambda_returns(torch.tensor([-0.4]), None, taken).tolist() == [pytest.approx([-0.4, -0.4, 0])]
    with pytest.raises(ValueError, match="td_lambda 0"):
        lambda_returns(torch.tensor([-0.4]), None, taken, td_lambda=0.0)


@pytest.mark.parametrize("kind", ["cross_entropy", "squared_error"])
def test_the_loss_is_the_mean_over_the_counted_tokens(kind):
    generator = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(3, 4, generator=generator), -torch.rand(3, 4, generator=generator)
    counted = torch.rand(3, 4, generator=generator) < 0.6
    terms = []
    for row, place in counted.nonzero().tolist():
        risk, y = 1 / (1 + math.exp(-logits[row, place].item())), -targets[row, place].item()
        entropy = -y * math.log(risk) - (1 - y) * math.log(1 - risk)
        terms.append(entropy if kind == "cross_entropy" else (risk - y) ** 2)
    assert q_loss(logits, targets, counted, kind).item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)
    assert q_loss(logits, targets, torch.zeros_like(counted), kind) == 0


def test_expected_values_weigh_the_actions_by_the_policy():
    policy, risk = torch.tensor([[0.5, 0.25, 0.25]]), torch.tensor([[0.2, 0.4, 0.8]])
    torch.testing.assert_close(expected_values(policy.log(), risk.logit()), torch.tensor([-0.4]))


def test_polyak_moves_the_target_by_the_rate():
    target, online = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    before = [weight.clone() for weight in target.parameters()]
    polyak_update(target, online, 0.25)
    for kept, old, fresh in zip(target.parameters(), before, online.parameters(), strict=True):
        torch.testing.assert_close(kept, 0.75 * old + 0.25 * fresh)


def test_rescaling_a_head_rescales_every_logit():
    torch.manual_seed(0)
    head = LowRankHead(hidden_size=4, vocab_size=5, rank=3, mlp_size=4, base_rate=0.2)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(2, 4)
    before = head.risk_logits(hidden)
    head.rescale(0.7, -1.1)
    torch.testing.assert_close(head.risk_logits(hidden), 0.7 * before - 1.1)


# ---------------------------------------------------------------------------------------------------------------------
# An enumerable MDP: three actions of four tokens after one first token; every sequence is known, and so is its reward

TOKENS, LENGTH = 4, 3


@pytest.fixture(scope="module")
def mdp():
    generator = torch.Generator().manual_seed(5)
    ids = torch.tensor([(0, *actions) for actions in itertools.product(range(TOKENS), repeat=LENGTH)])
    reward = -(torch.rand(len(ids), generator=generator) < 0.4).float()
    return ids, reward


def true_values(ids, reward, policy, gamma):
    """`Q^π` of each action of each sequence, by enumeration in float64.

    `policy(prefix)` gives the probabilities of the next token; the discount counts the steps to the last action.
    """
    rewards = {tuple(row): value for row, value in zip(ids.tolist(), reward.tolist(), strict=True)}

    def value(prefix):
        if len(prefix) == LENGTH + 1:
            return rewards[prefix]
        return gamma * sum(p * value((*prefix, a)) for a, p in enumerate(policy(prefix)))

    return torch.tensor([[value(tuple(row[: t + 2])) for t in range(LENGTH)] for row in ids.tolist()])


@pytest.mark.parametrize(
    ("td_lambda", "gamma", "loss", "expected"),
    [
        (0.0, 0.9, "squared_error", False),
        (0.9, 1.0, "cross_entropy", False),
        (1.0, 0.9, "cross_entropy", False),
        (0.0, 1.0, "cross_entropy", True),
        (0.5, 0.9, "squared_error", True),
    ],
)
def test_each_target_converges_to_its_own_fixed_point(mdp, make_model, td_lambda, gamma, loss, expected):
    ids, reward = mdp
    trunk = make_model("gpt2", seed=3, vocab_size=TOKENS, pad_token_id=0, bos_token_id=0, eos_token_id=0)
    network = DeadEndQNetwork.from_trunk(trunk, rank=16, base_rate=0.4)
    behavior = make_model("gpt2", seed=4, vocab_size=TOKENS, initializer_range=0.5) if expected else None
    learning = QLearning(network, td_lambda=td_lambda, gamma=gamma, loss=loss, behavior_model=behavior)
    optimizer = torch.optim.Adam([p for p in learning.parameters() if p.requires_grad], lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
    ones = torch.ones_like(ids)
    for _ in range(STEPS):
        learning(ids, ones, ones.bool(), reward)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if learning.target_head is not None:
            polyak_update(learning.target_head, learning.head, 0.1)
    uniform = [1 / TOKENS] * TOKENS

    @torch.no_grad()
    def policy(prefix):
        return behavior(torch.tensor([prefix])).logits[0, -1].double().softmax(-1).tolist() if behavior else uniform

    # λ-returns mix rewards of the data with values of the policy, which is the data's unless a behaviour is given
    if expected and td_lambda > 0:
        wanted = mixed_values(ids, reward, policy, gamma, td_lambda)
    else:
        wanted = true_values(ids, reward, policy, gamma)
    found = network.action_values(ids)[:, 1:]
    assert (found - wanted).abs().max() < 0.03


STEPS = 500


def mixed_values(ids, reward, policy, gamma, td_lambda):
    """Fixed point of expected SARSA(λ) on uniform data: `Q = γ[(1 − λ) Σ π Q + λ Σ data Q]`."""
    rewards = {tuple(row): value for row, value in zip(ids.tolist(), reward.tolist(), strict=True)}

    def value(prefix):
        if len(prefix) == LENGTH + 1:
            return rewards[prefix]
        weights = [(1 - td_lambda) * p + td_lambda / TOKENS for p in policy(prefix)]
        return gamma * sum(w * value((*prefix, a)) for a, w in enumerate(weights))

    return torch.tensor([[value(tuple(row[: t + 2])) for t in range(LENGTH)] for row in ids.tolist()])
