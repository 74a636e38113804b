"""Templates of questions and answers, and what the strict parser makes of answers that are not whole."""

from dataclasses import asdict, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rectify.detectors.templates import TEMPLATES, Problem, Template
from rectify.errors import InvalidArgumentError

TOXIC, EXPLAINED, CHINESE = (TEMPLATES[name] for name in ("toxic", "explained", "chinese"))
FIELDS = {"explanation": "It scolds.", "affected_groups": "women", "harmful_words": "cow, b*", "reason": "It demeans."}


@pytest.mark.parametrize("name", TEMPLATES)
def test_every_answer_that_is_written_is_read_again(name):
    template = TEMPLATES[name]
    names = [field for field, _ in template.before + template.after] or ["rationale"]
    for label in template.labels:
        answer = template.write(label, {field: f"some {field}" for field in names})
        parsed = template.parse(answer)
        assert (parsed.label, parsed.problem, parsed.incomplete) == (label, None, False)
        assert answer[parsed.start :].startswith(label)
        kept = names if label in template.toxic or not template.before else names[:1]
        assert parsed.fields == {field: f"some {field}" for field in kept}
        assert template.parse(template.write(label)).label == label
    assert template.ask("a {text} {b}").count("a {text} {b}") == 1
    assert Template(**asdict(template)) == template


@pytest.mark.parametrize(
    ("template", "answer", "problem"),
    [
        (TOXIC, "", Problem.NO_LABEL),
        (TOXIC, "It is toxic.", Problem.NO_LABEL),
        (TOXIC, "Label: toxicity", Problem.UNKNOWN_LABEL),
        (TOXIC, "Label: Toxic", Problem.UNKNOWN_LABEL),
        (TOXIC, "Label: toxic, I think", Problem.UNKNOWN_LABEL),
        (TOXIC, "Label: toxic\nLabel: non-toxic", Problem.SEVERAL_LABELS),
        (CHINESE, "不良内容：不", Problem.UNKNOWN_LABEL),
        (CHINESE, "没有不良内容", Problem.NO_LABEL),
        (EXPLAINED, "Classification: hate", None),
        (EXPLAINED, "Well: Classification: hate", Problem.DISORDER),
        (EXPLAINED, "Classification: hate\n(1) Holistic Explanation: x", Problem.DISORDER),
        (EXPLAINED, "(1) Holistic Explanation: x\n(1) Holistic Explanation: y", Problem.DISORDER),
    ],
)
def test_an_answer_of_another_form_is_unparsed_and_never_toxic(template, answer, problem):
    parsed = template.parse(answer)
    assert parsed.problem is problem
    assert (parsed.label is None) == (problem is not None)


def test_a_truncated_answer_has_a_label_only_where_more_cannot_change_it():
    answer = EXPLAINED.write("hate", FIELDS)
    for cut in range(len(answer)):
        parsed = EXPLAINED.parse(answer[:cut], ended=False)
        if cut < answer.index("(2)") + len("(2) Affected Groups:"):  # "hate\n" may go on as "hate\nor not"
            assert parsed.problem is Problem.TRUNCATED, answer[:cut]
        else:
            assert (parsed.label, parsed.incomplete) == ("hate", True)
    assert EXPLAINED.parse(answer, ended=True).incomplete is False
    lacking = EXPLAINED.write("hate", {"explanation": "x"})
    assert EXPLAINED.parse(lacking).incomplete
    assert not EXPLAINED.parse(EXPLAINED.write("neutral", {"explanation": "x"})).incomplete
    for cut_off in ("Label: toxic", "Label: toxic\n"):
        assert TOXIC.parse(cut_off, ended=False).problem is Problem.TRUNCATED


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.text(alphabet="Label: toxicn-(1)Classf\n"), st.booleans())
def test_no_answer_breaks_the_parser(answer, ended):
    for template in TEMPLATES.values():
        parsed = template.parse(answer, ended)
        assert (parsed.label is None) == (parsed.problem is not None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"prompt": "no place"}, "prompt holds {text} 0 times"),
        ({"labels": ("tox", "toxic")}, "'tox' begins another"),
        ({"labels": ("toxic",)}, "two or more"),
        ({"toxic": ("toxic", "non-toxic")}, "not all"),
        ({"toxic": ("hate",)}, "toxic is"),
        ({"lead": " "}, "blank"),
    ],
)
def test_templates_that_cannot_be_read_are_refused(changes, says):
    with pytest.raises(InvalidArgumentError, match=says):
        replace(TOXIC, **changes)


def test_labels_and_fields_must_be_the_templates():
    with pytest.raises(InvalidArgumentError, match="label is 'hate'"):
        TOXIC.write("hate")
    with pytest.raises(InvalidArgumentError, match="fields hold 'reason'"):
        TOXIC.write("toxic", {"reason": "x"})
