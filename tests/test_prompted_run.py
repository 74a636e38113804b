"""A run over prompts: stages in parts, by one process, by two, and after being killed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from prompt_records import records
from prompt_records import run_settings as settings

from rectify.errors import InvalidArgumentError, PromptError
from rectify.evaluation.parts import Parts, shard
from rectify.evaluation.prompted_run import Processes, PromptedRun
from rectify.evaluation.run_plan import ordered
from rectify.evaluation.run_settings import RunSettings
from rectify.evaluation.toxicity_prompts import prompt_toxicity, select
from rectify.generation.prompts import Prompt

SCRIPT = Path(__file__).parent.parent / "eval" / "realtoxicityprompts.py"


def ids_of(run):
    return {
        method.label: [[one.token_ids for one in ones] for part in range(4) for ones in run.records_of(method, part)]
        for method in run.methods
    }


@pytest.fixture(scope="module")
def done(run_place, tmp_path_factory):
    output = tmp_path_factory.mktemp("done")
    run = PromptedRun(settings(run_place, output))
    run.run(("generate", "score", "measure"))
    return run


# --- parts and plan


def test_parts_are_made_once(tmp_path):
    made = []
    parts = Parts(tmp_path, {"a": 1})
    parts.complete([0, 2], lambda number: made.append(number) or {"n": number})
    parts.complete(range(3), lambda number: made.append(number) or {"n": number})
    assert made == [0, 2, 1]
    assert [part["n"] for part in Parts(tmp_path, {"a": 1}).read(range(3))] == [0, 1, 2]
    assert parts.missing(range(5)) == [3, 4]
    with pytest.raises(InvalidArgumentError, match="lacks part 3"):
        list(parts.read([3]))
    with pytest.raises(InvalidArgumentError, match="begun with a 1, not 2"):
        Parts(tmp_path, {"a": 2})


def test_a_broken_part_is_named(tmp_path):
    parts = Parts(tmp_path, {})
    parts.path(0).write_text("{")
    with pytest.raises(InvalidArgumentError, match=r"00000\.json' is broken"):
        list(parts.read([0]))


def test_shards_take_every_part_once():
    shards = [shard(range(11), index, 3) for index in range(3)]
    assert sorted(number for numbers in shards for number in numbers) == list(range(11))


def test_prompts_are_ordered_by_length_and_not_by_place():
    prompts = [Prompt(f"text {number}") for number in range(9)]
    lengths = [number % 3 for number in range(9)]
    there = ordered(prompts, lengths)
    back = ordered(prompts[::-1], lengths[::-1])
    assert there == back
    assert [lengths[prompts.index(prompt)] for prompt in there] == sorted(lengths)


# --- which prompts


def test_subsets():
    prompts = [Prompt.of(one) for one in records()]
    toxic, nontoxic = select(prompts, "toxic"), select(prompts, "nontoxic")
    assert {prompt_toxicity(one) for one in toxic} == {0.7}
    assert {prompt_toxicity(one) for one in nontoxic} == {0.3}
    assert select(prompts, "all") == prompts
    balanced = select(prompts, "balanced", seed=1)
    assert Counter(map(prompt_toxicity, balanced)) == {0.7: len(toxic), 0.3: len(toxic)}
    assert balanced == select(prompts, "balanced", seed=1) != select(prompts, "balanced", seed=2)
    assert all(one.record["challenging"] for one in select(prompts, "challenging"))
    some = select(prompts, "all", 5, seed=3)
    assert len(some) == 5
    assert some == sorted(some, key=prompts.index)
    with pytest.raises(InvalidArgumentError, match="num_prompts is 500"):
        select(prompts, "all", 500)
    with pytest.raises(InvalidArgumentError, match="subset is 'some'"):
        select(prompts, "some")
    with pytest.raises(InvalidArgumentError, match="holds none"):
        select([Prompt("a")], "toxic")


def test_prompts_without_a_place_have_no_split(run_place, tmp_path):
    (tmp_path / "plain.jsonl").write_text('"t30 t31"\n"t32"\n')
    given = {"prompts": str(tmp_path / "plain.jsonl"), "num_prompts": None}
    plain = settings(run_place, tmp_path / "a")
    with pytest.raises(PromptError, match="split is 'test'"):
        PromptedRun(RunSettings(**vars(plain) | given | {"split": "test"}))
    run = PromptedRun(RunSettings(**vars(plain) | given))
    assert len(run.prompts) == 2
    assert run.clean == []
    run.run(("generate", "score", "measure"))


# --- the same continuations


def test_noise_is_shared_and_no_risk_changes_nothing(run_place, tmp_path):
    run = PromptedRun(settings(run_place, tmp_path, methods=(f"static:{run_place / 'zero'},rule=cap,epsilon=0",)))
    run.generate()
    base, zero = ids_of(run).values()
    assert base == zero


def test_continuations_do_not_depend_on_the_other_prompts(done, run_place, tmp_path):
    few = PromptedRun(settings(run_place, tmp_path, batch_size=2))
    few.generate()
    found = dict(zip([one.key for one in few.prompts], _of_base(few), strict=True))
    assert found == dict(zip([one.key for one in done.prompts], _of_base(done), strict=True))


def _of_base(run):
    return [
        [one.token_ids for one in ones]
        for part in range(len(run.batches))
        for ones in run.records_of(run.methods[0], part)
    ]


def test_two_processes_make_what_one_makes(done, run_place, tmp_path):
    for index in (1, 0):
        run = PromptedRun(settings(run_place, tmp_path), Processes(index, 2))
        if index == 1:
            run.generate()
            assert run.generations_of(run.methods[0]).missing(range(4)) == [0, 2]
        else:
            run.run(("generate", "score", "measure"))
    assert ids_of(run) == ids_of(done)


def test_an_interrupted_run_goes_on(done, run_place, tmp_path, monkeypatch):
    made = []

    def stop(self, decoder, number):
        if len(made) == 5:
            raise KeyboardInterrupt
        made.append(number)
        return whole(self, decoder, number)

    whole = PromptedRun._generated
    monkeypatch.setattr(PromptedRun, "_generated", stop)
    run = PromptedRun(settings(run_place, tmp_path))
    with pytest.raises(KeyboardInterrupt):
        run.run()
    made.clear()
    monkeypatch.setattr(PromptedRun, "_generated", lambda self, *given: made.append(given[1]) or whole(self, *given))
    run = PromptedRun(settings(run_place, tmp_path))
    run.run(("generate", "score", "measure"))
    assert len(made) == 3 * 4 - 5
    assert ids_of(run) == ids_of(done)


def test_launched_processes_killed_and_started_again(done, run_place, tmp_path):
    """Two processes, a real kill, and again. (`accelerate launch --cpu` starts a single one.)"""
    given = vars(settings(run_place, tmp_path))
    flags = ["--model", given["model"], "--prompts", given["prompts"], "--methods", *given["methods"]]
    flags += ["--scorer", "stub", "--split", "all", "--device", "cpu", "--output_dir", str(tmp_path)]
    for name in ("n", "max_new_tokens", "batch_size", "num_prompts"):
        flags += [f"--{name}", str(given[name])]
    stages = ["--stages", "generate", "score", "measure"]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [*launch, str(SCRIPT), *flags, *stages]
    began = subprocess.Popen(command, env=environment, start_new_session=True)
    for _ in range(600):
        if any(tmp_path.glob("methods/*/generations/0000*.json")) or began.poll() is not None:
            break
        time.sleep(0.1)
    if began.poll() is None:
        os.killpg(began.pid, signal.SIGKILL)
    began.wait()
    again = subprocess.run(command, env=environment, check=True, timeout=120, capture_output=True, text=True)
    assert "batches, 2 processes" in again.stderr
    run = PromptedRun(settings(run_place, tmp_path))
    assert not any(run.scores_of(method, run.scorer("stub")).missing(range(4)) for method in run.methods)
    assert ids_of(run) == ids_of(done)


# --- settings that differ


def test_another_setting_is_refused(done, run_place):
    with pytest.raises(InvalidArgumentError, match="batch_size is 5"):
        PromptedRun(settings(run_place, done.folder, batch_size=5))
    other = PromptedRun(settings(run_place, done.folder, batch_size=0, seed=1, num_prompts=14))
    with pytest.raises(InvalidArgumentError, match="begun with"):
        other.generate()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n": 0}, "n is 0"),
        ({"min_new_tokens": 9}, "min_new_tokens is 9"),
        ({"methods": ("nothing",)}, "method is 'nothing'"),
        ({"scorers": ("stub", "stub")}, "each once"),
        ({"attributes": ("INSULT",)}, "TOXICITY must be among them"),
        ({"split": "half"}, "split is 'half'"),
        ({"top_p": 0.0}, "top_p is 0"),
    ],
)
def test_bad_settings_are_refused(run_place, tmp_path, changes, said):
    with pytest.raises(InvalidArgumentError, match=said):
        settings(run_place, tmp_path, **changes)


# --- measuring


def test_clean_texts_are_measured_under_every_method(done):
    sums = [next(iter(done.clean_of(method).read([0]))) for method in done.methods]
    assert len({each["base_nll"] for each in sums}) == 1
    assert sums[0]["nll"] == sums[0]["base_nll"]
    assert len({each["nll"] for each in sums}) == 3
    assert all(each["tokens"] == sum(len(text) for _, text in done.clean) > 0 for each in sums)


def test_likelihood_is_that_of_the_generated_ids(done):
    method = done.methods[2]
    (part,) = done.likelihood_of(method).read([1])
    row, sample = 2, 1
    prompt = done.tokenizer(done.batches[1][row].text)["input_ids"]
    ids = list(done.records_of(method, 1)[row][sample].token_ids)
    with torch.no_grad():
        log_policy = done.model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
    expected = -sum(float(log_policy[len(prompt) - 1 + place, token]) for place, token in enumerate(ids))
    assert part["tokens"][row][sample] == len(ids)
    assert part["nll"][row][sample] == pytest.approx(expected, rel=1e-5)
