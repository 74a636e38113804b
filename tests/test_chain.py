"""Chains: what is written is read again exactly, and what is no chain is told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectify.chain import GENERATION, Malformed, Steps, closed_length, frame, read_steps

texts = st.text(min_size=1, max_size=12).filter(
    lambda text: text.strip() == text and " # " not in text and "<MASK>" not in text
)


def test_the_template_is_the_published_one():
    whole = frame("Such an ass") + Steps("Such an <MASK>", "Such an animal").reasoning + " of the old kind" + " #"
    assert whole == (
        "# Text: Such an ass # Let's detoxify step by step. # The context is toxic. # Detect the toxic segment within "
        "the context: Such an <MASK> # Detoxify the toxic segments: Such an animal # Generation: of the old kind #"
    )
    assert frame("A day") + Steps().reasoning + " of rain" + " #" == (
        "# Text: A day # Let's detoxify step by step. # The context is non-toxic. # Generation: of rain #"
    )


@settings(max_examples=30)
@given(texts, texts)
def test_steps_are_read_as_they_were_written(before, rephrased):
    steps = Steps(f"{before}<MASK>\n{before}", rephrased)
    assert read_steps(steps.reasoning) == steps
    assert steps.safe_text("other") == rephrased


def test_a_text_that_is_not_toxic_is_its_own_safe_text():
    assert read_steps(Steps().reasoning) == Steps()
    assert Steps().safe_text("A day") == "A day"
    with pytest.raises(ValueError, match="both"):
        Steps("a <MASK>")


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("", Malformed.UNFINISHED),
        (" # The context is toxic. # Detect the toxic segment within the context: a <MASK>", Malformed.UNFINISHED),
        (f" # The context is lovely. {GENERATION}", Malformed.NO_STEPS),
        (f" # The context is toxic. # Detoxify the toxic segments: a {GENERATION}", Malformed.NO_STEPS),
        (f"Well, # The context is non-toxic. {GENERATION}", Malformed.NO_STEPS),
        (Steps("no mask", "fine").reasoning, Malformed.NO_MASK),
        (Steps("a <MASK>", "a <MASK>").reasoning, Malformed.NOT_REPHRASED),
        (Steps("a <MASK>", " ").reasoning, Malformed.NOT_REPHRASED),
    ],
)
def test_what_is_no_chain_is_told(written, wrong):
    assert read_steps(written) == wrong


@pytest.mark.parametrize(
    ("ids", "close", "length"),
    [
        ([5, 6, 7], [9], 3),
        ([5, 9, 7], [9], 1),
        ([5, 9, 8, 6], [9, 6], 4),
        ([5, 9, 6, 8], [9, 6], 1),
        ([5, 2, 9], [9], 1),
        ([9], [9], 0),
        ([5, 9], [], 2),
    ],
)
def test_a_continuation_ends_at_its_marker_or_an_end_token(ids, close, length):
    assert closed_length(ids, close, {2}) == length
