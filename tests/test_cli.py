"""The console command and its verbs."""

import os
import runpy
import subprocess
import sys

import pytest

import rectify
from rectify.cli import VERBS, main


@pytest.mark.parametrize("flags", [[], ["--help"]])
def test_usage_names_the_verbs(capsys, flags):
    assert main(flags) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)


@pytest.mark.parametrize("arguments", [[], ["--version"], ["train", "--help"]])
def test_whoever_reads_the_help_may_stop_reading(arguments):
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-u", "-m", "rectify", *arguments]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_the_version(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rectify {rectify.__version__}\n"


def test_an_unknown_verb_is_refused_in_one_line(capsys):
    assert main(["detoxify"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "detoxify" in captured.err


@pytest.mark.parametrize("verb", VERBS)
def test_each_verb_has_help(capsys, verb):
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: rectify {verb} ")


def test_generate(capsys):
    assert main(["generate", "--prompt", "You are such a", "--max_new_tokens", "3"]) == 0
    assert capsys.readouterr().out.count("base ") == 1


def test_the_package_is_a_module_to_run(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rectify", "nothing"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("rectify", run_name="__main__")
    assert ended.value.code == 2
    assert "no verb 'nothing'" in capsys.readouterr().err
