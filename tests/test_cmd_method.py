"""Self-detoxified generation: chains written by the adapted model, what is shown of them, and what fails."""

import json

import pytest
import torch
from commands import run_command
from peft import TaskType
from prompt_records import records
from transformers import AutoTokenizer

from rectify.adapters import add_adapter, save_adapter
from rectify.chain import Malformed, Steps, frame
from rectify.cli import main
from rectify.errors import CheckpointError, InvalidArgumentError, VocabularyMismatchError
from rectify.evaluation.prompted_run import FAILED, PromptedRun
from rectify.evaluation.run_metrics import measured
from rectify.evaluation.run_settings import RunSettings
from rectify.generation.generator import Continuation, Generator, continue_with
from rectify.generation.prompts import Prompt
from rectify.hub import checkpoint_folder, load_language_model
from rectify.methods.base import WarpingProcessor
from rectify.methods.cmd import ChainWriter, Cmd, SafePrefix
from rectify.methods.self_detoxifier import DetoxifierConfig
from rectify.methods.specs import parse_method
from rectify.sampling import Sampling
from rectify.vocabulary import Fingerprint

GIVEN = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9}
TOXIC = Steps("You <MASK>", "You friend").reasoning
SAFE = Steps().reasoning


@pytest.fixture(scope="module")
def place(make_model, tmp_path_factory):
    """A folder with a tiny `model` whose tokenizer knows words, and an `adapter` of it."""
    folder = tmp_path_factory.mktemp("place")
    special = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    make_model("llama", vocab_size=8192, max_position_embeddings=256, **special).save_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder("pocket"))
    tokenizer.save_pretrained(folder / "model")
    model, _ = load_language_model(str(folder / "model"))
    adapted = add_adapter(
        model, "tiny", task_type=TaskType.CAUSAL_LM, lora_r=2, lora_alpha=4, lora_dropout=0, target_modules=["q_proj"]
    )
    save_adapter(adapted, folder / "adapter", str(folder / "model"))
    DetoxifierConfig(str(folder / "model"), Fingerprint.of(tokenizer)).save_pretrained(folder / "adapter")
    (folder / "prompts.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records()))
    return folder


@pytest.fixture(scope="module")
def loaded(place):
    return load_language_model(str(place / "model"))


@pytest.fixture
def scripted(loaded, monkeypatch):
    """`scripted(texts)`: a writer whose reasoning is given for each prompt, as a trained model would write it."""

    def of(texts, processor=None, **options):
        model, tokenizer = loaded
        warping = WarpingProcessor(model, tokenizer, GIVEN)
        writer = ChainWriter(model, tokenizer, warping, SafePrefix(processor or warping), 64, False, **options)
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]

        def reason(own, prompts, frames, limit):
            n = own.num_return_sequences
            return [row for row in ids for _ in range(n)]

        monkeypatch.setattr(writer, "_reason", reason)
        return writer

    return of


@pytest.fixture
def make(loaded):
    """`make(**changes)`: a generator."""

    def of(**changes):
        model, tokenizer = loaded
        given = {"max_new_tokens": 5, "num_return_sequences": 2, "seed": 1} | changes
        return Generator(model, tokenizer, Sampling.resolve(model.generation_config, **GIVEN), **given)

    return of


def test_the_continuation_alone_is_shown_and_counted(scripted, make, loaded):
    _, tokenizer = loaded
    prompts = [Prompt("You fool"), Prompt("It was a day")]
    found = scripted([TOXIC, SAFE])(make(), prompts)
    for prompt, chain, row in zip(prompts, (TOXIC, SAFE), found, strict=True):
        assert len(row) == 2
        for one in row:
            assert one.chain == chain
            assert one.failure is None
            assert len(one.token_ids) <= 5
            assert one.text == tokenizer.decode(one.token_ids)
            assert " #" not in one.text
        # what is continued is the chain
        ids = tokenizer(frame(prompt.text))["input_ids"] + tokenizer(chain, add_special_tokens=False)["input_ids"]
        alone = make().new_tokens(
            torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long), make().keys([prompt]), copies=2
        )
        assert [tuple(each[: len(one.token_ids)]) for each, one in zip(alone.tolist(), row, strict=True)] == [
            one.token_ids for one in row
        ]


def test_a_malformed_chain_is_a_failure(scripted, make):
    prompts = [Prompt("You fool"), Prompt("It was"), Prompt("One day")]
    found = scripted([Steps("You fool", "You").reasoning, " # and so on", SAFE])(make(), prompts)
    assert [row[0].failure for row in found] == [Malformed.NO_MASK, Malformed.UNFINISHED, None]
    for row in found[:2]:
        for one in row:
            assert (one.text, one.token_ids) == ("", ())
            assert one.chain


