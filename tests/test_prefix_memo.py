"""The memo of prefixes: its answers are those of whole forward passes, whatever was asked before, and it saves them.

The reference runs the trunk over one row at a time, without padding, without a mask and without a cache.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rectify import prefix_memo
from rectify.prefix_memo import MASKED, PrefixMemo

CLOSE = {"rtol": 0, "atol": 1e-4}
LONGEST = 24
# few tokens, so that unrelated prefixes share their beginnings; 0 is what padding is run as
tokens = st.sampled_from([0, 3, 4])


@pytest.fixture(scope="module", params=["gpt2", "llama", "sliding"])
def any_q_network(request, make_q_network):
    return make_q_network(request.param)


@torch.no_grad()
def reference(q_network, prefixes):
    rows = [q_network.trunk(input_ids=row[row != MASKED][None]).last_hidden_state[0, -1] for row in prefixes]
    return torch.stack(rows)


@torch.no_grad()
def ask(memo, prefixes):
    # copied, because the memo may answer with a view of its own states
    return memo.last_hidden(prefixes.clone()).clone()


@st.composite
def batches(draw):
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 8))
    table = torch.tensor(draw(st.lists(tokens, min_size=rows * length, max_size=rows * length))).reshape(rows, length)
    for row in table:
        row[: draw(st.integers(0, length - 1))] = MASKED
    return table


@st.composite
def histories(draw):
    """Batches of prefixes, as decoding asks for them and as it does not."""
    asked = [draw(batches())]
    for _ in range(draw(st.integers(2, 10))):
        last = asked[-1]
        rows, length = last.shape
        move = draw(st.sampled_from(["extend", "extend", "reorder", "reorder", "back", "edit", "new", "former"]))
        if move == "extend" and length < LONGEST:
            more = draw(st.integers(1, 3))
            new = torch.tensor(draw(st.lists(tokens, min_size=rows * more, max_size=rows * more)))
            asked.append(torch.cat([last, new.reshape(rows, more)], 1))
        elif move == "reorder":
            order = draw(st.lists(st.integers(0, rows - 1), min_size=1, max_size=4))
            new = torch.tensor(draw(st.lists(tokens, min_size=len(order), max_size=len(order))))
            asked.append(torch.cat([last[order], new[:, None]], 1))
        elif move == "back":
            shorter = last[:, : draw(st.integers(1, length))]
            asked.append(shorter[shorter[:, -1] != MASKED] if (shorter[:, -1] != MASKED).any() else last)
        elif move == "edit":
            edited = last.clone()
            row, position = draw(st.integers(0, rows - 1)), draw(st.integers(0, length - 1))
            edited[row, position] = draw(tokens) if edited[row, position] != MASKED else MASKED
            asked.append(edited)
        elif move == "former":
            former = draw(st.sampled_from(asked))
            shorter = former[:, : draw(st.integers(1, former.shape[1]))]
            asked.append(shorter if (shorter[:, -1] != MASKED).all() else former)
        else:
            asked.append(draw(batches()))
    return asked


@settings(max_examples=120, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(asked=histories())
def test_the_answer_never_depends_on_the_history(any_q_network, asked):
    memo, slow = PrefixMemo(any_q_network), PrefixMemo(any_q_network, use_cache=False)
    for prefixes in asked:
        expected = reference(any_q_network, prefixes)
        assert torch.allclose(ask(memo, prefixes), expected, **CLOSE)
        assert torch.allclose(ask(slow, prefixes), expected, **CLOSE)


def test_masked_positions_may_lie_between_the_tokens(q_network):
    memo = PrefixMemo(q_network)
    prompts = torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, MASKED, MASKED], [MASKED, 6, MASKED, 8, 9]])
    for length in range(5, 9):
        prefixes = torch.nn.functional.pad(prompts, (0, length - 4), value=10)
        assert torch.allclose(ask(memo, prefixes), reference(q_network, prefixes), **CLOSE)


def test_buffers_grow(any_q_network):
    torch.manual_seed(2)
    ids = torch.randint(3, 97, (2, 140))
    memo = PrefixMemo(any_q_network)
    with torch.no_grad():
        expected = any_q_network.trunk(input_ids=ids).last_hidden_state
    for length in range(10, 141):
        assert torch.allclose(ask(memo, ids[:, :length]), expected[:, length - 1], **CLOSE)


def test_only_what_is_new_is_computed(q_network, spy):
    runs, memo = spy(q_network), PrefixMemo(q_network)
    torch.manual_seed(3)
    first = torch.randint(3, 50, (4, 6))

    def cost(prefixes):
        runs.clear()
        assert torch.allclose(ask(memo, prefixes), reference(q_network, prefixes), **CLOSE)
        return list(runs)

    def extended(prefixes, *new):
        return torch.cat([prefixes, torch.tensor(new).expand(len(prefixes), -1)], 1)

    assert cost(first) == [(4, 6)]
    assert cost(first) == []
    assert cost(first[:, :3]) == []
    assert cost(first[[2, 0, 2, 2, 1]]) == []
    reordered = extended(first[[2, 0, 2, 1]], 60)
    assert cost(reordered) == [(4, 1)]
    ahead = extended(reordered, 61, 62, 63)
    assert cost(ahead) == [(4, 3)]
    # candidates that are taken back, and others in their place
    assert cost(ahead[:, :7]) == []
    assert cost(ahead[:, :8]) == []
    assert cost(extended(ahead[:, :8], 70)) == [(4, 1)]
    # fewer rows, and more of them than before
    assert cost(extended(ahead[1:3, :8], 70, 71)) == [(2, 1)]
    assert cost(extended(ahead[[1, 2, 1, 2, 2], :8], 70, 71, 72)) == [(5, 1)]
    # another prompt that shares two tokens, and one that shares none
    other = ahead[1:2].clone()
    other[:, 2:] = 90
    assert cost(other) == [(1, other.shape[1] - 2)]
    unseen = torch.tensor([[93, 94, 95, 96], [96, 95, 94, 93]])
    assert cost(unseen) == [(2, 4)]
    memo.clear()
    # the samples of a prompt are alike, and read once
    assert cost(unseen[[1, 0, 1, 1]]) == [(2, 4)]
    assert cost(extended(unseen[[1, 0, 1, 1]], 70)) == [(4, 1)]


def test_without_a_cache_whole_prefixes_are_computed(q_network, spy):
    runs, memo = spy(q_network), PrefixMemo(q_network, use_cache=False)
    for length in (3, 4, 4, 3):
        ask(memo, torch.full((2, length), 7))
    assert runs == [(2, 3), (2, 4), (2, 4), (2, 3)]


@pytest.mark.parametrize("comparisons", [1, 12, 1 << 24])
def test_rows_are_matched_in_portions(q_network, monkeypatch, spy, comparisons):
    monkeypatch.setattr(prefix_memo, "_COMPARISONS", comparisons)
    torch.manual_seed(4)
    ids = torch.randint(3, 97, (6, 9))
    memo = PrefixMemo(q_network)
    ask(memo, ids[:, :8])
    runs = spy(q_network)
    shuffled = ids[[5, 3, 1, 1, 0, 2, 4, 5]]
    assert torch.allclose(ask(memo, shuffled), reference(q_network, shuffled), **CLOSE)
    assert runs == [(8, 1)]


@pytest.mark.parametrize("stage", ["trunk", "rows"])
def test_an_interrupted_run_is_not_remembered(q_network, monkeypatch, stage):
    memo, ids = PrefixMemo(q_network), torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(5))
    ask(memo, ids[:, :6])
    owner, name = (q_network, "encode") if stage == "trunk" else (memo._cache.layers[-1], "keep")
    complete = getattr(owner, name)

    def interrupted(*arguments):
        if stage == "trunk":
            complete(*arguments)  # the cache has grown
        raise KeyboardInterrupt

    swapped = ids[[1, 0]]
    with monkeypatch.context() as patched:
        patched.setattr(owner, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            memo.last_hidden(swapped[:, :7])
    for length in (7, 6, 9):
        assert torch.allclose(ask(memo, swapped[:, :length]), reference(q_network, swapped[:, :length]), **CLOSE)


def test_padding_is_not_the_token_it_is_run_as(q_network):
    memo = PrefixMemo(q_network)
    for row in ([MASKED, 3], [MASKED, MASKED, 4], [MASKED, 0, 4], [0, 0, 4], [MASKED, 0, 4]):
        prefixes = torch.tensor([row])
        assert torch.allclose(ask(memo, prefixes), reference(q_network, prefixes), **CLOSE)
