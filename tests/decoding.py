"""What the tests of the processor share: prompts, padding, and a processor compared with its uncached twin."""

import copy
import math

import torch
from transformers import LogitsProcessor

from rectify import RectificationProcessor, Tilt

VOCABULARY = 97
RULE = Tilt(beta=2.0)
CLOSE = 1e-4


def prompts(rows=1, length=7, seed=0):
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padded(rows, pad, more=0):
    """Left-padded ids and their mask; `more` also pads the longest row."""
    longest = max(len(row) for row in rows) + more
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


@torch.no_grad()
def log_survival_of(q_network, prefix):
    """`log(1 + Q)` after one prefix, without padding or cache: `[V]`."""
    return q_network.head.log_survival(q_network.encode(prefix.reshape(1, -1)))[0, -1]


class Compared(LogitsProcessor):
    """A cached processor, and how far it is from an uncached one at every call."""

    def __init__(self, q_network, rule=RULE, **options):
        self.cached = RectificationProcessor(q_network, rule, **options)
        self.uncached = RectificationProcessor(q_network, rule, use_cache=False, **options)
        self.differences, self.lengths = [], []

    def generate_kwargs(self):
        return self.cached.generate_kwargs()

    def set_attention_mask(self, mask):
        self.cached.set_attention_mask(mask)
        self.uncached.set_attention_mask(mask)

    def __call__(self, input_ids, scores):
        expected = self.uncached(input_ids.clone(), scores.clone())
        result = self.cached(input_ids, scores)
        self.lengths.append(input_ids.shape[1])
        removed = result == -math.inf
        same = torch.equal(removed, expected == -math.inf)
        gap = (result - expected).masked_fill(removed, 0).abs().max()
        self.differences.append(gap.item() if same else math.inf)
        return result

    @property
    def worst(self):
        return max(self.differences)


def decode(model, ids, processor, **options):
    options = {"max_new_tokens": 12, "attention_mask": torch.ones_like(ids)} | processor.generate_kwargs() | options
    torch.manual_seed(7)
    return model.generate(ids, logits_processor=[processor], **options)


def assistant_of(model, noise):
    """A copy of a model, more or less like it, that always drafts 4 tokens."""
    assistant = copy.deepcopy(model)
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    assistant.generation_config.num_assistant_tokens = 4
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return assistant


def new_tokens(output, ids):
    return output[:, ids.shape[1] :].tolist()


def warped(logits, temperature=1.0, top_k=0, top_p=1.0):
    """Temperature, top-k and top-p one after the other, as probabilities in float64."""
    policy = (logits.double() / temperature).softmax(-1)
    if top_k:
        policy = torch.where(policy >= policy.sort(descending=True).values[top_k - 1], policy, 0)
        policy = policy / policy.sum()
    if top_p < 1:
        ordered, tokens = policy.sort(descending=True)
        kept = tokens[ordered.cumsum(0) - ordered < top_p]
        policy = torch.zeros_like(policy).scatter(0, kept, policy[kept])
        policy = policy / policy.sum()
    return policy


def capped(policy, caps):
    """`min(c, t·π)` with t by bisection; `None` where no policy is under the caps."""
    if caps[policy > 0].sum() < 1:
        return None
    return raised(policy, caps, 1.0)


def raised(policy, caps, mass):
    """`min(c, t·π)` of a mass."""
    low, high = 0.0, 1e12
    for _ in range(300):
        middle = (low + high) / 2
        low, high = (middle, high) if torch.minimum(caps, middle * policy).sum() < mass else (low, middle)
    return torch.minimum(caps, high * policy)


def expected_policy(logits, log_survival, rule, **sampling):
    policy, survival = warped(logits, **sampling), log_survival.double().exp()
    if isinstance(rule, Tilt):
        tilted = policy * survival.clamp(rule.p_min, 1) ** rule.beta
        return tilted / tilted.sum()
    caps = caps_under(survival, rule)
    if (found := capped(policy, caps)) is not None:
        return found
    # what truncation left stands at its caps, and the other tokens share the rest
    untruncated, left = warped(logits, sampling.get("temperature", 1.0)), policy > 0
    if caps[untruncated > 0].sum() < 1:
        return untruncated * survival / (untruncated * survival).sum()
    return torch.where(left, caps, raised(untruncated.masked_fill(left, 0), caps, 1 - caps[left].sum()))


def caps_under(survival, rule):
    """The margin is never larger than the risk."""
    return (survival - (1 - survival).clamp_max(rule.epsilon)).clamp(rule.p_min, 1)
