"""DExperts against a float64 reference of three plain models; and the training of expert and anti-expert."""

import json
import math
import random
import shutil

import pytest
import torch
from commands import run_command
from decoding import padded, warped
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from rectify import CheckpointError, InvalidArgumentError, VocabularyMismatchError
from rectify.adapters import save_adapter
from rectify.cli import main
from rectify.hub import load_language_model
from rectify.methods.base import Base
from rectify.methods.dexperts import DExperts, DExpertsProcessor
from rectify.methods.expert_pair import ExpertsConfig, load_experts
from rectify.training.experts import EncodedTexts, ExpertSettings, train_experts
from rectify.training.language_model import collate, text_nll
from rectify.vocabulary import Fingerprint

PLAIN = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
ROWS = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15, 16], [17]]
SIDES = ["expert", "anti_expert"]
BAD_WORD = "t50"


@pytest.fixture(scope="module")
def bases(make_model, make_tokenizer, tmp_path_factory):
    """A folder of model and tokenizer of each kind."""
    folders = {}
    for kind in ("gpt2", "llama"):
        folders[kind] = tmp_path_factory.mktemp(kind)
        make_model(kind, seed=4).save_pretrained(folders[kind])
        make_tokenizer().save_pretrained(folders[kind])
    return folders


def add_noise(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_pair(folder, base):
    model, tokenizer = load_language_model(str(base))
    for seed, side in enumerate(SIDES):
        model, _ = load_language_model(str(base))
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        save_adapter(add_noise(get_peft_model(model, adapter), seed), folder / side, str(base))
    ExpertsConfig(str(base), Fingerprint.of(tokenizer)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pairs(bases, tmp_path_factory):
    return {kind: write_pair(tmp_path_factory.mktemp("pair"), base) for kind, base in bases.items()}


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def model(make_model, kind):
    return make_model(kind, seed=6)  # a model of another weights than the experts' base, as is usual


@pytest.fixture(scope="module")
def tokenizer(make_tokenizer):
    return make_tokenizer()


@pytest.fixture
def make(model, tokenizer, pairs, kind):
    """`make(alpha, **sampling)`: the processor of the method."""

    def of(alpha=2.0, **sampling):
        return DExperts(alpha, path=str(pairs[kind])).bind(model, tokenizer, PLAIN | sampling).processor

    return of


@pytest.fixture(scope="module")
def references(bases, pairs, kind):
    """Expert and anti-expert in float64, as peft itself loads and runs them."""
    base = [AutoModelForCausalLM.from_pretrained(bases[kind], dtype=torch.float32) for _ in SIDES]
    adapted = [PeftModel.from_pretrained(one, str(pairs[kind] / side)) for one, side in zip(base, SIDES, strict=True)]
    return [one.double().eval() for one in adapted]


@torch.no_grad()
def expected_policy(scores, text, references, alpha, **sampling):
    """The ensemble after one text without padding, from its base scores `[V]`: `[V]` float64."""
    policy = warped(scores, **sampling)
    expert, anti = (one(input_ids=torch.tensor([text])).logits[0, -1] for one in references)
    return (policy.log() + alpha * (expert - anti)).softmax(-1)


@torch.no_grad()
def scores_of(model, ids, mask):
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    return model(ids, attention_mask=mask, position_ids=positions).logits[:, -1]


@pytest.mark.parametrize("alpha", [0.5, 2.0])
@pytest.mark.parametrize("sampling", [{}, {"top_p": 0.8}, {"temperature": 0.7, "top_k": 9}], ids=str)
def test_the_policy_is_that_of_the_paper(model, make, references, alpha, sampling):
    ids, mask = padded(ROWS, pad=0)
    scores = scores_of(model, ids, mask)
    found = make(alpha, **sampling)(ids, scores)
    for row, base, policy in zip(ROWS, scores, found.softmax(-1), strict=True):
        expected = expected_policy(base, row, references, alpha, **sampling)
        assert torch.allclose(policy.double(), expected, rtol=0, atol=2e-5)
    gone = warped(scores[0], **sampling) == 0
    assert torch.equal(found[0] == -math.inf, gone)
    assert (found.softmax(-1) - scores.softmax(-1)).abs().sum(-1).min() > 0.05


def test_no_weight_gives_the_scores_of_the_base(model, make, tokenizer):
    ids, mask = padded(ROWS, pad=0)
    scores = scores_of(model, ids, mask)
    scores[:, 2] = -math.inf
    for sampling in ({}, {"temperature": 0.7, "top_p": 0.8}):
        base = Base().bind(model, tokenizer, PLAIN | sampling).processor
        assert torch.equal(make(0.0, **sampling)(ids, scores.clone()), base(ids, scores.clone()))


def test_a_batch_gives_what_its_rows_give_and_padding_counts_for_nothing(model, make):
    ids, mask = padded(ROWS, pad=0, more=3)
    scores = scores_of(model, ids, mask)
    together = make()(ids, scores)
    for row, line, alone in zip(ROWS, scores, together, strict=True):
        assert torch.allclose(make()(torch.tensor([row]), line[None])[0], alone, rtol=0, atol=1e-3)
    # padding that may be text, told apart by the mask
    processor = make()
    processor.set_attention_mask(mask)
    assert torch.allclose(processor(ids.masked_fill(mask == 0, 7), scores), together, rtol=0, atol=1e-3)


def test_permuted_and_shortened_rows_are_answered_as_by_a_fresh_processor(make):
    torch.manual_seed(1)
    ids, processor = torch.randint(3, 97, (4, 12)), make()
    for rows, length in (([0, 1, 2, 3], 7), ([0, 1, 2, 3], 8), ([3, 3, 0, 1], 9), ([3, 0], 8), ([2, 1, 0, 3], 12)):
        prefixes, scores = ids[rows][:, :length], torch.randn(len(rows), 97)
        expected = make()(prefixes, scores)
        assert torch.allclose(processor(prefixes, scores), expected, rtol=0, atol=1e-3)
    processor.reset()
    assert torch.allclose(processor(prefixes, scores), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("options", [{"do_sample": True}, {"do_sample": False, "num_beams": 3}], ids=str)
def test_generation_is_the_same_with_and_without_a_cache(model, make, options):
    ids = torch.randint(3, 97, (2, 6), generator=torch.Generator().manual_seed(2))
    slow = make()
    for network in (slow.expert, slow.anti_expert):
        network._memo.use_cache = False
    outputs = []
    for processor in (make(), slow, make(0.0)):
        torch.manual_seed(7)
        how = processor.sampling.generate_kwargs() | {"attention_mask": torch.ones_like(ids)} | options
        outputs.append(model.generate(ids, logits_processor=[processor], max_new_tokens=10, **how))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_embeddings_of_another_width_are_left_to_the_base(make_model, make_tokenizer, pairs, tokenizer):
    ids = torch.tensor([[5, 6, 7]])
    scores = torch.randn(1, 97)
    narrow = DExperts(path=str(pairs["llama"])).bind(make_model("llama"), tokenizer, PLAIN).processor
    expected = narrow(ids, scores)
    wide = torch.cat((scores, torch.randn(1, 3)), 1)
    assert torch.equal(narrow(ids, wide), torch.cat((expected, wide[:, 97:]), 1))
    assert torch.equal(narrow(ids, scores[:, :90]), expected[:, :90])


# --- loading


def test_adapters_are_folded_in_but_in_half_precision(pairs, bases, tokenizer):
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = load_experts(pairs["llama"], tokenizer)
    half = load_experts(pairs["llama"], tokenizer, torch.bfloat16)
    for one, other in zip(whole, half, strict=True):
        assert not one.training
        assert not any(parameter.requires_grad for parameter in one.parameters())
        assert not any("lora" in name for name in one.state_dict())
        assert any("lora" in name for name in other.state_dict())
        with torch.no_grad():
            difference = one(ids).logits - other(ids).logits.float()
        assert difference.abs().max() < 0.5
    decoder = DExperts(path=str(pairs["llama"])).bind(half[0], tokenizer, PLAIN)
    assert [network.dtype for network in decoder.reads] == [torch.bfloat16] * 2
    assert decoder.processor(ids, torch.randn(1, 97).bfloat16()).dtype == torch.float32


def cut(folder):
    weights = load_file(folder / "anti_expert" / "adapter_model.safetensors")
    weights.pop(min(weights))
    save_file(weights, folder / "anti_expert" / "adapter_model.safetensors")


def change_config(**changes):
    def change(folder):
        path = folder / "experts_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


HARM = {
    "no config": lambda folder: (folder / "experts_config.json").unlink(),
    "config is cut": lambda folder: (folder / "experts_config.json").write_text("{"),
    "config of a later version": change_config(format_version=2),
    "config has another field": change_config(depth=3),
    "no base": change_config(base_model="nowhere/at/all"),
    "no adapter config": lambda folder: (folder / "expert" / "adapter_config.json").unlink(),
    "no weights": lambda folder: (folder / "expert" / "adapter_model.safetensors").unlink(),
    "weights are cut": lambda folder: (folder / "expert" / "adapter_model.safetensors").write_bytes(b"12"),
    "a weight is missing": cut,
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_folder_is_refused(bases, tokenizer, tmp_path, harm):
    HARM[harm](write_pair(tmp_path, bases["llama"]))
    with pytest.raises(CheckpointError) as caught:
        load_experts(tmp_path, tokenizer)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_another_vocabulary_is_refused(pairs, make_model, make_tokenizer):
    for other, said in ((make_tokenizer(rename={40: "x40"}), "97 tokens"), (make_tokenizer(words=90), "90 tokens")):
        with pytest.raises(VocabularyMismatchError, match=said):
            DExperts(path=str(pairs["llama"])).bind(make_model("llama"), other, PLAIN)


def test_an_expert_whose_logits_are_changed_is_refused(make_model, tokenizer):
    model, odd = make_model("llama"), make_model("llama")
    odd.lm_head.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    with pytest.raises(InvalidArgumentError, match="anti-expert"):
        DExpertsProcessor(model, odd, 2.0, model, tokenizer, PLAIN)


def test_labels_and_parameters():
    assert DExperts(path="pair").label == "dexperts:pair,alpha=2"
    assert DExperts(1.5, path="pair").family == "dexperts:pair"
    with pytest.raises(InvalidArgumentError, match="dexperts:FOLDER"):
        DExperts()
    for alpha in (-1.0, math.nan, math.inf):
        with pytest.raises(InvalidArgumentError, match="alpha"):
            DExperts(alpha, path="pair")


# --- training


def examples(count, seed):
    """Texts of 2 to 6 words; toxic ones repeat the bad word."""
    draw = random.Random(seed)
    rows = []
    for index in range(count):
        words = [f"t{draw.randrange(60, 70)}" for _ in range(draw.randint(2, 6))]
        if index % 2:
            words[1::2] = [BAD_WORD] * len(words[1::2])
        rows.append((" ".join(words), float(index % 2)))
    return rows


TRAIN, HELD = examples(128, seed=0), examples(32, seed=1)


def arguments(folder, **changes):
    given = {
        "output_dir": str(folder),
        "learning_rate": 2e-2,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 16,
        "train_sampling_strategy": "group_by_length",
        "save_strategy": "steps",
        "save_steps": 3,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**given | changes)


def settings(bases, **changes):
    return ExpertSettings(**{"model_name_or_path": str(bases["llama"]), "max_length": 24, "lora_r": 4} | changes)


class Kill(TrainerCallback):
    """What a kill is to a training: it ends right after a checkpoint."""

    def __init__(self, side, step):
        self.side, self.step = side, step

    def on_save(self, args, state, control, **kwargs):
        if args.output_dir.endswith(f"/{self.side}") and state.global_step >= self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(bases, tmp_path_factory):
    """The folder of a training that nothing interrupted."""
    folder = tmp_path_factory.mktemp("trained")
    train_experts(settings(bases, lora_dropout=0.1), arguments(folder), TRAIN, HELD)
    return folder


def test_each_learns_its_own_texts(trained, bases, make_tokenizer):
    config = ExpertsConfig.from_pretrained(trained)
    for side in SIDES:
        record = config.training[side]
        assert (record["texts"], record["validation_texts"], record["steps"]) == (64, 16, 8)
        assert record["nll"] < record["base_nll"] - 0.5
        files = {path.name for path in (trained / side).iterdir() if path.is_file()}
        named = {"adapter_config.json", "adapter_model.safetensors", "all_results.json", "run_settings.json"}
        assert named <= files
        assert all("lora_" in name for name in load_file(trained / side / "adapter_model.safetensors"))
    base, tokenizer = load_language_model(str(bases["llama"]))
    bad = int(BAD_WORD[1:])
    chances = {}
    for alpha in (0.0, 2.0):
        processor = DExperts(alpha, path=str(trained)).bind(base, tokenizer, PLAIN).processor
        chances[alpha] = processor(torch.tensor([[60]]), torch.zeros(1, 97)).softmax(-1)[0, bad].item()
    assert chances[2.0] < chances[0.0] / 2


@torch.no_grad()
def test_the_recorded_losses_are_those_of_the_loaded_models(trained, bases, tokenizer):
    base, _ = load_language_model(str(bases["llama"]))
    for side, expert in zip(SIDES, load_experts(trained, tokenizer), strict=True):
        for name, network in (("nll", expert), ("base_nll", base)):
            total, count = 0.0, 0
            for text, label in HELD:
                if (label >= 0.5) == (side == "anti_expert"):
                    ids = [int(word[1:]) for word in text.split()] + [2]
                    chances = network.double()(torch.tensor([ids])).logits[0].log_softmax(-1)
                    total -= sum(float(chances[place, token]) for place, token in enumerate(ids[1:]))
                    count += len(ids) - 1
            found = ExpertsConfig.from_pretrained(trained).training[side][name]
            assert found == pytest.approx(total / count, abs=1e-4)


def test_other_weights_under_the_experts_are_refused(trained, tmp_path, make_tokenizer):
    shutil.copytree(trained, tmp_path / "d")
    path = tmp_path / "d" / "experts_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_fingerprint": "0"}))
    with pytest.raises(CheckpointError, match="was trained on weights 0 of"):
        load_experts(tmp_path / "d", make_tokenizer())


@pytest.mark.parametrize(("side", "step"), [("expert", 3), ("anti_expert", 6)])
def test_a_killed_training_goes_on_as_if_nothing_had_happened(bases, trained, tmp_path, side, step):
    given = settings(bases, lora_dropout=0.1)
    with pytest.raises(KeyboardInterrupt):
        train_experts(given, arguments(tmp_path), TRAIN, HELD, callbacks=[Kill(side, step)])
    assert not (tmp_path / "experts_config.json").exists()
    first = tmp_path / "expert" / "adapter_model.safetensors"
    finished = first.stat().st_mtime_ns if first.exists() else None
    assert (finished is None) == (side == "expert")
    train_experts(given, arguments(tmp_path), TRAIN, HELD)
    assert finished in (None, first.stat().st_mtime_ns)
    for name in SIDES:
        expected, found = (load_file(folder / name / "adapter_model.safetensors") for folder in (trained, tmp_path))
        assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert ExpertsConfig.from_pretrained(tmp_path) == ExpertsConfig.from_pretrained(trained)


def test_a_finished_folder_and_changed_settings_are_refused(bases, trained, tmp_path):
    given = settings(bases, lora_dropout=0.1)
    with pytest.raises(InvalidArgumentError, match="finished"):
        train_experts(given, arguments(trained), TRAIN, HELD)
    with pytest.raises(InvalidArgumentError, match="resume_from_checkpoint"):
        train_experts(given, arguments(tmp_path, resume_from_checkpoint="checkpoint-3"), TRAIN, HELD)
    with pytest.raises(KeyboardInterrupt):
        train_experts(given, arguments(tmp_path), TRAIN, HELD, callbacks=[Kill("anti_expert", 3)])
    for name, changed, how, rows in (
        ("lora_alpha", {"lora_alpha": 4}, {}, TRAIN),
        ("learning_rate", {}, {"learning_rate": 1e-3}, TRAIN),
        ("texts_sha256", {}, {}, TRAIN[2:]),
    ):
        with pytest.raises(InvalidArgumentError, match=f"expert' holds a finished training with {name}"):
            train_experts(settings(bases, lora_dropout=0.1, **changed), arguments(tmp_path, **how), rows, HELD)
    # the anti-expert alone has other texts
    with pytest.raises(InvalidArgumentError, match="anti_expert' holds checkpoints of a training with texts_sha256"):
        train_experts(given, arguments(tmp_path), [*TRAIN, ("t60 t50", 0.5)], HELD)


def test_what_cannot_be_trained_is_refused_before_anything_is(bases, tmp_path):
    clean = [row for row in TRAIN if row[1] < 0.5]
    for changes, train, held, said in (
        ({}, clean, HELD, "train has no toxic text"),
        ({}, TRAIN, clean, "validation has no toxic text"),
        ({}, [("", 0.0), *TRAIN[1::2]], HELD, "train has no non-toxic text"),
        ({"max_length": 1}, TRAIN, HELD, "max_length is 1: give a number from 2 to 160"),
        ({"max_length": 161}, TRAIN, HELD, "max_length is 161"),
        ({"lora_r": 0}, TRAIN, HELD, "lora_r 0"),
        ({"target_modules": ["nowhere"]}, TRAIN, HELD, "nowhere"),
    ):
        with pytest.raises(InvalidArgumentError, match=said) as caught:
            train_experts(settings(bases, **changes), arguments(tmp_path / "out"), train, held)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="nothing"):
        train_experts(settings(bases, model_name_or_path="nothing"), arguments(tmp_path / "out"), TRAIN, HELD)


