"""Methods by name: what a spec means, and that a label means it again."""

import re

import pytest

from rectify import InvalidArgumentError
from rectify.methods.base import Base
from rectify.methods.best_of_n import BestOfN
from rectify.methods.cmd import Cmd, CmdWith
from rectify.methods.dexperts import DExperts
from rectify.methods.rectification import Detector, Rectify, RectifyWithDetector, Static
from rectify.methods.reward_reranking import RewardReranking
from rectify.methods.self_debias import SelfDebias
from rectify.methods.specs import METHODS, parse_method, parse_methods
from rectify.methods.word_filter import WordFilter
from rectify.rule import Advantage, Cap, Mask, Tilt

# spec, method, label, family, strength, value
SPECS = [
    ("base", Base(), "base", "base", None, None),
    ("rectify", Rectify(), "rectify,beta=6", "rectify", "beta", 6),
    ("rectify:q,beta=4", Rectify(beta=4.0, path="q"), "rectify:q,beta=4", "rectify:q", "beta", 4),
    (
        "rectify,epsilon=0.2,beta=1e-3",
        Rectify(beta=0.001, epsilon=0.2),
        "rectify,beta=0.001,epsilon=0.2",
        "rectify,epsilon=0.2",
        "beta",
        0.001,
    ),
    (
        "rectify,threshold=0.7,rule=mask",
        Rectify("mask", threshold=0.7),
        "rectify,rule=mask,threshold=0.7",
        "rectify,rule=mask",
        "threshold",
        0.7,
    ),
    (
        "rectify:q,dtype=bfloat16",
        Rectify(path="q", dtype="bfloat16"),
        "rectify:q,beta=6,dtype=bfloat16",
        "rectify:q,dtype=bfloat16",
        "beta",
        6,
    ),
    ("rectify,rule=mask", Rectify("mask"), "rectify,rule=mask,threshold=0.5", "rectify,rule=mask", "threshold", 0.5),
    (
        "static:t,rule=cap",
        Static("cap", path="t"),
        "static:t,rule=cap,epsilon=0.1",
        "static:t,rule=cap",
        "epsilon",
        0.1,
    ),
    (
        "static:t,rule=advantage,tau=0",
        Static("advantage", tau=0.0, path="t"),
        "static:t,rule=advantage,tau=0",
        "static:t,rule=advantage",
        "tau",
        0,
    ),
    ("detector:d", Detector(path="d"), "detector:d,beta=6", "detector:d", "beta", 6),
    (
        "detector:d,candidates=0.02,rule=mask,threshold=0.7",
        Detector("mask", threshold=0.7, candidates=0.02, path="d"),
        "detector:d,rule=mask,threshold=0.7,candidates=0.02",
        "detector:d,rule=mask,candidates=0.02",
        "threshold",
        0.7,
    ),
    ("detector:d,k=20", Detector(k=20, path="d"), "detector:d,beta=6,k=20", "detector:d,k=20", "beta", 6),
    (
        "rectify:q,beta=4+detector:d",
        RectifyWithDetector(Rectify(beta=4.0, path="q"), Detector(path="d")),
        "rectify:q,beta=4+detector:d",
        "rectify:q+detector:d",
        "beta",
        4,
    ),
    (
        "detector:b+/c+d,k=5,combination=max+rectify:a+b,rule=cap,epsilon=0.2",
        RectifyWithDetector(Rectify("cap", epsilon=0.2, path="a+b"), Detector(k=5, combination="max", path="b+/c+d")),
        "rectify:a+b,rule=cap,epsilon=0.2+detector:b+/c+d,k=5,combination=max",
        "rectify:a+b,rule=cap+detector:b+/c+d,k=5,combination=max",
        "epsilon",
        0.2,
    ),
    (
        "rectify,rule=mask+detector:d,rule=mask",
        RectifyWithDetector(Rectify("mask"), Detector(path="d")),
        "rectify,rule=mask,threshold=0.5+detector:d",
        "rectify,rule=mask+detector:d",
        "threshold",
        0.5,
    ),
    ("word_filter:a/b.txt", WordFilter(path="a/b.txt"), "word_filter:a/b.txt", "word_filter:a/b.txt", None, None),
    ("self_debias", SelfDebias(), "self_debias,decay=50", "self_debias", "decay", 50),
    (
        "self_debias,attributes=toxicity,epsilon=0,decay=10",
        SelfDebias(10.0, 0.0, "toxicity"),
        "self_debias,decay=10,epsilon=0,attributes=toxicity",
        "self_debias,epsilon=0,attributes=toxicity",
        "decay",
        10,
    ),
    ("dexperts:C:\\pair", DExperts(path="C:\\pair"), "dexperts:C:\\pair,alpha=2", "dexperts:C:\\pair", "alpha", 2),
    ("reward_reranking", RewardReranking(), "reward_reranking,beta=50", "reward_reranking", "beta", 50),
    (
        "reward_reranking:d,k=5,beta=12.5",
        RewardReranking(12.5, 5, path="d"),
        "reward_reranking:d,beta=12.5,k=5",
        "reward_reranking:d,k=5",
        "beta",
        12.5,
    ),
    ("best_of_n", BestOfN(), "best_of_n,n=4", "best_of_n", "n", 4),
    ("cmd:a,chain=greedy", Cmd("greedy", path="a"), "cmd:a,chain=greedy", "cmd:a,chain=greedy", None, None),
    (
        "cmd:a+rectify:q,beta=4",
        CmdWith(Cmd(path="a"), Rectify(beta=4.0, path="q")),
        "cmd:a+rectify:q,beta=4",
        "cmd:a+rectify:q",
        "beta",
        4,
    ),
    ("best_of_n:d,n=16", BestOfN(16, path="d"), "best_of_n:d,n=16", "best_of_n:d", "n", 16),
]