def test_a_batch_gives_what_its_rows_give(scripted, make):
    prompts, chains = [Prompt("You fool"), Prompt("It was a long day")], [TOXIC, SAFE]
    alone = [scripted([chain])(make(), [prompt])[0] for prompt, chain in zip(prompts, chains, strict=True)]
    assert scripted(chains)(make(), prompts) == alone


def test_at_least_as_many_tokens_as_asked_for_are_written(scripted, make, loaded):
    """The marker that closes a continuation is forbidden before, as the end token is."""
    _, tokenizer = loaded
    close = tokenizer(" #", add_special_tokens=False)["input_ids"][0]

    class Eager:
        """Closes at once if it may."""

        def __call__(self, input_ids, scores):
            return scores.index_fill(-1, torch.tensor([close]), 1e3).where(scores > -torch.inf, -torch.inf)

        def set_attention_mask(self, attention_mask):
            pass

    for least in (0, 3):
        for row in scripted([SAFE], Eager())(make(min_new_tokens=least), [Prompt("It was")]):
            assert [len(one.token_ids) for one in row] == [least] * 2


def test_another_method_reads_the_safe_text(scripted, make, loaded):
    _, tokenizer = loaded
    seen = []

    class Note(WarpingProcessor):
        def __call__(self, input_ids, scores):
            real = self.padding.real(input_ids)
            seen.append([tokenizer.decode(row[there]) for row, there in zip(input_ids, real, strict=True)])
            return super().__call__(input_ids, scores)

    note = Note(*loaded, GIVEN)
    found = scripted([TOXIC, SAFE], note)(make(num_return_sequences=1), [Prompt("You fool"), Prompt("It was a day")])
    assert seen[0] == ["You friend", "It was a day"]
    for step, texts in enumerate(seen):
        for row, text, begin in zip(found, texts, seen[0], strict=True):
            if step < len(row[0].token_ids):
                assert text == begin + tokenizer.decode(row[0].token_ids[:step])


def test_a_model_writes_until_the_marker(place, loaded, make):
    """With a real, untrained model nothing is a chain; its tokens are bounded, and it does not depend on the batch."""
    decoder = parse_method(f"cmd:{place / 'adapter'},chain_tokens=6").bind(*loaded, GIVEN)
    prompts = [Prompt("You fool"), Prompt("It was a long day")]
    found = continue_with(make(), prompts, decoder)
    assert found == [continue_with(make(), [prompt], decoder)[0] for prompt in prompts]
    for row in found:
        assert len(set(row)) == 2  # each sample has a chain of its own
        assert {one.failure for one in row} == {Malformed.UNFINISHED}
    decoder = parse_method(f"cmd:{place / 'adapter'},chain_tokens=6,chain=greedy").bind(*loaded, GIVEN)
    for row in continue_with(make(), prompts, decoder):
        assert len(set(row)) == 1
    # one that leaves little room shortens no other chain
    middle, long = Prompt("word " * 217), Prompt("word " * 250)
    short, cut, row = continue_with(make(), [prompts[0], middle, long], decoder)
    assert short == continue_with(make(), prompts[:1], decoder)[0]
    assert cut[0].failure == Malformed.UNFINISHED
    assert row == [Continuation("", (), failure=str(Malformed.TOO_LONG))] * 2


def test_the_marker_ends_the_reasoning(loaded, make):
    model, tokenizer = loaded
    ids = tokenizer(SAFE + " and", add_special_tokens=False)["input_ids"]

    class Say:
        """Writes a text, whatever the model would."""

        def __call__(self, input_ids, scores):
            step = input_ids.shape[1] - self.length
            return torch.full_like(scores, -1e9).index_fill(-1, torch.tensor([ids[step]]), 0.0)

        def set_attention_mask(self, attention_mask):
            self.length = attention_mask.shape[1]

    writer = ChainWriter(model, tokenizer, Say(), SafePrefix(WarpingProcessor(*loaded, GIVEN)), 64, False)
    for row in writer(make(), [Prompt("It was"), Prompt("It was not so")]):
        assert {(one.chain, one.failure) for one in row} == {(SAFE, None)}


def test_a_malformed_chain_is_written_again(loaded, make, monkeypatch):
    model, tokenizer = loaded
    good, bad = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in (SAFE, " # and so on"))
    prompts, scripts, asked = [Prompt("It was"), Prompt("It was not so")], [], []

    def write(own, frames, keys, copies, limit):
        asked.append((len(frames), copies, keys.tolist()))
        return scripts[len(asked) - 1]

    def found(tries):
        asked.clear()
        scripts[:] = [[good, bad, bad, good], [bad, good], [bad]]
        warping = WarpingProcessor(*loaded, GIVEN)
        writer = ChainWriter(model, tokenizer, warping, SafePrefix(warping), 64, False, tries)
        monkeypatch.setattr(writer, "_write", write)
        return [one.failure is not None for row in writer(make(), prompts) for one in row]

    assert found(1) == [False, True, True, False]
    assert found(2) == [False, True, False, False]
    assert found(3) == [False, True, False, False]
    assert [rows for *rows, _ in asked] == [[2, 2], [2, 1], [1, 1]]
    keys = [key for *_, each in asked for key in each]
    assert len({*map(str, keys)}) == len(keys)  # other noise each time