def test_texts_end_with_the_end_token_where_it_fits(tokenizer):
    data = EncodedTexts(tokenizer, ["t5 t6 t7 t8", "t5", "t5 t6 t2", "", "t30 t31 t32"], 4, "none")
    assert [item["input_ids"] for item in data.items] == [[5, 6, 7, 8], [5, 2], [5, 6, 2], [30, 31, 32, 2]]


def test_padding_is_left_out_of_the_loss():
    batch = collate([{"input_ids": [5, 2]}, {"input_ids": [6, 7, 0, 8]}])
    torch.manual_seed(0)
    logits = torch.randn(2, 4, 9)
    nll, tokens = text_nll(logits, batch["labels"])
    chances = logits.double().log_softmax(-1)
    expected = [-chances[0, 0, 2], -chances[1, 0, 7] - chances[1, 1, 0] - chances[1, 2, 8]]
    assert tokens.tolist() == [1, 3]
    assert nll.tolist() == pytest.approx([float(value) for value in expected], abs=1e-5)


# --- the command


@pytest.fixture
def flags(bases, tmp_path):
    file = tmp_path / "train.jsonl"
    rows = [{"comment": text, "toxic": 0.7 * label} for text, label in [*TRAIN, (" ", 0)]]
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
    given = ["--model_name_or_path", bases["gpt2"], "--train_files", file, "--output_dir", tmp_path / "out"]
    columns = ["--text_column", "comment", "--label_column", "toxic"]
    return ["train", "experts", *given, *columns, "--max_length", "24", "--use_cpu", "--disable_tqdm", "True"]