@pytest.mark.parametrize(("spec", "method", "label", "family", "strength", "value"), SPECS, ids=lambda each: str(each))
def test_what_a_spec_means(spec, method, label, family, strength, value):
    found = parse_method(spec)
    assert found == method
    assert type(found) is type(method)
    assert (found.label, found.family, found.strength, found.value) == (label, family, strength, value)
    again = parse_method(label)
    assert again == found
    assert hash(again) == hash(found)
    assert again.label == label


def test_every_method_has_a_name_and_a_source():
    assert {type(method) for _, method, *_ in SPECS} == {*METHODS.values(), RectifyWithDetector, CmdWith}
    assert all(kind.name == name and kind.source for name, kind in METHODS.items())


@pytest.mark.parametrize("value", [0.1234567, 1 / 3, 1e-9, 123456789.5, 1e16])
def test_labels_tell_values_apart_that_are_nearly_equal(value):
    method = RewardReranking(value)
    assert parse_method(method.label) == method
    assert RewardReranking(value * (1 + 1e-12)).label != method.label


def test_the_rules_are_made_with_their_parameters():
    specs = ["rectify,beta=3", "rectify,rule=advantage,tau=0.3", "rectify,rule=mask", "rectify,rule=cap,epsilon=0.2"]
    rules = [parse_method(spec).make_rule() for spec in specs]
    assert rules == [Tilt(beta=3.0), Advantage(tau=0.3), Mask(), Cap(epsilon=0.2)]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("", "give NAME, NAME:PATH"),
        ("nothing", "method is 'nothing'.*one of base, rectify"),
        ("Base", "method is 'Base'"),
        ("rectify:", "method is 'rectify:'"),
        ("rectify:,beta=4", "method is 'rectify:,beta=4'"),
        ("base,beta=4", "gives 'beta', which it has not: its parameters are none"),
        ("best_of_n,k=4", "gives 'k', which it has not: its parameters are n"),
        ("rectify,path=q", "gives 'path', which it has not"),
        ("rectify,", "gives '', which it has not"),
        ("rectify,beta=4,beta=5", "gives 'beta', twice"),
        ("rectify,beta", "beta is '': give a number"),
        ("rectify,beta=much", "beta is 'much': give a number"),
        ("best_of_n,n=2.5", "n is '2.5': give a whole number"),
        ("rectify,beta=nan", "beta"),
        ("rectify,beta=-1", "beta"),
        ("rectify,rule=none", "rule is 'none'"),
        ("rectify,dtype=int8", "dtype is 'int8'"),
        ("rectify,rule=mask,beta=4", "beta is not a parameter of the rule mask"),
        ("static", "static names no table"),
        ("detector", "detector names no detector"),
        ("detector:d,candidates=0", "candidates is 0"),
        ("detector:d,candidates=0.1,k=5", "candidates is 0.1, and k is 5"),
        ("detector:d,combination=sum", "combination is 'sum'"),
        ("word_filter", "word_filter names no word list"),
        ("dexperts", "dexperts names no experts"),
        ("self_debias:folder", "reads no files"),
        ("self_debias,decay=inf", "decay is inf"),
        ("reward_reranking,beta=-0.5", "beta is -0.5"),
        ("reward_reranking,beta=inf", "beta is inf"),
        ("reward_reranking,beta=nan", "beta is nan"),
        ("reward_reranking,k=0", "k is 0"),
        ("best_of_n,n=0", "n is 0"),
    ],
)
def test_what_is_no_method_is_refused(spec, said):
    with pytest.raises(InvalidArgumentError, match=said) as caught:
        parse_method(spec)
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("rectify+base", "rectify,beta=6 and base cannot be combined"),
        ("base+rectify", "base and rectify,beta=6 cannot be combined"),
        ("static:t+detector:d", "static:t,beta=6 and detector:d,beta=6 cannot be combined"),
        ("detector:d+detector:e", "detector:d,beta=6 and detector:e,beta=6 cannot be combined"),
        ("rectify+detector:d+detector:e", "cannot be combined"),
        ("rectify,beta=4+detector:d,beta=5", "detector:d,beta=5 has another rule than rectify,beta=4"),
        ("rectify+detector:d,rule=cap", "rule's parameters to rectify alone"),
    ],
)
def test_what_cannot_be_combined_is_refused(spec, said):
    with pytest.raises(InvalidArgumentError, match=re.escape(said)) as caught:
        parse_method(spec)
    assert repr(spec) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plus_joins_only_before_the_name_of_a_method():
    for path in ("a+b", "a+rectifying", "a+base_x", "+", "a+detector.d"):
        assert parse_method(f"rectify:{path}").path == path
    with pytest.raises(InvalidArgumentError, match="cannot be combined"):
        parse_method("rectify:a+base")


def test_several_keep_their_order():
    specs = ["best_of_n,n=2", "rectify,beta=2", "base", "rectify,beta=4"]
    assert [method.label for method in parse_methods(specs)] == specs
    assert parse_methods([]) == []


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("base", "base"),
        ("rectify", "rectify,beta=6.0"),
        ("rectify,rule=tilt", "rectify"),
        ("rectify,rule=cap", "rectify,epsilon=0.1,rule=cap"),
        ("reward_reranking,k=20", "reward_reranking,beta=5e1"),
        ("rectify:q+detector:d", "detector:d,candidates=0.01+rectify:q"),
    ],
)
def test_two_that_mean_the_same_are_refused(first, second):
    with pytest.raises(InvalidArgumentError, match="twice") as caught:
        parse_methods([first, "self_debias", second])
    assert repr(second) in str(caught.value)
