"""Character F1 of spans on cases counted by hand, its baselines, and the script that measures detectors."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from commands import run_command
from span_models import save_backbone

from rectify.detectors.spans import SpanDetector
from rectify.errors import InvalidArgumentError
from rectify.evaluation.span_baselines import LexiconSpans, learnt_terms, random_spans
from rectify.evaluation.span_f1 import character_f1, text_f1
from rectify.evaluation.span_report import span_report, span_table
from rectify.text_files import AnnotatedText

CASES = {
    "both empty": ([], [], 1),
    "nothing found": ([], [(0, 3)], 0),
    "nothing there": ([(0, 3)], [], 0),
    "the same": ([(1, 4), (6, 8)], [(6, 8), (1, 4)], 1),
    "elsewhere": ([(0, 2)], [(2, 4)], 0),
    "a half": ([(0, 4)], [(2, 6)], 0.5),  # precision 1/2, recall 1/2
    "too long": ([(0, 6)], [(0, 2)], 0.5),  # 1/3 and 1
    "too short": ([(0, 1)], [(0, 3)], 0.5),  # 1 and 1/3
    "overlapping spans count once": ([(0, 3), (1, 4)], [(0, 4)], 1),
    "several": ([(0, 2), (5, 8)], [(1, 3), (5, 7)], 2 * (3 / 5) * (3 / 4) / (3 / 5 + 3 / 4)),
}


@pytest.mark.parametrize("case", CASES)
def test_f1_of_a_text(case):
    predicted, annotated, expected = CASES[case]
    assert character_f1([predicted], [annotated]).tolist() == [pytest.approx(expected)]


def test_the_figure_is_the_mean_over_texts():
    predicted, annotated, expected = zip(*CASES.values(), strict=True)
    assert character_f1(predicted, annotated) == pytest.approx(np.array(expected))
    assert text_f1([3, 4, 3], {4}) == pytest.approx(2 / 3)
    with pytest.raises(InvalidArgumentError, match="predicted has 1 texts, annotated 2"):
        character_f1([[]], [[], []])
    assert character_f1([], []).shape == (0,)


def test_a_word_list_finds_whole_words_in_any_case():
    lexicon = LexiconSpans(["Idiot", "two  words", "émile", ""])
    text = "IDIOT idiots idiot's\tTWO\n words É ÉMILE"
    [found] = lexicon.find([text])
    assert [text[span.start : span.end] for span in found] == ["IDIOT", "idiot", "TWO\n words", "ÉMILE"]
    with pytest.raises(InvalidArgumentError, match="lexicon"):
        LexiconSpans([" "])


def test_words_are_learnt_that_are_toxic_more_often_than_not():
    rows = [
        AnnotatedText("you idiot", ((4, 9),)),
        AnnotatedText("Idiot! what a fool", ((0, 5),)),
        AnnotatedText("a fool of an idiot", ((2, 18),)),
        AnnotatedText("an idiot once", ()),
        AnnotatedText("an oaf", ((3, 6),)),
    ]
    assert learnt_terms(rows) == ["idiot"]
    assert learnt_terms(rows, least=1) == ["idiot", "oaf", "of"]


def test_chance_depends_on_seed_and_text_alone():
    texts = [f"word{index} " * 40 for index in range(50)]
    found = random_spans(texts, 1)
    assert found[3:4] == random_spans(texts[3:4], 1)
    assert found != random_spans(texts, 2)
    assert 0.45 < sum(map(len, found)) / 2000 < 0.55


ROWS = [AnnotatedText("a bad one", ((2, 5),)), AnnotatedText("a good one", ()), AnnotatedText("bad, bad", ((0, 3),))]


def test_a_report_of_detectors_side_by_side():
    report = span_report(ROWS, {"all": [[(2, 5)], [], [(0, 3), (5, 8)]], "none": [[], [], []]})
    figures = report["detectors"]["all"]
    assert figures["f1"]["value"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert figures["f1"]["low"] <= figures["f1"]["value"] <= figures["f1"]["high"]
    assert figures["f1_with_spans"]["value"] == pytest.approx((1 + 2 / 3) / 2)
    assert figures["f1_without_spans"]["value"] == 1
    assert (figures["masked_share"], report["masked_share"]) == (pytest.approx(9 / 27), pytest.approx(6 / 27))
    assert report["detectors"]["none"]["f1"]["value"] == pytest.approx(1 / 3)
    assert span_table(report).splitlines()[2].startswith("| all | 0.889 (0.667–1.000) | 0.833 ")


def test_the_script_measures_detectors_beside_baselines(tmp_path, capsys):
    path = Path(__file__).parents[1] / "eval" / "spans.py"
    spec = importlib.util.spec_from_file_location("eval_spans", path)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    save_backbone("encoder", tmp_path / "trunk")
    SpanDetector.from_backbone(str(tmp_path / "trunk"), max_length=32, overlap=4).save_pretrained(tmp_path / "d")
    with (tmp_path / "t.csv").open("w", newline="") as file:
        rows = [(str([place for span in row.spans for place in range(*span)]), row.text) for row in ROWS]
        csv.writer(file).writerows([("spans", "text"), *rows])
    (tmp_path / "words.txt").write_text("bad\n")
    given = ["--texts", tmp_path / "t.csv", "--device", "cpu", "--output", tmp_path / "r.json"]
    given += ["--lexicon", tmp_path / "words.txt", "--lexicon_texts", tmp_path / "t.csv"]
    code, out, _ = run_command(script.main, capsys, *given, "--detector", f"mine={tmp_path / 'd'}")
    assert code == 0
    assert out.startswith("3 texts, 2 with spans")
    report = json.loads((tmp_path / "r.json").read_text())
    names = ["mine", "word list", "1 words of the training texts", "every second word, by chance"]
    assert list(report["detectors"]) == names
    assert report["detectors"]["word list"]["f1"]["value"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert report["detectors"]["mine"]["head"] == "token"
    for wrong in (["mine"], ["mine=a", "mine=b"]):
        code, _, error = run_command(script.main, capsys, *given, "--detector", *wrong)
        assert (code, error.count("\n")) == (2, 1)
        assert "NAME=FOLDER, each name once" in error
