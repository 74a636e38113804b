"""The cost benchmark on a tiny shape: what it compares and reports, and the published baseline against its formulas."""

import json
import runpy
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from decoding import prompts

from rectify import InvalidArgumentError, RectificationProcessor, Tilt
from rectify import processor as processor_module
from rectify.evaluation.overhead import (
    ARMS,
    Bench,
    Shape,
    cells,
    make_ratio,
    median_interval,
    orders,
    time_arms,
)
from rectify.evaluation.overhead_display import curves, growth_lines, markdown_table, profile_table, weight_lines
from rectify.evaluation.overhead_memory import arm_memory
from rectify.evaluation.overhead_profile import PARTS, agreement, compare_greedy, profile
from rectify.evaluation.published_decoding import PublishedProcessor, PublishedQNetwork

PAD = 2
EVAL = Path(__file__).parent.parent / "eval"


@pytest.fixture(scope="module")
def bench():
    return Bench(Shape(model_shape="tiny", q_layers=1, q_width=32, q_rank=8, top_k=5))


@pytest.fixture
def calls(bench, monkeypatch):
    """What each call of the model's `generate` was given."""
    found, generate = [], bench.model.generate

    def noted(ids, **options):
        found.append((ids, options))
        return generate(ids, **options)

    monkeypatch.setattr(bench.model, "generate", noted)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The published algorithm


@torch.no_grad()
def published_step(network, row, scores, epsilon, passes=2):
    """One row in float64: `[T]` ids and `[V]` scores to probabilities, in the space of probabilities."""
    mask = (row != PAD).long()[None]
    hidden = network.trunk(input_ids=row[None], attention_mask=mask).last_hidden_state[0, -1]
    inner, _, outer = network.head
    values = outer.weight @ (inner.weight @ hidden + inner.bias).clamp_min(0) + outer.bias
    caps = (1 + values - epsilon).clamp(1e-7, 1.0)
    policy = scores.double().softmax(-1)
    total = torch.ones((), dtype=torch.float64)
    for _ in range(passes):
        policy = torch.minimum(policy, caps * total)
        total = policy.sum()
    return policy / total


def test_the_published_decoding_follows_its_formulas_step_by_step(make_model):
    torch.manual_seed(3)
    network = PublishedQNetwork(make_model("gpt2").base_model).eval()
    with torch.no_grad():  # values about −0.9, of which the caps bind, some at their floor
        network.head[2].weight.mul_(4)
        network.head[2].bias.sub_(0.9)
    processor, exact = PublishedProcessor(network, epsilon=0.1, pad_token_id=PAD), deepcopy(network).double()
    ids = prompts(3, 6)
    ids[1, :2] = PAD
    for step in range(4):
        scores = 3 * torch.randn(3, 97, generator=torch.Generator().manual_seed(step))
        result = processor(ids, scores).double().softmax(-1)
        expected = torch.stack([published_step(exact, row, one, 0.1) for row, one in zip(ids, scores, strict=True)])
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-4)
        assert ((result - scores.double().softmax(-1)).abs() > 1e-3).any(-1).all()
        ids = torch.cat((ids, result.argmax(-1, keepdim=True)), dim=-1)


def test_the_published_decoding_values_every_position_with_two_heads_at_every_step(bench):
    network, shapes = bench.network("published"), []
    handle = network.register_forward_hook(lambda *given: shapes.append([tuple(one.shape) for one in given[2]]))
    bench.run(bench.processor("published"), 2, 3)
    handle.remove()
    assert shapes == [[(2, length, 97)] * 2 for length in (16, 17, 18)]


# ---------------------------------------------------------------------------------------------------------------------
# The arms


