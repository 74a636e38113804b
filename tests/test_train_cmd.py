"""Training on chains: the loss against a slow reference, what is compared, resuming, and what is refused."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from commands import run_command
from peft import TaskType
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration, TrainerCallback, TrainingArguments

from rectify.adapters import add_adapter
from rectify.builders.cmd_records import ChainExample, to_json
from rectify.chain import frame
from rectify.cli import main
from rectify.errors import CheckpointError, InvalidArgumentError
from rectify.hub import checkpoint_folder, load_language_model
from rectify.methods.self_detoxifier import DetoxifierConfig, load_detoxifier
from rectify.sentence_encoder import masked_mean
from rectify.training.chain_data import EncodedChains, collate
from rectify.training.cmd import ChainLearning, ChainSettings, train_chains
from rectify.training.cmd_loss import contrastive_loss
from rectify.training.language_model import text_nll

EXAMPLES = [
    ChainExample(
        prompt=f"You are such {article} fool",
        masked=f"You are such {article} <MASK>",
        rephrased=f"You are such {article} friend",
        positive=" and I like you",
        negatives=[" and I hate you", " you dog"][:number],
    )
    for number, article in enumerate(["a", "the", "my", "our"])
] + [ChainExample(prompt="It was", masked=None, rephrased=None, positive=" late", negatives=[" a damn mess"])]


@pytest.fixture(scope="module")
def base(make_model, tmp_path_factory):
    """A folder with a tiny model, and a tokenizer that knows the words of chains."""
    folder = tmp_path_factory.mktemp("base")
    make_model("llama", vocab_size=8192, pad_token_id=0, bos_token_id=0, eos_token_id=0).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint_folder("pocket")).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base):
    """`settings(**changes)`."""

    def of(**changes):
        given = {"max_length": 120, "sample_tokens": 4, "lora_r": 2, "lora_dropout": 0.3} | changes
        return ChainSettings(str(base), **given)

    return of


def arguments(folder, **changes):
    given = {"per_device_train_batch_size": 2, "max_steps": 4, "save_steps": 2, "logging_steps": 2, "report_to": "none"}
    given |= {"use_cpu": True, "learning_rate": 1e-2, "disable_tqdm": True, "save_strategy": "steps"}
    return TrainingArguments(str(folder), **given | changes)


@pytest.fixture
def learning(settings):
    """`learning(**changes)`: a model in training, and the examples in tokens."""

    def of(examples=EXAMPLES, **changes):
        chosen = settings(**changes)
        model, tokenizer = load_language_model(chosen.model_name_or_path)
        torch.manual_seed(0)
        adapted = add_adapter(
            model,
            "tiny",
            task_type=TaskType.CAUSAL_LM,
            lora_r=2,
            lora_alpha=4,
            lora_dropout=chosen.lora_dropout,
            target_modules=["all-linear"],
        )
        data = EncodedChains(tokenizer, examples, chosen.max_length, chosen.sample_tokens, "examples")
        return ChainLearning(adapted, tokenizer, chosen, data.close_ids, 0), data

    return of


# --- the loss


def reference_loss(written, candidates, known, temperature):
    """The definition, one number after the other."""
    losses = []
    for h, rows, there in zip(written, candidates, known, strict=True):
        if not there[0] or not any(there[1:]):
            losses.append(None)
            continue
        scores = [
            math.exp(float(np.dot(h, c)) / (np.linalg.norm(h) * np.linalg.norm(c)) / temperature)
            for c, is_there in zip(rows, there, strict=True)
            if is_there
        ]
        losses.append(-math.log(scores[0] / math.fsum(scores)))
    return losses


@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_the_loss_is_the_definition(temperature):
    """Published elsewhere in the system: a softmax of a softmax. Here there is one, and padding rows are in none."""
    generator = torch.Generator().manual_seed(0)
    written, candidates = torch.randn(6, 5, generator=generator), torch.randn(6, 4, 5, generator=generator)
    known = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0], [0, 1, 1, 0], [1, 0, 1, 1], [0, 0, 0, 0]]).bool()
    losses, active = contrastive_loss(written, candidates.masked_fill(~known[..., None], 0.0), known, temperature)
    expected = reference_loss(written.double().numpy(), candidates.double().numpy(), known.tolist(), temperature)
    assert active.tolist() == [value is not None for value in expected] == [True, True, False, False, True, False]
    assert losses.tolist() == pytest.approx([value or 0.0 for value in expected], rel=1e-5)


def test_the_gradient_is_finite_where_nothing_is_known():
    written, candidates = torch.randn(2, 3, requires_grad=True), torch.zeros(2, 3, 3, requires_grad=True)
    losses, active = contrastive_loss(written, candidates, torch.zeros(2, 3, dtype=torch.bool))
    losses.sum().backward()
    assert not active.any()
    assert torch.equal(written.grad, torch.zeros(2, 3))
    with pytest.raises(InvalidArgumentError, match="temperature is 0"):
        contrastive_loss(written, candidates, torch.zeros(2, 3, dtype=torch.bool), 0)


def test_the_mean_leaves_padding_out():
    """Published: the mean went over all 24 places, padding among them."""
    hidden = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.allclose(masked_mean(hidden, mask)[0], hidden[0, :2].mean(0))
    assert torch.allclose(masked_mean(hidden, mask)[1], hidden[1].mean(0))
    assert torch.equal(masked_mean(hidden, torch.zeros(2, 4)), torch.zeros(2, 3))


# --- chains in tokens


def test_the_frame_is_given_and_the_rest_learned(base):
    _, tokenizer = load_language_model(str(base))
    data = EncodedChains(tokenizer, EXAMPLES, 120, 4, "examples")
    for example, item in zip(EXAMPLES, data.items, strict=True):
        framed = tokenizer(frame(example.prompt))["input_ids"]
        assert item["input_ids"][: len(framed)] == framed
        assert item["labels"][: len(framed)] == [-100] * len(framed)
        assert tokenizer.decode(item["labels"][len(framed) :]) == (
            f"{example.steps.reasoning}{example.positive} #<|endoftext|>"
        )
        assert tokenizer.decode(item["template_ids"]) == frame(example.prompt) + example.steps.reasoning
        texts = [tokenizer.decode(ids) for ids in item["candidate_ids"]]
        assert texts == [example.positive, *example.negatives]
        assert item["toxic"] == (example.masked is not None)


def test_a_long_chain_is_left_out_and_counted(base):
    _, tokenizer = load_language_model(str(base))
    data = EncodedChains(tokenizer, EXAMPLES, 60, 4, "examples")
    assert (len(data), data.too_long) == (1, 4)
    with pytest.raises(InvalidArgumentError, match="none of 5 chains has at most 9 tokens: raise max_length"):
        EncodedChains(tokenizer, EXAMPLES, 9, 4, "examples")
    with pytest.raises(InvalidArgumentError, match="none of 0 chains has at most 9 tokens: build with more prompts"):
        EncodedChains(tokenizer, [], 9, 4, "examples")


# --- one step


def test_cross_entropy_alone_is_the_ablation(learning):
    one, data = learning(contrastive_weight=0.0, lora_dropout=0.0)
    batch = collate(data.items)
    found = one.train()(**batch)
    nll, tokens = text_nll(one.model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])
    assert torch.allclose(found["loss"], nll.sum() / tokens.sum())
    assert not any(one.take_counts().values())


def test_the_contrastive_term_is_counted_and_compared_without_context(learning):
    one, data = learning(lora_dropout=0.0, contrastive_weight=2.0, temperature=0.5)
    batch = collate(data.items)
    one.train()
    loss = one(**batch)["loss"]
    counts = one.take_counts()
    # the first has nothing to shun, the third and fourth have two texts, the last is not of a toxic prompt
    assert counts == {"examples": 5, "active": 4, "toxic": 4, "active_toxic": 3}
    assert not any(one.take_counts().values())
    plain = one.eval()(**batch)["loss"]
    rows = [row for row, item in enumerate(data.items) if len(item["candidate_ids"]) > 1]
    written = one.write([data.items[row]["template_ids"] for row in rows], [data.items[row]["key"] for row in rows])
    expected = []
    for ids, row in zip(written, rows, strict=True):
        # one text at a time, so without padding
        h, *states = (
            one.states([text])[0].detach().double().numpy() for text in (ids, *data.items[row]["candidate_ids"])
        )
        expected += reference_loss([h], [states], [[True] * len(states)], 0.5)
    assert float((loss - plain).detach()) == pytest.approx(2.0 * np.mean(expected), rel=1e-4)


def test_dropout_is_as_it_was_after_writing(learning):
    """Published: the model was put in evaluation mode to write, and stayed in it."""
    one, data = learning(lora_dropout=0.5)
    item = data.items[1]
    for training in (True, False):
        one.train(training)
        one.write([item["template_ids"]], [item["key"]])
        assert {module.training for module in one.modules()} == {training}
    one.train()
    for name, parameter in one.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    first, second = (one.model(torch.tensor([item["input_ids"]])).logits for _ in range(2))
    assert not torch.equal(first, second)


def test_what_is_written_depends_on_step_and_chain_alone(learning):
    one, data = learning()
    one.train()
    templates, keys = ([item[name] for item in data.items] for name in ("template_ids", "key"))
    whole = one.write(templates, keys)
    assert one.write(templates[::-1], keys[::-1])[::-1] == whole
    assert [one.write([template], [key])[0] for template, key in zip(templates, keys, strict=True)] == whole
    one.step = 1
    assert one.write(templates, keys) != whole


# --- training


class Stop(TrainerCallback):
    """Stops a training as a kill does, after a step."""

    def on_step_end(self, args, state, control, **_):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    chosen = ChainSettings(str(base), max_length=120, sample_tokens=4, lora_r=2, lora_dropout=0.3)
    logs = []

    class Keep(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **_):
            kept.append(logs)

    kept = logs
    return folder, train_chains(chosen, arguments(folder), EXAMPLES, EXAMPLES[:3], [Keep()]), logs


def test_the_share_of_active_terms_is_logged(trained):
    """Published: nothing told that the contrastive loss was off."""
    folder, config, logs = trained
    entries = [entry for entry in logs if "loss" in entry]
    assert len(entries) == 2
    assert sum(entry["contrastive_examples"] for entry in entries) == 7  # of four steps: 2 + 2 + 1 + 2
    for entry in entries:
        assert 0 < entry["contrastive_active"] <= 1
        assert 0 <= entry["contrastive_active_toxic"] <= 1
    active = sum(entry["contrastive_active"] * entry["contrastive_examples"] for entry in entries)
    assert config.training["contrastive_active"] == pytest.approx(active / 7)
    assert config.training["nll"] < config.training["base_nll"]
    assert DetoxifierConfig.from_pretrained(folder) == config


def test_resumed_is_uninterrupted(trained, settings, tmp_path):
    folder, config, _ = trained
    with pytest.raises(KeyboardInterrupt):
        train_chains(settings(), arguments(tmp_path), EXAMPLES, EXAMPLES[:3], [Stop()])
    with pytest.raises(InvalidArgumentError, match=r"contrastive_weight 0\.5, not 0\.25"):
        train_chains(settings(contrastive_weight=0.25), arguments(tmp_path), EXAMPLES, EXAMPLES[:3])
    again = train_chains(settings(), arguments(tmp_path), EXAMPLES, EXAMPLES[:3])
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
    assert again.training["nll"] == config.training["nll"]
    with pytest.raises(InvalidArgumentError, match="holds a finished training"):
        train_chains(settings(), arguments(tmp_path), EXAMPLES, EXAMPLES[:3])


def test_a_resumed_training_has_counted_all_its_examples(trained, settings, tmp_path):
    """Also those between the last entry of the log and the checkpoint."""
    _, config, _ = trained
    with pytest.raises(KeyboardInterrupt):
        train_chains(settings(), arguments(tmp_path, logging_steps=4), EXAMPLES, EXAMPLES[:3], [Stop()])
    again = train_chains(settings(), arguments(tmp_path, logging_steps=4), EXAMPLES, EXAMPLES[:3])
    assert again.training == config.training


def test_gradient_checkpointing_changes_nothing(learning):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(1)
        model, data = learning(lora_dropout=0.0)
        if checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.train()(**collate(data.items[:2]))["loss"].backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


def test_what_is_saved_is_what_was_trained(trained, base):
    folder, config, _ = trained
    _, tokenizer = load_language_model(str(base))
    data = EncodedChains(tokenizer, EXAMPLES[:3], 120, 4, "examples")
    batch = collate(data.items)
    with torch.no_grad():
        logits = load_detoxifier(folder, tokenizer)(batch["input_ids"], batch["attention_mask"]).logits
    nll, tokens = text_nll(logits, batch["labels"])
    assert float(nll.sum() / tokens.sum()) == pytest.approx(config.training["nll"], rel=1e-4)


# --- what is refused


def test_other_weights_under_the_adapter_are_refused(trained, base, make_model, tmp_path):
    tokenizer = load_language_model(str(base))[1]
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(trained[0], tmp_path / "d")
    path = tmp_path / "d" / "cmd_config.json"
    config = json.loads(path.read_text()) | {"base_model": str(tmp_path / "base")}
    path.write_text(json.dumps(config))
    load_detoxifier(tmp_path / "d", tokenizer)
    make_model("llama", seed=9, vocab_size=8192, pad_token_id=0).save_pretrained(tmp_path / "base")
    with pytest.raises(CheckpointError, match=r"was trained on other weights .* put the former back"):
        load_detoxifier(tmp_path / "d", tokenizer)
    path.write_text(json.dumps(config | {"base_fingerprint": None}))  # as older folders are
    load_detoxifier(tmp_path / "d", tokenizer)


def test_nothing_to_shun_is_refused_but_for_the_ablation(settings, tmp_path):
    plain = [ChainExample(**vars(example) | {"negatives": []}) for example in EXAMPLES]
    with pytest.raises(InvalidArgumentError, match="train_file: none of 5 examples has a toxic continuation to shun"):
        train_chains(settings(), arguments(tmp_path), plain, plain)
    config = train_chains(settings(contrastive_weight=0.0), arguments(tmp_path, max_steps=1), plain, plain)
    assert "contrastive_active" not in config.training


def test_an_encoder_decoder_is_refused(base, tmp_path):
    sizes = {"d_model": 8, "d_ff": 8, "d_kv": 4, "num_layers": 1, "num_heads": 2, "vocab_size": 8192}
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(InvalidArgumentError, match="is an encoder-decoder: give a causal model"):
        train_chains(ChainSettings(str(tmp_path / "t5")), arguments(tmp_path / "out"), EXAMPLES, EXAMPLES)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"contrastive_weight": -1.0}, "contrastive_weight is -1.0"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"sample_tokens": 0}, "sample_tokens is 0"),
        ({"sample_top_p": 0.0}, "top_p is 0: give a number above 0"),
    ],
)
def test_bad_settings_are_refused(settings, changes, said):
    with pytest.raises(InvalidArgumentError, match=said):
        settings(**changes)


def test_the_context_bounds_a_chain(settings, tmp_path):
    with pytest.raises(InvalidArgumentError, match="max_length is 500: give a number from 2 to 160"):
        train_chains(settings(max_length=500), arguments(tmp_path), EXAMPLES, EXAMPLES)


def test_the_command(base, tmp_path, capsys):
    for name, some in (("train", EXAMPLES), ("validation", EXAMPLES[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(to_json(one)) + "\n" for one in some))
    flags = ["--model_name_or_path", base, "--data_dir", tmp_path, "--output_dir", tmp_path / "out", "--use_cpu"]
    flags += ["--max_length", 120, "--lora_r", 2, "--max_steps", 1, "--eval_strategy", "no", "--save_strategy", "no"]
    code, _, err = run_command(main, capsys, "train", "cmd", *flags)
    assert code == 0, err
    assert "chains: 5 for training, 4 of them of toxic prompts, 2 for validation" in err
    assert "contrastive term: active in" in err
    assert "use it as cmd:" in err
