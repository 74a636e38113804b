"""The examples of the README and of the docstrings run as they stand."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_python_example_of_the_readme(capsys):
    code = re.search(r"```python\n(.*?)```", README, re.DOTALL).group(1)
    exec(compile(code, "README.md", "exec"), {})
    assert "You are such a" in capsys.readouterr().out


@pytest.mark.parametrize(
    "module",
    [
        "rectify.rule",
        "rectify.q_network",
        "rectify.processor",
        "rectify.rephrasing.substitutions",
        "rectify.builders.masking",
    ],
)
def test_the_examples_of_docstrings(module):
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
