"""Self-detoxification data: stages, resuming, selection, and each published defect shown not to be here."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from commands import run_command

from rectify.builders.cmd import STAGES, CmdBuild, CmdTools, contrast
from rectify.builders.cmd_records import ChainExample, ScoredContinuations, ScoredPrompt, read_records, to_json
from rectify.builders.cmd_settings import CmdSettings
from rectify.builders.cmd_stages import chain_example, find_spans, mask, score_prompts
from rectify.builders.masking import MASK
from rectify.cli import main
from rectify.detectors.span_decoding import Span
from rectify.errors import InvalidArgumentError, TrajectoryError
from rectify.generation.generator import Generator
from rectify.scoring.scores import Reason, Scores

SETTINGS = CmdSettings(n=3, max_new_tokens=4, min_new_tokens=2, batch_size=4, attempts=2, validation_share=0.3)
BAD, WORSE, UNKNOWN = "t90", "t91", "t92"
# toxic at the end, twice, where nothing is known, not at all; one that stays toxic whatever is masked; and a repetition
TEXTS = [f"t{30 + number} t{40 + number} {BAD}" for number in range(5)]
TEXTS += [f"{BAD} t{50 + number} {BAD} t{60 + number}" for number in range(3)]
TEXTS += [f"t{70 + number} t20 t21" for number in range(4)]
TEXTS += [f"t10 {WORSE}", f"t11 {UNKNOWN}", TEXTS[0]]
FILES = [f"{stage}.jsonl" for stage in STAGES[:-1]] + ["train.jsonl", "validation.jsonl"]


class Words:
    """A scorer of single words: the greatest of what is known of them."""

    name, revision, attributes = "words", "1", ("TOXICITY",)

    def __init__(self, calls=10**6):
        self.calls = calls

    def score(self, texts, attributes=("TOXICITY",)):
        self.calls -= 1
        if self.calls < 0:
            raise KeyboardInterrupt
        values = np.array([self.value(text) for text in texts]).reshape(-1, 1)
        reasons = tuple(Reason.SERVER_ERROR if np.isnan(value) else None for value in values[:, 0])
        return Scores(values, ("TOXICITY",), reasons)

    @staticmethod
    def value(text):
        words = text.split()
        if not words or UNKNOWN in words:
            return np.nan
        high = {BAD: 0.9, WORSE: 0.95}
        # of continuations, which have any words, some are toxic too
        return max(high.get(word, int(word[1:]) / 97 if word > "t80" and len(word) == 3 else 0.1) for word in words)


def find(texts, threshold=None):
    return [
        [Span(place, place + 3, 0.8) for place in range(len(text)) if text.startswith(BAD, place)] for text in texts
    ]


class Replace:
    """Puts one word into every gap: at first one that is as bad, in some texts."""

    name = "replace"

    def fill(self, masked, attempt, originals=None):
        return [
            None if "t33" in text else text.replace(MASK, BAD if attempt == 0 and "t31" in text else "t5")
            for text in masked
        ]


@pytest.fixture(scope="module")
def make(model, make_tokenizer):
    """`make(folder, scorer, texts, **changes)`: a build with tiny tools."""
    tokenizer = make_tokenizer()
    tokenizer.padding_side = "left"

    def of(folder, scorer=None, texts=TEXTS, names=None, **changes):
        settings = dataclasses.replace(SETTINGS, **changes)

        def generator():
            sizes = settings.max_new_tokens, settings.min_new_tokens, settings.n, settings.seed
            return Generator(model, tokenizer, settings.sampling, *sizes)

        scorer = scorer or Words()
        tools = CmdTools(lambda: scorer, lambda: find, Replace, generator, None, names or {"model": "tiny"})
        return CmdBuild(folder, tools, settings, texts)

    return of


@pytest.fixture(scope="module")
def built(make, tmp_path_factory):
    folder = tmp_path_factory.mktemp("built")
    return folder, make(folder).run()


def contents(folder):
    return [(folder / name).read_bytes() for name in FILES]


def test_every_stage_is_counted(built):
    _, counts = built
    table = {one.stage: (one.read, one.kept, one.dropped) for one in counts}
    assert table["prompts"] == (15, 13, {"unscored": 1, "repeated": 1})
    assert table["spans"] == (13, 13, {})
    assert table["mask"] == (13, 12, {"hopeless": 1})
    assert table["rephrase"] == (12, 11, {"unfilled": 1})
    assert table["continue"] == (11, 11, {})
    assert table["score"] == (11, 11, {})
    read, kept, dropped = table["examples"]
    assert read == 11
    assert kept + sum(dropped.values()) == 11
    for one in counts:
        assert one.read == one.kept + sum(one.dropped.values())


def test_unsafe_rephrasings_are_tried_again(built):
    folder, _ = built
    records = [json.loads(line) for line in (folder / "rephrase.jsonl").open()]
    attempts = {record["prompt"].split()[0]: (record["attempts"], record["dropped"]) for record in records}
    assert attempts["t31"] == (2, None)
    assert attempts["t32"] == (1, None)
    assert attempts["t33"] == (2, "unfilled")
    assert attempts["t70"] == (0, None)


def test_examples_hold_what_the_stages_found(built):
    folder, counts = built
    examples = [*read_records(folder / "train.jsonl", ChainExample)]
    examples += read_records(folder / "validation.jsonl", ChainExample)
    assert len(examples) == counts[-1].kept
    for example in examples:
        toxic = BAD in example.prompt
        assert (example.masked is not None) == (example.rephrased is not None) == toxic
        if toxic:
            assert example.masked == example.prompt.replace(BAD, MASK)
            assert example.rephrased == example.prompt.replace(BAD, "t5")
    assert len({example.prompt for example in examples}) == len(examples)
    able = contrast(folder)
    assert able["toxic"][0] > 0
    assert sum(count for _, count in able.values()) == len([*(folder / "train.jsonl").open()])


def test_stages_run_one_by_one_make_the_same(built, make, tmp_path):
    folder, counts = built
    assert [make(tmp_path, texts=TEXTS if stage == "prompts" else None).run([stage])[0] for stage in STAGES] == counts
    assert contents(tmp_path) == contents(folder)


def test_resumed_is_uninterrupted(built, make, tmp_path):
    folder, _ = built
    whole = contents(folder)
    for stage in STAGES[:-1]:
        name = f"{stage}.jsonl"
        content = (folder / name).read_bytes()
        again = tmp_path / stage
        again.mkdir()
        for earlier in STAGES[: STAGES.index(stage) + 1]:
            for file in (f"{earlier}.jsonl", f"{earlier}.jsonl.settings.json"):
                shutil.copy(folder / file, again / file)
        # as a kill in the middle of a write leaves it
        (again / name).write_bytes(content[: content.index(b"\n") + 9])
        make(again).run()
        assert contents(again) == whole


def test_resumed_after_a_scorer_has_failed(built, make, tmp_path):
    calls = 0
    for _ in range(50):
        try:
            make(tmp_path, Words(calls=2)).run()
            break
        except KeyboardInterrupt:
            calls += 1
    assert calls > 3
    assert contents(tmp_path) == contents(built[0])


def test_a_stage_with_nothing_left_is_counted(make, tmp_path):
    build = make(tmp_path, texts=[f"t10 {WORSE}"])
    counts = build.run(STAGES[:-1])
    assert [(one.read, one.kept, one.dropped) for one in counts[2:4]] == [(1, 0, {"hopeless": 1}), (0, 0, {})]
    with pytest.raises(InvalidArgumentError, match="none of 0 examples has a toxic continuation to shun"):
        build.run(["examples"])


def test_a_text_at_the_limit_is_not_toxic_with_nothing_masked():
    """Scored in another batch it may be below, and the detector finds nothing."""
    prompts = find_spans(score_prompts(["t20 t21"], lambda texts: np.full(len(texts), 0.4999999)), find)
    assert prompts[0].toxic
    [masked] = mask(prompts, find, lambda texts: np.full(len(texts), 0.4999999))
    assert (masked.toxic, masked.masked, masked.dropped) == (False, None, None)


def test_a_prompt_without_room_for_a_continuation_is_dropped_and_counted(make, tmp_path):
    counts = make(tmp_path, texts=["t1 " * 600, "t2 t3"], n=2).run(STAGES[:5])
    assert (counts[-1].kept, counts[-1].dropped) == (1, {"too long": 1})


def test_a_stage_waits_for_the_one_before(make, built, tmp_path):
    with pytest.raises(InvalidArgumentError, match=r"holds no prompts\.jsonl: run prompts first"):
        make(tmp_path).run(["spans"])
    for name in ("prompts.jsonl", "prompts.jsonl.settings.json"):
        shutil.copy(built[0] / name, tmp_path / name)
    lines = (tmp_path / "prompts.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "prompts.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:5])
    with pytest.raises(InvalidArgumentError, match="holds 13 of 14 records: run prompts first"):
        make(tmp_path).run(["spans"])
    with pytest.raises(InvalidArgumentError, match="texts are not given"):
        make(tmp_path, texts=None).run(["prompts"])
    with pytest.raises(InvalidArgumentError, match="stages hold 'all'"):
        make(tmp_path).run(["all"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"texts": TEXTS[1:]}, "begun with texts|begun with given"),
        ({"batch_size": 3}, "begun with batch_size 4, not 3"),
        ({"n": 4}, "begun with n 3, not 4"),
        ({"seed": 1}, "begun with seed 0, not 1"),
        ({"attempts": 3}, "begun with attempts 2, not 3"),
        ({"names": {"model": "other"}}, "begun with model 'tiny', not 'other'"),
    ],
    ids=str,
)
def test_another_setting_is_refused(built, make, changes, said):
    with pytest.raises(InvalidArgumentError, match=said):
        make(built[0], **changes).run()


# --- published defects (systems.md 2)


def test_a_record_without_a_key_is_refused_by_name(tmp_path):
    """Published: `raw_recovered_prompt` for `recover_prompt`, `cont_generation` for `generation`, silently."""
    example = to_json(ChainExample(prompt="a", masked="<MASK>", rephrased="b", positive="c", negatives=["d"]))
    path = tmp_path / "train.jsonl"
    for change, said in (
        ({"negatives": None}, "negatives is None"),
        ({"generations": ["d"]}, "has no field 'generations'"),
        ({"schema": 7}, "schema is 7, not 1"),
        ({"rephrased": 3}, "rephrased is 3"),
    ):
        path.write_text(json.dumps(example) + "\n" + json.dumps(example | change) + "\n")
        with pytest.raises(TrajectoryError, match=f"line 2: .*{said}"):
            list(read_records(path, ChainExample))
    del example["negatives"]
    path.write_text(json.dumps(example))
    with pytest.raises(TrajectoryError, match="ChainExample has a field 'negatives'"):
        list(read_records(path, ChainExample))
    path.write_text('"text"\n')
    with pytest.raises(TrajectoryError, match="schema is none"):
        list(read_records(path, ScoredPrompt))


def test_a_set_without_anything_to_shun_is_refused(make, tmp_path):
    """Published: the contrastive groups were empty, and the loss silently left out."""
    with pytest.raises(InvalidArgumentError, match="none of 8 examples has a toxic continuation to shun"):
        make(tmp_path, negative=1.0).run()
    assert not (tmp_path / "train.jsonl").exists()


def test_continuations_hold_nothing_of_the_prompt(built):
    """Published: as many characters were cut as the batch had rows, so the prompt stayed in."""
    folder, _ = built
    for record in read_records(folder / "score.jsonl", ScoredContinuations):
        assert len(record.continuations) == len(record.continuation_toxicity) == 3
        safe = record.rephrased or record.prompt
        for text in record.continuations:
            assert not text.lstrip().startswith(safe)
            assert 1 <= len(text.split()) <= 4


def test_one_continuation_is_no_text_of_characters():
    """Published: with one generation, the scorer went through its characters, and nothing was compared."""
    with pytest.raises(InvalidArgumentError, match="n is 1: give 2 or more"):
        CmdSettings(n=1)


def test_repeated_prompts_do_not_overwrite_each_other(built):
    """Published: the generations of a prompt overwrote those of an equal one; here one is kept, the rest counted."""
    folder, counts = built
    prompts = [record.prompt for record in read_records(folder / "prompts.jsonl", ScoredPrompt)]
    assert len(set(prompts)) == len(prompts) == 14
    assert counts[0].dropped["repeated"] == 1


def test_a_text_that_cannot_be_scored_is_dropped_and_counted(built):
    """Published: a failed request was tried again for ever, and an empty text counted as harmless."""
    folder, counts = built
    (record,) = (each for each in read_records(folder / "prompts.jsonl", ScoredPrompt) if each.toxicity is None)
    assert record.dropped == "unscored"
    assert counts[0].dropped["unscored"] == 1


def scored(*pairs):
    given = {"prompt": "p", "toxicity": 0.9, "toxic": True, "spans": [], "masked": "<MASK>", "rephrased": "q"}
    given |= {"rephrased_toxicity": 0.1, "similarity": None, "attempts": 1}
    return ScoredContinuations(
        **given, continuations=[text for text, _ in pairs], continuation_toxicity=[value for _, value in pairs]
    )


@pytest.mark.parametrize(
    ("pairs", "positive", "negatives"),
    [
        ([("a", 0.2), ("b", 0.9), ("c", 0.1), ("d", 0.6), ("e", 0.31), ("f", 0.4)], "c", ["b", "d", "f"]),
        ([("a", 0.5), ("b", 0.3)], "b", ["a"]),
        ([("a", 0.5), ("b", 0.3), ("c", 0.3)], "b", ["a"]),
        ([("a", 0.5)], "a", []),
        ([("a", 0.51), ("b", 0.9)], None, None),
        ([("a", None), ("b", 0.2), ("c", None), ("d", 0.8)], "b", ["d"]),
        ([("a", None)], None, None),
        ([("a # of", 0.0), ("b", 0.2), ("c", 0.9)], "b", ["c"]),
        ([("a", 0.4), ("a", 0.4)], "a", []),
    ],
)
def test_the_selection_is_the_published_one(pairs, positive, negatives):
    example = chain_example(scored(*pairs))
    assert (example and example.positive) == positive
    assert (example and example.negatives) == negatives


# --- the command


@pytest.fixture(scope="module")
def flags(tmp_path_factory):
    """Flags of a build with the bundled models and a random span detector."""
    from rectify.detectors.spans import SpanDetector

    folder = tmp_path_factory.mktemp("command")
    SpanDetector.from_backbone("pocket", lora_r=2).save_pretrained(folder / "spans")
    texts = ["You are such a stupid idiot", "What a fool you are", "The weather was fine", "Come in"]
    (folder / "texts.txt").write_text("\n".join(texts))
    given = {"--texts": folder / "texts.txt", "--scorer": "stub", "--span_detector": folder / "spans"}
    given |= {"--model": "pocket", "--n": 3, "--max_new_tokens": 4, "--min_new_tokens": 2, "--negative": 0, "--seed": 2}
    given |= {"--batch_size": 2, "--validation_share": 0, "--device": "cpu", "--attempts": 2}
    return [str(item) for pair in given.items() for item in pair]


def test_the_command(flags, tmp_path, capsys):
    code, out, err = run_command(main, capsys, "build", "cmd", *flags, "--output_dir", tmp_path)
    assert code == 0, err
    assert [line.split()[0] for line in out.splitlines() if line.strip()] == ["stage", *STAGES]
    assert "continuations to shun" in err
    whole = contents(tmp_path)
    (tmp_path / "rephrase.jsonl").write_bytes(whole[3][:-9])
    (tmp_path / "score.jsonl").unlink()
    code, _, err = run_command(main, capsys, "build", "cmd", *flags, "--output_dir", tmp_path)
    assert code == 0, err
    assert contents(tmp_path) == whole


def test_the_scorer_runs_on_the_device_too(flags, tmp_path):
    more = ["--stages", "prompts", "--scorer", "detector:pocket-reward", "--device", "meta"]
    with pytest.raises((NotImplementedError, RuntimeError), match="meta"):  # which computes nothing
        main(["build", "cmd", *flags, *more, "--output_dir", str(tmp_path)])


@pytest.mark.parametrize(
    ("flag", "value", "said"),
    [
        ("--scorer", None, "scorer is not given, and the stage prompts needs it"),
        ("--span_detector", None, "span_detector is not given, and the stage spans needs it"),
        ("--model", None, "model is not given, and the stage continue needs it"),
        ("--min_similarity", "0.5", "min_similarity is given without similarity_model"),
        ("--filler", "magic:wand", "filler is 'magic:wand'"),
        ("--fill_method", "best_of_n", "fill_method is 'best_of_n'"),
    ],
)
def test_refusals(flags, tmp_path, capsys, flag, value, said):
    given = [*flags, flag, value] if value else flags
    if value is None:
        place = given.index(flag)
        given = given[:place] + given[place + 2 :]
    code, _, err = run_command(main, capsys, "build", "cmd", *given, "--output_dir", tmp_path)
    assert code == 2
    assert said in err


def test_the_judge_is_warned_of(flags, tmp_path, capsys):
    given = [*flags, "--scorer", "pocket", "--stages", "prompts", "--output_dir", tmp_path]
    code, _, err = run_command(main, capsys, "build", "cmd", *given)
    assert code == 0
    assert "the bundled pocket scorer is to judge only" in err
