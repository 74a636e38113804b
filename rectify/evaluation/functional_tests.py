"""Functional tests of hate detection: short texts, each made to show whether a detector can do one thing.

Source: the file format of HateCheck (Röttger et al., ACL 2021, arXiv 2012.15606).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rectify.errors import TrajectoryError
from rectify.record_files import read_rows
from rectify.text_files import check_present

FILE_COLUMNS = ("functionality", "test_case", "label_gold")
_GOLD = {"hateful": True, "non-hateful": False}


class FunctionalTest(NamedTuple):
    """One text of a functionality, and whether it is hateful."""

    functionality: str
    text: str
    hateful: bool


def read_functional_tests(path: Path) -> list[FunctionalTest]:
    """The tests of a CSV file with the columns `functionality`, `test_case` and `label_gold`; others are passed over.

    Raises:
        TrajectoryError: the file cannot be read, a column is missing, or a `label_gold` is neither `hateful` nor
            `non-hateful`.
    """
    tests = []
    for place, row in read_rows(path):
        cells = {column: row.get(column) if isinstance(row, dict) else None for column in FILE_COLUMNS}
        for column, cell in cells.items():
            if not isinstance(cell, str) or not cell:
                raise TrajectoryError(f"{place}: no {column!r}: give a HateCheck file, with {', '.join(FILE_COLUMNS)}")
        functionality, text, gold = map(str, cells.values())
        check_present(row, text, place)
        if gold not in _GOLD:
            raise TrajectoryError(f"{place}: label_gold is {gold!r}: give 'hateful' or 'non-hateful'")
        tests.append(FunctionalTest(functionality, text, _GOLD[gold]))
    return tests


def functional_accuracy(tests: list[FunctionalTest], probability: np.ndarray) -> dict[str, dict[str, Any]]:
    """The accuracy of each functionality, at ≥ 0.5.

    Args:
        tests: in any order.
        probability: `[N]` of being toxic, NaN where there is none.

    Returns:
        For each functionality, in the order of the tests, and at last for `"all"`: `n` scored tests, `unscored`, and
        `accuracy`, NaN where none is scored.
    """
    names = [test.functionality for test in tests]
    known = ~np.isnan(probability)
    right = (probability >= 0.5) == np.array([test.hateful for test in tests], bool)
    groups = {name: np.array([each == name for each in names]) for name in dict.fromkeys(names)}
    groups["all"] = np.ones(len(tests), bool)
    return {
        name: {
            "n": int((inside & known).sum()),
            "unscored": int((inside & ~known).sum()),
            "accuracy": float(right[inside & known].mean()) if (inside & known).any() else float("nan"),
        }
        for name, inside in groups.items()
    }
