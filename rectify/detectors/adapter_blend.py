"""Several LoRA classifiers over one backbone in memory, blended for each text by gates of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn import functional as F

from rectify.detectors.classifier import (
    DetectorConfig,
    ToxicityClassifier,
    add_adapter,
    load_backbone,
    read_adapter,
    refusing,
)
from rectify.errors import InvalidArgumentError
from rectify.hub import checkpoint_folder, model_place

_OWN = ("calibration", "training")
"""The fields of a `DetectorConfig` in which the adapters of a blend may differ."""


class AdapterBlend(nn.Module):
    """Classifiers that share a frozen backbone, each with a LoRA adapter and a head of its own.

    Make one with `from_pretrained`. Source: `y = W x + Σ_k g_k LoRA_k(x)`, the diagram of ExplainingHate-OptimalQLoRA;
    its code mixes the factors A and B instead (peft's `add_weighted_adapter`, `"linear"`), which adds the cross terms
    `B_i A_j` to the sum.

    Attributes:
        names: of the adapters, in the order of the gates.
        folders: where the adapters are.
        config: what they have in common; without calibration.

    Example:
        >>> blend = AdapterBlend.from_pretrained({"forum": "detectors/forum", "wiki": "detectors/wiki"})
        >>> ids, mask = pad(blend.encode(["Have a nice day", "You are an idiot"]))
        >>> blend(ids, mask, torch.tensor([[0.9, 0.1], [0.2, 0.8]]))  # [2, 1] logits
    """

    def __init__(self, classifier: ToxicityClassifier, folders: Mapping[str, Path]) -> None:
        super().__init__()
        self.config, self.names, self.folders = classifier.config, list(folders), dict(folders)
        self._gates = _Gates()
        _blend_modules(classifier.model, self._gates)
        self._classifier = classifier

    @classmethod
    def from_pretrained(
        cls,
        adapters: Mapping[str, str | Path],
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> AdapterBlend:
        """Load adapters, frozen and in evaluation mode, over one backbone.

        Args:
            adapters: names, and where each is: a folder of `ToxicityClassifier.save_pretrained`, a bundled name, or a
                Hub id. Ranks, scales and adapted modules may differ.
            device: where to put the model.
            dtype: of the weights; logits are float32 whatever it is.

        Raises:
            CheckpointError: nothing usable is there.
            InvalidArgumentError: there is none, or one was trained on another base, for other labels or another
                length, or is more than plain LoRA of linear modules.
        """
        if not adapters:
            raise InvalidArgumentError("adapters is empty: give a name and a folder for each")
        folders, read = {}, {}
        for name, place in adapters.items():
            with refusing(place):
                folders[name] = checkpoint_folder(place)
                read[name] = read_adapter(folders[name])
        config = _common_config({name: config for name, (config, _, _) in read.items()})
        model: Any
        model, tokenizer, _ = load_backbone(config, dtype)
        for number, (name, (_, adapter, weights)) in enumerate(read.items()):
            if adapter.use_dora or adapter.lora_bias or adapter.bias != "none":
                raise InvalidArgumentError(
                    f"adapter {name!r} has DoRA or trained biases: give one of plain LoRA, as `rectify train` makes"
                )
            with refusing(folders[name]):
                # not by its name, which peft would look for in the names of weights
                model = add_adapter(model, adapter, weights, f"adapter{number}")
        blend = cls(ToxicityClassifier(config, model, tokenizer), folders)
        return blend.requires_grad_(False).to(device=device, dtype=dtype).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._classifier.device

    @property
    def base(self) -> Any:
        """The configuration of the backbone, as transformers has it."""
        return self._classifier.model.get_base_model().config

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """The token ids of each text; see `ToxicityClassifier.encode`."""
        return self._classifier.encode(texts)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, gates: Tensor) -> Tensor:
        """Logits by blended weights: all adapters in one pass over the backbone.

        Each row's are those of a classifier with `W + Σ_k g_k s_k B_k A_k` in place of each adapted `W`, where `s_k` is
        `α_k / r_k`, or `α_k / √r_k` of rsLoRA, and with `Σ_k g_k W_k` and `Σ_k g_k b_k` for each linear layer of the
        head.

        Args:
            input_ids: `[B, T]` int64.
            attention_mask: `[B, T]`, 0 at padding, on whichever side; every row holds a 1.
            gates: `[B, K]`, on the model's device.

        Returns:
            `[B, L]` float32, one for each of `config.labels`.

        Raises:
            InvalidArgumentError: the gates have another shape, or the backbone keeps the rows of a batch apart by
                something else than the first dimension.
        """
        self._check(input_ids, gates)
        with self._gates.set(gates):
            return self._classifier(input_ids, attention_mask)

    def blended_logits(self, input_ids: Tensor, attention_mask: Tensor, gates: Tensor) -> Tensor:
        """`Σ_k g_k z_k` of the adapters' own logits, each computed of the rows whose gate is not 0.

        Args:
            input_ids, attention_mask, gates: as for `forward`.

        Returns:
            `[B, L]` float32.

        Raises:
            InvalidArgumentError: the gates have another shape.
        """
        self._check(input_ids, gates)
        result = torch.zeros(len(input_ids), len(self.config.labels), device=input_ids.device)
        for place, weights in enumerate(gates.float().unbind(-1)):
            rows = weights.nonzero().squeeze(-1)
            if len(rows):
                logits = self.adapter_logits(input_ids[rows], attention_mask[rows], place)
                result[rows] += weights[rows, None] * logits
        return result

    def adapter_logits(self, input_ids: Tensor, attention_mask: Tensor, place: int) -> Tensor:
        """The logits of one adapter's own classifier, `[B, L]` float32.

        Args:
            input_ids, attention_mask: as for `forward`.
            place: of the adapter in `names`.
        """
        only = torch.tensor(place, device=input_ids.device).expand(len(input_ids))
        return self(input_ids, attention_mask, F.one_hot(only, len(self.names)))

    def _check(self, input_ids: Tensor, gates: Tensor) -> None:
        wanted = (len(input_ids), len(self.names))
        if gates.shape != wanted:
            raise InvalidArgumentError(
                f"gates has shape {tuple(gates.shape)}: give {wanted}, a row for each text and a column for each of "
                f"{', '.join(self.names)}"
            )


def _common_config(configs: Mapping[str, DetectorConfig]) -> DetectorConfig:
    """What all classifiers of a blend have in common.

    Raises:
        InvalidArgumentError: they differ.
    """
    (first, common), *others = configs.items()
    for name, config in others:
        for field in (field.name for field in fields(common) if field.name not in _OWN):
            wanted, found = getattr(common, field), getattr(config, field)
            if field == "base_model":  # one folder has many names
                same = Path(model_place(wanted)).resolve() == Path(model_place(found)).resolve()
            else:
                same = wanted == found
            if not same:
                raise InvalidArgumentError(
                    f"adapter {name!r} has {field} {found!r}, adapter {first!r} has {wanted!r}: give adapters that "
                    "were trained on one base, for the same labels and length"
                )
    return replace(common, calibration={}, training={})


# ---------------------------------------------------------------------------------------------------------------------
# Modules


class _Gates:
    """The gates of the batch that is being computed, for the modules of one blend."""

    def __init__(self) -> None:
        self._values: Tensor | None = None

    @contextmanager
    def set(self, values: Tensor) -> Iterator[None]:
        """Have the modules use `[B, K]` gates."""
        self._values = values
        try:
            yield
        finally:
            self._values = None

    def of(self, x: Tensor) -> Tensor:
        """Those of the rows of `[B, ..., in]`, in its dtype, `[B, ..., K]` with 1 for each dimension between."""
        values = self._values
        if values is None or len(values) != len(x):
            raise InvalidArgumentError(
                f"a module of the backbone gets {len(x)} rows for {0 if values is None else len(values)} texts: "
                "weights of this backbone cannot be blended, train one classifier on it"
            )
        return values.to(x.dtype).view(len(x), *[1] * (x.ndim - 2), -1)


class _BlendedLinear(nn.Module):
    """A linear module and the adapters of those that adapt it, in two matrix products whatever their number.

    Args:
        base: from `[B, ..., in]` to `[B, ..., out]`; also GPT-2's `Conv1D`, or a quantised one.
        adapters: place, A `[r, in]` and scaled B `[out, r]` of each.
        gates: of the blend.
    """

    def __init__(self, base: nn.Module, adapters: Sequence[tuple[int, Tensor, Tensor]], gates: _Gates) -> None:
        super().__init__()
        self.base = base
        self.down: Tensor
        self.up: Tensor
        self.owner: Tensor
        self.register_buffer("down", torch.cat([down for _, down, _ in adapters]))
        self.register_buffer("up", torch.cat([up for _, _, up in adapters], dim=1))
        # of each row of `down`: ranks may differ, and an adapter may leave the module as it is
        self.register_buffer("owner", torch.tensor([place for place, down, _ in adapters for _ in down]))
        self._gates = gates

    def forward(self, x: Tensor) -> Tensor:
        result = self.base(x)
        low = F.linear(x.to(self.down.dtype), self.down)
        low = low * self._gates.of(low)[..., self.owner]
        if result.dtype != low.dtype:
            return result + F.linear(low, self.up).to(result.dtype)
        # added while it is computed: a pass over the outputs less
        return result.flatten(0, -2).addmm_(low.flatten(0, -2), self.up.T).view(result.shape)


class _BlendedHead(nn.Module):
    """A linear layer that each adapter has for itself: `[B, ..., in]` to `[B, ..., out]`."""

    def __init__(self, layers: Sequence[nn.Linear], gates: _Gates) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", torch.cat([layer.weight.detach() for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self._gates = gates

    def forward(self, x: Tensor) -> Tensor:
        gates = self._gates.of(x)
        each = F.linear(x, self.weight, self.bias).unflatten(-1, (gates.shape[-1], -1))
        return (gates[..., None] * each).sum(-2)


def _blend_modules(model: PeftModel, gates: _Gates) -> None:
    """Put blended modules in the place of peft's."""
    inner, names = model.get_base_model(), list(model.peft_config)
    for path, module in list(inner.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            if set(names) - set(module.modules_to_save):
                raise InvalidArgumentError(f"some adapters have a {path} of their own, others not: give all or none")
            _put(inner, path, _blended_head(path, [module.modules_to_save[name] for name in names], gates))
        elif isinstance(module, LoraLayer):
            _put(inner, path, _BlendedLinear(module.get_base_layer(), _factors(path, module, names), gates))


def _factors(path: str, module: LoraLayer, names: Sequence[str]) -> list[tuple[int, Tensor, Tensor]]:
    """Place, A and scaled B of each adapter of a module."""
    found = []
    for place, name in enumerate(names):
        if name not in module.scaling:  # it leaves the module as it is
            continue
        # an adapter of an embedding has no such part, that of a convolution another
        down, up = (dict(part).get(name) for part in (module.lora_A, module.lora_B))
        if not isinstance(down, nn.Linear) or not isinstance(up, nn.Linear):
            raise InvalidArgumentError(f"adapters change {path}, which is not linear: give some that do not")
        found.append((place, down.weight.detach(), up.weight.detach() * module.scaling[name]))
    return found


def _blended_head(path: str, parts: Sequence[nn.Module], gates: _Gates) -> nn.Module:
    """One module for those that the adapters have for themselves, each linear layer in it blended."""
    if all(isinstance(part, nn.Linear) for part in parts):
        return _BlendedHead(cast(Sequence[nn.Linear], parts), gates)
    if any(True for _ in parts[0].parameters(recurse=False)):
        raise InvalidArgumentError(f"adapters have a {path} of their own, which is not linear: give some that do not")
    for name, _ in list(parts[0].named_children()):
        children = [part.get_submodule(name) for part in parts]
        setattr(parts[0], name, _blended_head(f"{path}.{name}", children, gates))
    return parts[0]


def _put(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
