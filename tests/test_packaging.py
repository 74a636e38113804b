"""What is imported when, and by whom; what is declared; what is said where an extra is missing."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
from commands import run_command

import rectify
from rectify.cli import VERBS
from rectify.cli import main as console
from rectify.evaluation.plotting import check_plot
from rectify.extras import EXTRAS, has_extra
from rectify.train_command import KINDS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SOURCES = {path: ast.parse(path.read_text()) for path in (ROOT / "rectify").rglob("*.py")}
MODULES = {"scikit_learn": "sklearn"}  # distributions whose module has another name


def imports(tree, top=False):
    """The modules that are imported; with `top`, only when the module is."""
    for node in tree.body if top else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module, node


def modules_of(requirements):
    names = (re.match(r"[\w.-]+", each)[0].replace("-", "_") for each in requirements)
    return {MODULES.get(name, name).lower() for name in names}


def module_of(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def needs(name, those):
    return any(name == each or name.startswith(f"{each}.") for each in those)


def python(code, **environment):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | environment, cwd=ROOT
    )
    return done.returncode, done.stdout, done.stderr


def test_every_library_that_is_imported_is_declared():
    core = modules_of(PROJECT["dependencies"])
    extras = set().union(*(modules_of(each) for each in PROJECT["optional-dependencies"].values()))
    for path, tree in SOURCES.items():
        for name, _ in imports(tree):
            library = name.partition(".")[0].lower()
            if library not in sys.stdlib_module_names and library not in ("rectify", "__future__"):
                assert library in core | extras, f"{path} imports {name}, which pyproject.toml does not declare"


def test_extras_name_what_the_project_declares():
    for extra, libraries in EXTRAS.items():
        declared = modules_of(PROJECT["optional-dependencies"][extra])
        assert set(libraries) == declared, extra
    core = modules_of(PROJECT["dependencies"])
    optional = set().union(*EXTRAS.values())
    assert not core & optional
    bound: set[str] = set()  # modules that cannot be imported without an extra
    while True:
        grown = {
            module_of(path)
            for path, tree in SOURCES.items()
            if any(needs(name, optional | bound) for name, _ in imports(tree, top=True))
        }
        if grown <= bound:
            break
        bound |= grown
    assert "rectify.scoring.server" in bound
    commands = {command.module for command in (*VERBS.values(), *KINDS.values())}
    shown = {getattr(getattr(rectify, name), "__module__", "rectify") for name in rectify.__all__}
    assert not bound & (commands | shown | {"rectify.scoring", "rectify.detectors", "rectify.chat"})


def test_peft_is_imported_in_one_place_alone():
    """And transformers' Trainer, which imports it, nowhere before that."""
    for path, tree in SOURCES.items():
        place = str(path.relative_to(ROOT / "rectify"))
        first = next((name for name, _ in imports(tree, top=True) if name.startswith("rectify")), "")
        for name, node in imports(tree):
            if name.partition(".")[0] == "peft":
                assert place == "quiet_peft.py", f"{path}: import it from rectify.quiet_peft"
            names = {alias.name for alias in node.names}
            trains = any(each.startswith(("Train", "EvalPrediction", "set_seed")) for each in names)
            if name.startswith("transformers") and (trains or "trainer" in name):
                before = min(each.lineno for found, each in imports(tree, top=True) if found.startswith("rectify"))
                quiet = place.startswith("training/") or (first == "rectify.training" and before < node.lineno)
                assert quiet, f"{path}: import rectify.training before transformers' Trainer"


def test_all_names_of_the_package_are_found_where_they_are_said_to_be():
    assert set(rectify.__all__) <= set(dir(rectify))
    for package in ("rectify", "rectify.detectors"):
        whole = import_module(package)
        told = next(node for node in SOURCES[Path(whole.__file__)].body if isinstance(node, ast.If))
        typed = {alias.name for node in told.body for alias in node.names}  # what type checkers see
        lazy = {key.value for node in ast.walk(told.orelse[0]) if isinstance(node, ast.Dict) for key in node.keys}
        assert typed == lazy <= set(whole.__all__)
        assert all(getattr(whole, name) is not None for name in whole.__all__)
    with pytest.raises(AttributeError, match="module 'rectify' has no attribute 'Tlit'"):
        rectify.Tlit  # noqa: B018
    with pytest.raises(ImportError):
        from rectify import Tlit  # noqa: F401


def test_importing_the_package_and_the_help_of_some_commands_need_no_library():
    code = (
        "import sys, rectify, rectify.cli\n"
        "assert rectify.cli.main(['--help']) == 0\n"
        "libraries = ('torch', 'transformers', 'peft')\n"
        "assert not {*libraries, 'numpy'} & set(sys.modules)\n"
        "for verb in ('train', 'score', 'serve'):\n"
        "    try: rectify.cli.main([verb, '--help'])\n"
        "    except SystemExit: pass\n"
        "print([name for name in libraries if name in sys.modules])"
    )
    status, out, err = python(code)
    assert (status, out.splitlines()[-1], err) == (0, "[]", "")