# --- commands


def test_output_records_hold_the_chain(place, tmp_path, capsys):
    flags = ["--model", place / "model", "--prompt", "You fool", "--device", "cpu", "--max_new_tokens", 4]
    flags += ["--method", f"cmd:{place / 'adapter'},chain_tokens=5"]
    code, out, err = run_command(main, capsys, "generate", *flags)
    assert code == 0, err
    assert "[failed: the chain does not come to a generation]" in out
    code, _, err = run_command(main, capsys, "generate", *flags, "--output", tmp_path / "out.jsonl")
    assert code == 0, err
    (one,) = json.loads((tmp_path / "out.jsonl").read_text())["generations"]
    assert one["failure"] == Malformed.UNFINISHED
    assert one["text"] == ""
    assert one["chain"]
    code, _, err = run_command(main, capsys, "generate", *flags, "--trace", tmp_path / "trace.json")
    assert code == 2
    assert "trace" in err
    code, _, err = run_command(main, capsys, "generate", *flags, "--chat")
    assert code == 2
    assert "chat is given with 'cmd:" in err


def test_failures_count_as_toxic(place, tmp_path):
    settings = RunSettings(
        model=str(place / "model"),
        prompts=str(place / "prompts.jsonl"),
        output_dir=str(tmp_path),
        methods=(f"cmd:{place / 'adapter'},chain_tokens=4",),
        scorers=("stub",),
        num_prompts=4,
        n=2,
        max_new_tokens=3,
        split="all",
        resamples=10,
        device="cpu",
    )
    run = PromptedRun(settings)
    run.run(("generate", "score", "measure"))
    metrics = measured(run)
    base, cmd = metrics["methods"]
    assert cmd["diversity"]["all"]["failed"] == 1.0
    assert base["diversity"]["all"]["failed"] == 0.0
    assert cmd["toxicity"]["stub"]["all"]["TOXICITY"]["toxic_share"]["value"] == FAILED
    assert cmd["toxicity"]["stub"]["all"]["TOXICITY"]["failures"] == 0
    assert cmd["clean"] is None
    assert any("failed to write 100.0% of its continuations" in warning for warning in metrics["warnings"])
    assert all(one.chain for ones in run.records_of(run.methods[1], 0) for one in ones)


# --- what is refused


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "cmd names no adapter"),
        ({"path": "a", "chain": "beam"}, "chain is 'beam': give sample or greedy"),
        ({"path": "a", "chain_tokens": 0}, "chain_tokens is 0"),
        ({"path": "a", "tries": 0}, "tries is 0"),
    ],
)
def test_bad_parameters_are_refused(given, said):
    with pytest.raises(InvalidArgumentError, match=said):
        Cmd(**given)


def test_adapters_that_do_not_fit_are_refused(place, loaded, make_model, make_tokenizer, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no cmd_config\.json"):
        Cmd(path=str(place / "model")).bind(*loaded, GIVEN)
    with pytest.raises(VocabularyMismatchError, match="train chain adapters from a model of this vocabulary"):
        Cmd(path=str(place / "adapter")).bind(make_model(), make_tokenizer(), GIVEN)
    with pytest.raises(InvalidArgumentError, match="best_of_n is no change of next-token scores"):
        parse_method(f"cmd:{place / 'adapter'}+best_of_n").bind(*loaded, GIVEN)
    with pytest.raises(InvalidArgumentError, match="cannot be combined"):
        parse_method(f"self_debias+cmd:{place / 'adapter'}")


def test_combined_with_rectification(place, loaded, make, make_q_network):
    model, tokenizer = loaded
    make_q_network(
        "llama", vocab_size=8192, max_position_embeddings=256, tokenizer=tokenizer, pad_token_id=0
    ).save_pretrained(place / "q")
    method = parse_method(f"cmd:{place / 'adapter'},chain_tokens=6+rectify:{place / 'q'},beta=3")
    assert method.label == f"cmd:{place / 'adapter'},chain_tokens=6+rectify:{place / 'q'},beta=3"
    assert (method.strength, method.value) == ("beta", 3.0)
    assert method.family == f"cmd:{place / 'adapter'},chain_tokens=6+rectify:{place / 'q'}"
    decoder = method.bind(model, tokenizer, GIVEN)
    assert len(decoder.reads) == 2
    writer = decoder.write
    ids = tokenizer(TOXIC, add_special_tokens=False)["input_ids"]
    writer._reason = lambda own, prompts, frames, limit: [ids] * len(prompts) * own.num_return_sequences
    (row,) = continue_with(make(), [Prompt("You fool")], decoder)
    assert all(one.failure is None for one in row)
    assert decoder.processor.statistics().decisions > 0
