"""Import of checkpoints of the published system, against a direct computation on their weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from rectify import CheckpointError, DeadEndQNetwork, RectificationProcessor
from rectify.published import import_published, main
from rectify.vocabulary import Fingerprint

VOCABULARY, WIDTH = 97, 32
FILES = ["model.safetensors", "pytorch_model.bin"]


def published_weights(make_model):
    model = make_model(initializer_range=0.2)
    torch.manual_seed(6)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for head in ("q_heads", "target_q_heads"):
        shapes = {"0": (2 * WIDTH, WIDTH), "3": (VOCABULARY, 2 * WIDTH)}
        for layer, shape in shapes.items():
            state[f"ilql_heads.{head}.0.{layer}.weight"] = 0.1 * torch.randn(shape)
            state[f"ilql_heads.{head}.0.{layer}.bias"] = 0.5 * torch.randn(shape[0]) - (0.3 if layer == "3" else 0)
    return model, state


def write(folder, state, config, file):
    folder.mkdir(exist_ok=True)
    config.save_pretrained(folder)
    if file == "pytorch_model.bin":
        torch.save(state, folder / file)
    else:
        save_file(state, folder / file)
    return folder


@pytest.fixture(params=FILES)
def published(request, make_model, tmp_path):
    """A checkpoint folder, its model and its weights."""
    model, state = published_weights(make_model)
    return write(tmp_path / "published", state, model.config, request.param), model, state


@torch.no_grad()
def direct(model, state, ids, head="q_heads"):
    hidden = model.transformer(ids).last_hidden_state
    name = f"ilql_heads.{head}.0."
    inner = (hidden @ state[name + "0.weight"].T + state[name + "0.bias"]).relu()
    return inner @ state[name + "3.weight"].T + state[name + "3.bias"]


@torch.no_grad()
def test_values_are_those_of_the_online_head(published):
    folder, model, state = published
    q_network = import_published(folder)
    assert not q_network.training
    ids = torch.randint(3, VOCABULARY, (3, 9), generator=torch.Generator().manual_seed(1))
    raw = direct(model, state, ids)
    assert (raw < -1).any()
    assert (raw > 0).any()
    assert torch.allclose(q_network(ids), raw.clamp(-1, 0), atol=1e-5)
    assert not torch.allclose(q_network(ids), direct(model, state, ids, "target_q_heads").clamp(-1, 0), atol=1e-2)
    expected = raw.clamp(-1, 0)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
    assert torch.allclose(q_network.action_values(ids)[:, 1:], expected, atol=1e-5)


@torch.no_grad()
def test_the_target_head_and_the_model_head_count_for_nothing(make_model, tmp_path):
    model, state = published_weights(make_model)
    kept = {name: t for name, t in state.items() if "target" not in name and name != "lm_head.weight"}
    # buffers that older releases saved
    kept["transformer.h.0.attn.bias"] = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    kept["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    q_network = import_published(write(tmp_path / "less", kept, model.config, "model.safetensors"))
    ids = torch.tensor([[5, 6, 7]])
    assert torch.allclose(q_network(ids), direct(model, state, ids).clamp(-1, 0), atol=1e-5)
    names = set(q_network.state_dict())
    assert not [name for name in names if "target" in name or "lm_head" in name]


@torch.no_grad()
def test_what_was_imported_is_saved_and_loaded(published, make_tokenizer, tmp_path):
    q_network, tokenizer = import_published(published[0], make_tokenizer()), make_tokenizer()
    q_network.save_pretrained(tmp_path / "q")
    assert not [path for path in (tmp_path / "q").rglob("*") if path.suffix in (".bin", ".pt")]
    loaded = DeadEndQNetwork.from_pretrained(tmp_path / "q")
    assert loaded.config.head == "published"
    assert loaded.config.vocabulary == Fingerprint.of(tokenizer)
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids), q_network(ids))
    processor = RectificationProcessor(loaded, tokenizer=tokenizer)
    assert torch.allclose(processor.next_token_log_survival(ids).expm1(), q_network(ids)[:, -1], atol=1e-5)


@torch.no_grad()
def test_the_command(published, make_tokenizer, tmp_path, capsys):
    folder, output = published[0], tmp_path / "q"
    make_tokenizer().save_pretrained(tmp_path / "tokenizer")
    assert main([str(folder), str(output), "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    assert str(output) in "".join(capsys.readouterr())
    loaded = DeadEndQNetwork.from_pretrained(output)
    assert loaded.config.vocabulary == Fingerprint.of(make_tokenizer())
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids), import_published(folder)(ids))
    assert main([str(tmp_path / "nothing"), str(output)]) != 0
    assert str(tmp_path / "nothing") in capsys.readouterr().err


def without(name):
    def remove(folder):
        weights = load_file(folder / "model.safetensors")
        del weights[name]
        save_file(weights, folder / "model.safetensors")

    return remove


def other_size(folder):
    GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=160).save_pretrained(folder)


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:100])


def only_a_broken_pickle(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle at all")


HARM = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "config is cut": cut("config.json"),
    "config of another size": other_size,
    "no online head": without("ilql_heads.q_heads.0.3.weight"),
    "no token embeddings": without("transformer.wte.weight"),
    "weights are cut": cut("model.safetensors"),
    "pickle is broken": only_a_broken_pickle,
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_checkpoint_is_refused(make_model, tmp_path, harm):
    model, state = published_weights(make_model)
    folder = write(tmp_path / "published", state, model.config, "model.safetensors")
    import_published(folder)
    HARM[harm](folder)
    with pytest.raises(CheckpointError) as caught:
        import_published(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_folders_are_refused(make_model, tmp_path):
    make_model().save_pretrained(tmp_path / "gpt2")
    (tmp_path / "empty").mkdir()
    for name in ("gpt2", "empty", "nothing"):
        with pytest.raises(CheckpointError) as caught:
            import_published(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


def test_pickled_code_is_not_run(make_model, tmp_path):
    marker = tmp_path / "ran"

    class Code:
        def __reduce__(self):
            return (marker.write_text, ("ran",))

    folder = write(tmp_path / "published", {"weights": Code()}, make_model().config, "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        import_published(folder)
    assert not marker.exists()


def test_the_checkpoint_is_that_of_a_language_model_with_heads(published):
    # the fixture has the names of the published format: a language model's own weights load from it as they are
    folder, model, state = published
    names = set(GPT2LMHeadModel(model.config).state_dict())
    assert names <= set(state)
    assert {name.split(".")[0] for name in set(state) - names} == {"ilql_heads"}
    assert folder.exists()