def test_the_command(flags, tmp_path, capsys, tokenizer):
    code, _, said = run_command(main, capsys, *flags, "--learning_rate", "0.02", "--validation_share", "0.25")
    assert code == 0, said
    assert "1 blank" in said
    assert "anti_expert: " in said
    assert f"dexperts:{tmp_path / 'out'}" in said
    records = ExpertsConfig.from_pretrained(tmp_path / "out").training
    assert all(records[side]["nll"] < records[side]["base_nll"] for side in SIDES)
    assert sum(records[side]["texts"] + records[side]["validation_texts"] for side in SIDES) == len(TRAIN)
    assert len(load_experts(tmp_path / "out", tokenizer)) == 2
    code, _, said = run_command(main, capsys, *flags)
    assert code == 2
    assert "finished" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--label_column", "label"], "label_column"),
        (["--max_length", "0"], "max_length"),
        (["--lora_r", "0"], "lora_r"),
        (["--model_name_or_path", "nowhere"], "nowhere"),
        (["--no_such_flag"], "no_such_flag"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_refusals_are_one_line(flags, capsys, more, said):
    code, _, err = run_command(main, capsys, *flags, *more)
    lines = [line for line in err.splitlines() if not line.startswith("texts: ")]
    assert code == 2
    assert len(lines) == 1
    assert said in lines[0]
