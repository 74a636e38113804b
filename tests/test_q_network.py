"""The Q network: the range and the start of its values, padding, and what is saved, loaded and refused."""

import copy
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file

from rectify import CheckpointError, DeadEndQNetwork, InvalidArgumentError, QConfig, token_risks
from rectify.vocabulary import Fingerprint

VOCABULARY = 97
KINDS = ["gpt2", "llama", "recurrent"]
TEXTS = [[5, 6, 7, 8, 9, 10], [11, 12, 13], [2, 14, 0, 15], [16]]


def padded(texts, side, pad=0):
    longest = max(map(len, texts))
    ids, mask = torch.full((len(texts), longest), pad), torch.zeros(len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        place = slice(0, len(text)) if side == "right" else slice(longest - len(text), longest)
        ids[row, place], mask[row, place] = torch.tensor(text), 1
    return ids, mask


def lora(base, **changes):
    return LoraConfig(r=4, target_modules=["c_attn"], base_model_name_or_path=str(base), **changes)


@pytest.fixture
def adapted(make_model, tmp_path):
    """A trunk in a folder, and a Q network that adapts it."""
    model, base = make_model(), tmp_path / "base"
    model.save_pretrained(base)
    q_network = DeadEndQNetwork.from_trunk(model, adapter=lora(base), rank=16)
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in [*q_network.head.parameters(), *(p for p in q_network.trunk.parameters() if p.requires_grad)]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return q_network.eval()


# --- values


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", [0.1, 3.0])
def test_values_lie_between_minus_one_and_zero(make_q_network, kind, noise):
    ids = torch.randint(3, VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(0))
    q = make_q_network(kind, noise=noise, mlp_size=0)(ids)
    assert q.shape == (3, 11, VOCABULARY)
    assert q.dtype == torch.float32
    assert (q >= -1).all()
    assert (q <= 0).all()
    # from token to token and from prefix to prefix
    assert q.std(dim=-1).min() > 0.1
    assert q.std(dim=1).mean() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mlp_size", [0, 24])
@pytest.mark.parametrize("base_rate", [0.1, 0.03, 0.5])
def test_every_value_starts_at_the_base_rate(make_model, kind, mlp_size, base_rate):
    q_network = DeadEndQNetwork.from_trunk(make_model(kind), rank=16, mlp_size=mlp_size, base_rate=base_rate).eval()
    ids = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    q = q_network(ids)
    assert q.unique().numel() == 1
    assert q[0, 0, 0].item() == pytest.approx(-base_rate, abs=1e-7)
    # and every token can still move by itself
    loss = q_network.action_values(ids)[:, 1:].sum()
    loss.backward()
    assert q_network.head.project.weight.grad.abs().sum() > 0
    assert q_network.head.tokens.weight.std() > 0.5


def test_values_can_start_at_a_table_of_risks(make_model):
    q_network = DeadEndQNetwork.from_trunk(make_model(KINDS[0]), rank=16, mlp_size=24, base_rate=0.3).eval()
    risks = torch.rand(VOCABULARY, generator=torch.Generator().manual_seed(0)).clamp(1e-3, 1 - 1e-3)
    q_network.head.start_from_token_risks(risks)
    q = q_network(torch.randint(0, VOCABULARY, (2, 5)))
    torch.testing.assert_close(q, -risks.expand_as(q), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mlp_size", [0, 24])
def test_values_of_chosen_tokens_are_those_of_all_tokens(make_model, mlp_size):
    q_network = DeadEndQNetwork.from_trunk(make_model(), rank=16, mlp_size=mlp_size).eval()
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in q_network.head.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(0, VOCABULARY, (2, 9))
    hidden = q_network.encode(ids)
    chosen = torch.randint(0, VOCABULARY, (2, 9))
    expected = q_network(ids).gather(-1, chosen[..., None]).squeeze(-1)
    assert torch.allclose(q_network.head(hidden, chosen), expected, atol=1e-6)


@pytest.mark.parametrize("rank", [8, 32, 50])
def test_the_rank_may_be_below_and_above_the_width(make_model, rank):
    q_network = DeadEndQNetwork.from_trunk(make_model(), rank=rank).eval()
    assert q_network.head.tokens.weight.shape == (VOCABULARY, rank)
    assert q_network(torch.tensor([[5, 6]])).unique().numel() == 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_changes_no_value(make_q_network, kind, side):
    q_network = make_q_network(kind)
    ids, mask = padded(TEXTS, side)
    q = q_network(ids, mask)
    for row, text in enumerate(TEXTS):
        alone = q_network(torch.tensor([text]))[0]
        assert torch.allclose(q[row][mask[row].bool()], alone, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["left", "right", "none"])
@torch.no_grad()
def test_risks_of_the_tokens_of_a_text(make_q_network, kind, side):
    q_network = make_q_network(kind)
    texts = [TEXTS[0], TEXTS[0][::-1]] if side == "none" else TEXTS
    ids, mask = padded(texts, side)
    given = None if side == "none" else mask
    risks = token_risks(q_network, ids, given)
    assert risks.shape == ids.shape
    assert risks.dtype == torch.float32
    for row, text in enumerate(texts):
        expected = [math.nan]
        for end in range(1, len(text)):
            expected.append(-q_network(torch.tensor([text[:end]]))[0, -1, text[end]].item())
        assert risks[row][mask[row].bool()].tolist() == pytest.approx(expected, abs=1e-5, nan_ok=True)
    first = mask.cumsum(-1).eq(1) & mask.bool()
    assert torch.equal(risks.isnan(), first | ~mask.bool())
    values = q_network.action_values(ids, given)
    assert torch.equal(values.nan_to_num(1), (-risks).nan_to_num(1))


def test_risks_carry_no_gradient_and_values_do(q_network):
    ids = torch.tensor([[5, 6, 7]])
    assert not token_risks(q_network, ids).requires_grad
    assert q_network.action_values(ids).requires_grad


@torch.no_grad()
def test_a_batch_gives_the_values_of_its_rows(q_network):
    ids = torch.randint(3, VOCABULARY, (5, 8), generator=torch.Generator().manual_seed(0))
    together = q_network(ids)
    for row in range(5):
        assert torch.allclose(together[row], q_network(ids[row : row + 1])[0], atol=1e-5)


@torch.no_grad()
def test_a_half_precision_trunk_gives_float32_values(make_model, q_network):
    half = DeadEndQNetwork.from_trunk(make_model().to(torch.bfloat16), rank=16).eval()
    q = half(torch.tensor([[5, 6, 7]]))
    assert q.dtype == torch.float32
    assert torch.allclose(q, torch.tensor(-0.1), atol=1e-3)
    ids = torch.tensor([[5, 6, 7, 8]])
    rough = copy.deepcopy(q_network).to(torch.bfloat16)
    assert torch.allclose(rough(ids), q_network(ids), atol=0.1)


@pytest.mark.parametrize(
    "settings", [{"head": "linear"}, {"rank": 0}, {"mlp_size": -1}, {"base_rate": 0.0}, {"base_rate": 1.0}], ids=str
)
def test_settings_out_of_range_are_refused(settings):
    with pytest.raises(InvalidArgumentError, match=next(iter(settings))):
        QConfig(vocab_size=97, hidden_size=32, **settings)


# --- saving and loading


def files_of(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_whole_trunk_is_saved(make_q_network, make_tokenizer, tmp_path, kind):
    tokenizer = make_tokenizer()
    q_network = make_q_network(kind, tokenizer=tokenizer)
    q_network.config.training["steps"] = 12
    q_network.save_pretrained(tmp_path / "a" / "q")
    saved = files_of(tmp_path / "a" / "q")
    assert {"q_config.json", "head.safetensors", "trunk/config.json", "trunk/model.safetensors"} <= saved
    assert not [name for name in saved if name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    loaded = DeadEndQNetwork.from_pretrained(tmp_path / "a" / "q")
    assert not loaded.training
    assert loaded.config == q_network.config
    assert loaded.config.vocabulary == Fingerprint.of(tokenizer)
    loaded.config.vocabulary.check(make_tokenizer())
    ids = torch.tensor([[5, 6, 7, 8]])
    assert torch.equal(loaded(ids), q_network(ids))
    half = DeadEndQNetwork.from_pretrained(str(tmp_path / "a" / "q"), dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half(ids).dtype == torch.float32
    # and once more, from what was loaded
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(DeadEndQNetwork.from_pretrained(tmp_path / "again")(ids), q_network(ids))


@torch.no_grad()
def test_an_adapted_trunk_is_saved_as_its_adapter(adapted, tmp_path):
    folder, ids = tmp_path / "q", torch.tensor([[5, 6, 7, 8]])
    expected = adapted(ids)
    adapted.save_pretrained(folder)
    saved = files_of(folder)
    assert {"q_config.json", "head.safetensors", "adapter/adapter_config.json"} <= saved
    assert "adapter/adapter_model.safetensors" in saved
    assert not [name for name in saved if name.startswith("trunk") or name.endswith((".bin", ".pt", ".pth", ".pkl"))]
    assert {name.split(".")[-2] for name in load_file(folder / "adapter" / "adapter_model.safetensors")} == {
        "lora_A",
        "lora_B",
    }
    with adapted.trunk.disable_adapter():
        assert not torch.allclose(adapted(ids), expected, atol=1e-3), "the adapter does nothing"
    frozen = DeadEndQNetwork.from_pretrained(folder)
    assert torch.allclose(frozen(ids), expected, atol=1e-5)
    assert not [name for name, p in frozen.trunk.named_parameters() if p.requires_grad]
    trainable = DeadEndQNetwork.from_pretrained(folder, is_trainable=True)
    assert torch.allclose(trainable(ids), expected, atol=1e-5)
    trained = [name for name, p in trainable.trunk.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)
    for number, network in enumerate((frozen, trainable)):
        network.save_pretrained(tmp_path / f"again{number}")
        assert torch.allclose(DeadEndQNetwork.from_pretrained(tmp_path / f"again{number}")(ids), expected, atol=1e-5)


def test_an_adapter_alone_is_trained(adapted):
    assert isinstance(adapted.trunk, PeftModel)
    adapted.train()
    adapted.action_values(torch.tensor([[5, 6, 7]]))[:, 1:].sum().backward()
    moved = {name for name, p in adapted.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert {name for name in moved if name.startswith("trunk")}
    assert all("lora_" in name or name.startswith("head") for name in moved)


def test_an_adapter_needs_a_trunk_that_can_be_found(make_model, adapted, tmp_path):
    with pytest.raises(InvalidArgumentError, match="base_model_name_or_path"):
        DeadEndQNetwork.from_trunk(make_model(), adapter=LoraConfig(r=4, target_modules=["c_attn"]))
    adapted.save_pretrained(tmp_path / "q")
    (tmp_path / "base").rename(tmp_path / "moved")
    with pytest.raises(CheckpointError, match="base") as caught:
        DeadEndQNetwork.from_pretrained(tmp_path / "q")
    assert "\n" not in str(caught.value)


def break_config(folder, change):
    path = folder / "q_config.json"
    path.write_text(change(path.read_text()))


def changed(**values):
    return lambda folder: break_config(folder, lambda text: json.dumps(json.loads(text) | values))


def cut(name):
    def cut_file(folder):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])

    return cut_file


def drop_a_tensor(folder):
    weights = load_file(folder / "head.safetensors")
    weights.pop("tokens.bias")
    save_file(weights, folder / "head.safetensors")


HARM = {
    "no config": lambda folder: (folder / "q_config.json").unlink(),
    "config is cut": lambda folder: break_config(folder, lambda text: text[:40]),
    "config is empty": lambda folder: break_config(folder, lambda text: ""),
    "config is a list": lambda folder: break_config(folder, lambda text: "[1]"),
    "config is no text": lambda folder: (folder / "q_config.json").write_bytes(b"\xff\xfe\x00"),
    "config lacks a field": lambda folder: break_config(folder, lambda text: '{"vocab_size": 97}'),
    "config has another field": changed(depth=3),
    "config of another head": changed(head="linear"),
    "config of another size": changed(vocab_size=98),
    "size is no number": changed(vocab_size="97"),
    "vocabulary is no fingerprint": changed(vocabulary={"size": 97}),
    "no head": lambda folder: (folder / "head.safetensors").unlink(),
    "head is cut": cut("head.safetensors"),
    "head is empty": lambda folder: (folder / "head.safetensors").write_bytes(b""),
    "head lacks a tensor": drop_a_tensor,
    "no trunk": lambda folder: (folder / "trunk").rename(folder / "elsewhere"),
    "no trunk weights": lambda folder: (folder / "trunk" / "model.safetensors").unlink(),
    "no trunk config": lambda folder: (folder / "trunk" / "config.json").unlink(),
    "trunk config is cut": cut("trunk/config.json"),
    "trunk is cut": cut("trunk/model.safetensors"),
}


@pytest.mark.parametrize("harm", HARM)
def test_a_damaged_folder_is_refused(q_network, tmp_path, harm):
    folder = tmp_path / "q"
    q_network.save_pretrained(folder)
    HARM[harm](folder)
    with pytest.raises(CheckpointError) as caught:
        DeadEndQNetwork.from_pretrained(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_what_is_no_folder_of_a_q_network_is_refused(model, tmp_path):
    (tmp_path / "file").write_text("{}")
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "model")
    for name in ("file", "empty", "model", "nothing", "nothing/at/all"):
        with pytest.raises(CheckpointError) as caught:
            DeadEndQNetwork.from_pretrained(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(CheckpointError, match="nobody/nothing"):
        DeadEndQNetwork.from_pretrained("nobody/nothing")


def test_a_pickled_trunk_is_not_read(q_network, tmp_path):
    q_network.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "trunk" / "model.safetensors")
    (tmp_path / "trunk" / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "trunk" / "pytorch_model.bin")
    with pytest.raises(CheckpointError):
        DeadEndQNetwork.from_pretrained(tmp_path)