def test_all_arms_share_prompts_and_warpers_and_take_turns(bench, calls):
    rows = time_arms(bench, ARMS, 2, 3, repetitions=2, published_repetitions=1)
    pairs = [(row.arm, row.against, len(row.ratios)) for row in rows]
    assert pairs == [
        ("external", "base", 2),
        ("shared", "base", 2),
        ("published", "base", 1),
        ("published", "external", 1),
        ("published − base", "external − base", 1),
    ]
    assert len(calls) == 4 + 4 + 3
    assert all(torch.equal(ids, calls[0][0]) for ids, _ in calls)
    ours = [isinstance(next(iter(options["logits_processor"]), None), RectificationProcessor) for _, options in calls]
    assert ours == [False, True, True, False] * 2 + [True, True, False]
    for own, (_, options) in zip(ours, calls, strict=True):
        # `generate` warps where our processor does not
        assert options["top_k"] == (None if own else 5)
        assert not own or options["logits_processor"][0].sampling.top_k == 5
        assert options["max_new_tokens"] == options["min_new_tokens"] == 3


def test_every_arm_is_first_as_often_as_the_others():
    assert list(orders(["a", "b", "c"], 4)) == [["a", "b", "c"], ["b", "c", "a"], ["c", "a", "b"], ["a", "b", "c"]]


def test_no_hook_or_watch_stays_behind(bench):
    head, rectify = bench.network("shared").head, processor_module.rectify
    list(profile(bench, ARMS, 1, 4, 1))
    bench.seconds("shared", 1, 2)
    assert processor_module.rectify is rectify
    assert "log_survival" not in vars(head)
    assert not bench.model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize("arm", ["external", "shared"])
def test_the_choices_are_those_of_the_slow_reference(bench, arm):
    found = agreement(bench, arm, batch=2, new_tokens=12)
    assert found["decisions"] == 24
    assert found["differing"] == found["under_margin"]


def test_texts_beyond_the_context_and_unknown_shapes_are_refused(bench):
    with pytest.raises(InvalidArgumentError, match="lengths hold 1009"):
        bench.seconds("base", 1, 1009)
    with pytest.raises(InvalidArgumentError, match="model_shape is 'gpt3'"):
        Shape(model_shape="gpt3")


# ---------------------------------------------------------------------------------------------------------------------
# The figures


def test_a_ratio_is_the_median_over_pairs_that_were_measured_together():
    row = make_ratio("external", "base", 2, 10, [1.0, 4.0, 3.0], [1.0, 2.0, 1.0, 9.0])
    assert row.ratios == [1.0, 2.0, 3.0]
    assert (row.ratio, row.low, row.high) == (2.0, 1.0, 3.0)
    assert (row.ms, row.against_ms) == (300.0, 100.0)
    assert row.coverage == pytest.approx(0.75)


def test_the_interval_of_a_median_leaves_out_what_its_confidence_allows():
    assert median_interval([5.0, 1.0, 3.0]) == (1.0, 5.0, 0.75)
    low, high, coverage = median_interval(range(1, 10))
    assert (low, high) == (2, 8)
    assert coverage == pytest.approx(1 - 2 * (1 + 9) / 2**9)


def test_published_is_measured_where_it_is_asked_for_only():
    found = list(cells(["base", "published"], [1, 4], [5, 9], [1], [5, 7]))
    assert found == [
        (1, 5, ["base", "published"]),
        (1, 7, ["base", "published"]),
        (1, 9, ["base"]),
        (4, 5, ["base"]),
        (4, 9, ["base"]),
    ]


def test_decisions_are_compared_up_to_the_first_that_differs_and_near_ties_are_counted():
    reference = torch.tensor([[1, 2, 3], [4, 5, 6], [7, 8, 9]])
    ids = torch.tensor([[1, 2, 3], [4, 0, 0], [0, 8, 0]])
    margins = torch.tensor([[1e-5, 1.0, 1.0], [1.0, 1e-6, 1e-6], [0.5, 1.0, 1.0]])
    assert compare_greedy(ids, reference, margins) == {
        "decisions": 3 + 2 + 1,
        "differing": 2,
        "under_margin": 1,
        "near_ties": 2,
    }


