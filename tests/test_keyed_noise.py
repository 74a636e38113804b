"""Keyed noise: exact sampling that depends on what is sampled alone."""

import hashlib
import math

import numpy as np
import pytest
import torch
from scipy import stats

from rectify.errors import InvalidArgumentError
from rectify.keyed_noise import KeyedSampling, gumbel, row_keys


def slow_gumbel(key, step, token):
    """SplitMix64 in unbounded integers."""
    mask = (1 << 64) - 1

    def mixed(bits):
        bits = ((bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9) & mask
        bits = ((bits ^ (bits >> 27)) * 0x94D049BB133111EB) & mask
        return bits ^ (bits >> 31)

    gamma = 0x9E3779B97F4A7C15
    of_step = mixed((key + (step + 1) * gamma) & mask)
    bits = mixed((of_step + (token + 1) * gamma) & mask)
    return -math.log(-math.log(((bits >> 11) + 0.5) / 2**53))


def test_noise_is_the_hash_that_it_says():
    keys = row_keys(3, ["a", "b"], range(2))
    tokens = torch.tensor([0, 1, 77, 50_256])
    for step in (0, 1, 511):
        found = gumbel(keys[:, None], step, tokens)
        expected = [[slow_gumbel(key % 2**64, step, int(token)) for token in tokens] for key in keys.tolist()]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def test_noise_is_gumbel_noise():
    noise = gumbel(row_keys(0, ["a"], range(200))[:, None], 4, torch.arange(1000)).flatten()
    assert stats.kstest(noise.numpy(), "gumbel_r").pvalue > 0.01
    # neighbours in every direction are independent
    grid = torch.stack([gumbel(row_keys(0, ["a"], range(50))[:, None], step, torch.arange(200)) for step in range(50)])
    for dim in range(3):
        first, second = (grid.narrow(dim, start, grid.shape[dim] - 1).flatten().numpy() for start in (0, 1))
        assert abs(np.corrcoef(first, second)[0, 1]) < 4 / math.sqrt(len(first))


def test_samples_have_the_distribution_that_is_asked_for():
    policy = torch.tensor([0.4, 0.3, 0.15, 0.1, 0.04, 0.01], dtype=torch.float64)
    values = []
    for seed in range(100):
        keys = row_keys(seed, ["prompt"], range(3000))
        # scores need not be normalised
        scores = torch.full((3000, 6), 3.7, dtype=torch.float64) + policy.log()
        chosen = KeyedSampling(keys, 5)(torch.zeros(3000, 9, dtype=torch.long), scores).argmax(-1)
        counts = chosen.bincount(minlength=6).numpy()
        values.append(stats.chisquare(counts, (policy * 3000).numpy()).pvalue)
    # of an exact sampler, the p-values of many tests are spread evenly
    assert stats.kstest(values, "uniform").pvalue > 0.01


def test_few_tokens_and_many_have_the_same_noise():
    keys = row_keys(0, ["a"], range(8))
    scores = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(8, 3, dtype=torch.long)
    whole = KeyedSampling(keys, 2)(ids, scores)
    few = scores.masked_fill(torch.arange(64) % 8 != 0, -torch.inf)
    found = KeyedSampling(keys, 2)(ids, few)
    assert torch.equal(found > -torch.inf, few > -torch.inf)
    torch.testing.assert_close(found[:, ::8], whole[:, ::8], rtol=0, atol=0)


def test_keys():
    keys = row_keys(0, ["a", "b"], range(3))
    assert len(set(keys.tolist())) == 6
    assert torch.equal(row_keys(0, ["b"], range(1, 3)), keys[4:])
    assert not torch.equal(row_keys(1, ["a", "b"], range(3)), keys)
    first = hashlib.sha256(b"0:0:a").digest()[:8]
    assert int(keys[0]) == int.from_bytes(first, "big", signed=True)


def test_as_many_keys_as_rows():
    with pytest.raises(InvalidArgumentError, match="keys are 1, rows 2"):
        KeyedSampling(row_keys(0, ["a"], range(1)), 1)(torch.zeros(2, 1, dtype=torch.long), torch.zeros(2, 4))