ORDINARY = """
import contextlib, io, sys
import rectify, rectify.cli
from rectify import RectificationProcessor, load_language_model
model, tokenizer = load_language_model("pocket")
processor = RectificationProcessor.from_pretrained("pocket-q", model=model, tokenizer=tokenizer)
inputs, length = tokenizer("You are such a", return_tensors="pt"), {"min_new_tokens": 5, "max_new_tokens": 5}
model.generate(**inputs, logits_processor=[processor], **processor.generate_kwargs(), **length)
assert processor.statistics().decisions == 5
with contextlib.redirect_stdout(io.StringIO()):
    assert rectify.cli.main(["generate", "--rectify", "--prompt", "You are", "--max_new_tokens", "3"]) == 0
    assert rectify.cli.main(["score", "--text", "You are an idiot"]) == 0
    training = "--train_file {file} --model_name_or_path pocket --lora_r 2 --num_train_epochs 1 --use_cpu"
    training += " --report_to none --disable_tqdm true --output_dir {folder}"
    assert rectify.cli.main(["train", "q", *training.format(file=sys.argv[1], folder=sys.argv[2]).split()]) == 0
assert "bitsandbytes" not in sys.modules
from peft.import_utils import is_bnb_available
print(is_bnb_available())
"""
OURS = (
    "model: ", "method: ", "rectified ", "scoring ", "texts: ", "TOXICITY: ", "training: ", "validation: ", "curves: ",
    "no curves are drawn", "loss ", "auc_", "brier", "calibration_error ", "saved to ", "warning: ", "strength: ",
)  # fmt: skip


def test_ordinary_runs_import_no_bitsandbytes_and_say_nothing_of_other_libraries(tmp_path):
    ends = {0.0: " a nice man", -1.0: " an idiot"}
    records = [
        {"prompt": f"You are {number}", "continuation": end, "reward": reward}
        for number in range(40)
        for reward, end in ends.items()
    ]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    code = f"import sys; sys.argv[1:] = [{str(tmp_path / 'q.jsonl')!r}, {str(tmp_path / 'q')!r}]\n" + ORDINARY
    status, out, err = python(code, PYTHONWARNINGS="default")
    assert status == 0, err
    # peft sees it again afterwards, for models that are quantised
    assert out == f"{has_extra('quant')}\n"
    foreign = [line for line in err.splitlines() if not line.startswith(OURS)]
    assert foreign == []


NEEDS = {
    "train q": "train",
    "train detector": "train",
    "train scorer": "train",
    "train moderation": "train",
    "train gate": "train",
    "train instruction": "train",
    "train cascade": "train",
    "serve": "serve",
}
REQUIRED = {
    "train q": "--model_name_or_path nowhere --train_file nothing --output_dir DIR",
    "train detector": "--model_name_or_path nowhere --train_files nothing --output_dir DIR",
    "train scorer": "--model_name_or_path nowhere --train_files nothing --output_dir DIR",
    "train moderation": "--model_name_or_path nowhere --train_files nothing --output_dir DIR",
    "train gate": "--adapters nowhere nothing --encoder nowhere --train_files nothing --output_dir DIR",
    "train instruction": "--model_name_or_path nowhere --train_files nothing --output_dir DIR",
    "train cascade": "--small stub --large stub --validation_files nothing --budget 0.3 --output_dir DIR",
    "serve": "",
}


@pytest.fixture
def nothing_extra(monkeypatch):
    for library in set().union(*EXTRAS.values()):
        monkeypatch.setitem(sys.modules, library, None)


@pytest.mark.parametrize("command", NEEDS)
def test_a_missing_extra_is_named_before_any_work(command, capsys, tmp_path, nothing_extra):
    given = REQUIRED[command].replace("DIR", str(tmp_path / "out")).split()
    status, out, err = run_command(console, capsys, *command.split(), *given)
    assert (status, out) == (2, "")
    assert err.endswith(f"is not installed: pip install 'rectify-lm[{NEEDS[command]}]'\n")
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_help_needs_no_extra(capsys, nothing_extra):
    for command in (*VERBS, *(f"train {kind}" for kind in KINDS)):
        status, out, _ = run_command(console, capsys, *command.split(), "--help")
        assert (status, out[:6]) == (0, "usage:"), command


def test_what_asks_for_an_extra_by_an_option_is_named(capsys, tmp_path, nothing_extra):
    given = f"--model_name_or_path x --train_files y --quantization nf4 --output_dir {tmp_path / 'o'}".split()
    status, _, err = run_command(console, capsys, "train", "detector", *given)
    assert (status, err.count("\n")) == (2, 1)
    assert "quantization is 'nf4', and bitsandbytes is not installed: pip install 'rectify-lm[quant]'" in err
    status, _, err = run_command(console, capsys, "score", "--text", "x", "--scorer", "detoxify:original")
    assert (status, err.count("\n")) == (2, 1)
    assert "pip install 'rectify-lm[detoxify]'" in err
    with pytest.raises(rectify.MissingExtraError, match=r"plot is 'a.png', and matplotlib .*rectify-lm\[plots\]"):
        check_plot("a.png")


def pins(name, form):
    found = re.findall(form, (ROOT / name).read_text(), re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", package).lower(): version for package, version in found}


def test_the_lock_files_are_the_pins_with_hashes():
    pinned = pins("constraints.txt", r"^([\w.-]+)==(\S+)$")
    locked = {}
    for name in ("requirements.lock", "requirements-torch.lock"):
        text = (ROOT / name).read_text()
        entries = re.split(r"\n(?=\S)", text.strip())
        entry = re.compile(r"[\w.-]+==\S+( ;[^\\]*)? \\\n( +--hash=sha256:[0-9a-f]{64}( \\)?\n?)+")
        assert all(entry.fullmatch(each) for each in entries)
        locked |= pins(name, r"^([\w.-]+)==(\S+)")
    assert {name: locked[name] for name in pinned.keys() & locked.keys()} == {
        name: pinned[name] for name in pinned.keys() & locked.keys()
    }
    for extra in ("train", "plots", "serve", "quant"):
        wanted = PROJECT["dependencies"] + PROJECT["optional-dependencies"][extra]
        for each in wanted:
            name = re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", each)[0]).lower()
            assert name in locked, f"{each} is not in the lock files: run .ci/lock"
            assert name in pinned, f"{each} is not in constraints.txt"