@pytest.mark.parametrize("top_k", [None, 5])
def test_the_parts_of_a_step_add_up_to_it(top_k):
    bench = Bench(Shape(model_shape="tiny", q_layers=1, q_width=32, top_k=top_k))
    external, shared = profile(bench, ARMS, 2, 6, 2)
    assert (external["steps"], shared["steps"]) == (8, 8)
    for row in (external, shared):
        assert set(row["ms"]) == {*PARTS, "outside"}
        assert sum(row["ms"].values()) + row["base_step_ms"] == pytest.approx(row["step_ms"])
        assert all(row["ms"][part] > 0 for part in ("states", "head", "rule", "warpers", "bookkeeping"))
        assert (row["ms"]["support"] > 0) == (top_k is not None)
    assert external["ms"]["trunk"] > 0 == shared["ms"]["trunk"]
    assert "| shared | 2 |" in profile_table({"profile": [external, shared]})


def test_memory_counts_no_weights_of_a_shared_trunk():
    shape = Shape(model_shape="tiny", q_layers=1, q_width=32, q_rank=8)
    row = arm_memory(shape, "shared", 1, 2)
    assert row["peak_mib"] >= 0
    head = Bench(shape).network("shared").head
    assert row["weights_mib"] == pytest.approx(sum(weight.numel() for weight in head.parameters()) * 4 / 2**20)


def test_the_table_has_times_and_memory_in_a_line_for_each_batch_and_length():
    rows = [
        vars(make_ratio("external", "base", 1, length, [ratio] * 3, [1.0] * 3))
        for length, ratio in ((20, 1.1), (512, 1.155))
    ]
    memory = [{"arm": "external", "batch": 1, "new_tokens": 20, "extra_mib": 7.3, "weights_mib": 75.0}]
    report = {"time": rows, "memory": memory}
    assert markdown_table(report).splitlines() == [
        "| batch | new tokens | base, ms per token | external | external, MiB above base |",
        "| --- | --- | --- | --- | --- |",
        "| 1 | 20 | 50.00 | 1.100 (1.100–1.100) | 7 |",
        "| 1 | 512 | 1.95 | 1.155 (1.155–1.155) | – |",
    ]
    assert growth_lines(report) == ["external, batch 1: the ratio at 512 new tokens is 1.050 times that at 20"]
    assert weight_lines(report) == ["external: 75.0 MiB of weights of its own"]
    assert curves(report) == {("external", 1): [(20, 1.1, 1.1, 1.1), (512, 1.155, 1.155, 1.155)]}


def test_the_script_writes_everything_and_prints_the_tables(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    main = runpy.run_path(str(EVAL / "overhead.py"))["main"]
    flags = "--model_shape tiny --q_width 32 --batches 1 --lengths 3 --published_lengths 3 4 --repetitions 2 --seed 5"
    flags += f" --parts time profile agreement --profile_tokens 4 --output {tmp_path}/o.json --plot {tmp_path}/o.svg"
    assert main(flags.split()) == 0
    report = json.loads((tmp_path / "o.json").read_text())
    environment = report["environment"]
    for name in ("torch", "transformers", "torch_threads", "cpu", "dtype", "device", "model_parameters", "rectify"):
        assert environment[name], name
    assert environment["rule"] == repr(Tilt(beta=6.0))
    assert (environment["seed"], environment["repetitions"]) == (5, 2)
    assert {(row["arm"], row["new_tokens"]) for row in report["time"]} >= {("published", 4), ("shared", 3)}
    assert [row["arm"] for row in report["profile"]] == [row["arm"] for row in report["agreement"]]
    printed = capsys.readouterr().out
    assert "| 1 | 4 |" in printed
    assert "| external | 256 |" in printed
    assert (tmp_path / "o.svg").stat().st_size
    assert main(["--lengths", "0"]) == 2
