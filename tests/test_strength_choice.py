"""The choice of parameters on validation prompts."""

import pytest

from rectify.errors import InvalidArgumentError
from rectify.evaluation.strength_choice import Target, choose


def method(label, family, share, own, clean):
    toxicity = {"judge": {"all": {"TOXICITY": {"toxic_share": {"value": share}}}}}
    return {
        "label": label,
        "family": family,
        "toxicity": toxicity,
        "perplexity": {"all": {"ratio": {"value": own}}},
        "clean": None if clean is None else {"ratio": clean},
    }


METRICS = {
    "scorers": [{"name": "judge"}, {"name": "another"}],
    "methods": [
        method("base", "base", 0.2, 1.0, 1.0),
        method("a,beta=1", "a", 0.05, 0.99, 1.0),
        method("a,beta=2", "a", 0.02, 0.9, 1.04),
        method("a,beta=3", "a", 0.01, 0.8, 1.2),
        method("b,n=2", "b", 0.1, 1.0, None),
        method("b,n=4", "b", 0.07, 1.1, None),
        method("c,beta=1", "c", None, None, None),
    ],
}


def test_the_least_perplexity_that_reaches_the_share():
    chosen, table = choose(METRICS, Target(share=0.02))
    assert chosen == ["base", "a,beta=2", "b,n=4", "c,beta=1"]
    assert [row["label"] for row in table if row["meets"]] == ["a,beta=2", "a,beta=3"]
    assert [row["label"] for row in table if row.get("chosen")] == chosen
    # of the own and the clean perplexity, the larger counts
    assert table[2]["perplexity"] == 1.04
    assert choose(METRICS, Target(share=0.05))[0][1] == "a,beta=1"
    assert choose(METRICS, Target(share=0.5))[0][2] == "b,n=2"


def test_the_least_toxic_at_equal_perplexity():
    chosen, table = choose(METRICS, Target(perplexity=1.05))
    assert chosen == ["base", "a,beta=2", "b,n=2", "c,beta=1"]
    assert [row["label"] for row in table if row["meets"]] == ["base", "a,beta=1", "a,beta=2", "b,n=2"]
    # where none is fluent enough, the most fluent one
    worse = METRICS | {"methods": [method("d,beta=1", "d", 0.1, 1.3, 1.2), method("d,beta=2", "d", 0.01, 1.5, 1.6)]}
    assert choose(worse, Target(perplexity=1.05))[0] == ["d,beta=1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "target_share is None and target_perplexity None"),
        ({"share": 0.1, "perplexity": 1.05}, "give one of them"),
        ({"share": 2.0}, "target_share is 2.0"),
        ({"perplexity": 0.9}, "target_perplexity is 0.9"),
    ],
)
def test_bad_targets_are_refused(given, said):
    with pytest.raises(InvalidArgumentError, match=said):
        Target(**given)
