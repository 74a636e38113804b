"""Several LoRA classifiers over one backbone in memory, blended for each text by gates of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from rectify.adapters import put_adapter
from rectify.detectors.classifier import ToxicityClassifier, check_own, load_base, read_classifier
from rectify.detectors.config import DetectorConfig
from rectify.errors import InvalidArgumentError
from rectify.hub import checkpoint_folder
from rectify.pretrained import refusing
from rectify.quiet_peft import LoraLayer, ModulesToSaveWrapper, PeftModel
from rectify.saved_weights import check_finite
from rectify.weights_digest import comparable, short


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
        _blend_modules(cast(PeftModel, classifier.model), self._gates)
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
                read[name] = read_classifier(folders[name])
        config = _common_config({name: config for name, (config, _, _) in read.items()})
        model: Any
        with refusing(folders[next(iter(adapters))]):
            model, tokenizer, fresh = load_base(config, dtype, [each.base_fingerprint for each, _, _ in read.values()])
        for number, (name, (_, adapter, weights)) in enumerate(read.items()):
            if adapter.use_dora or adapter.lora_bias or adapter.bias != "none":
                raise InvalidArgumentError(
                    f"adapter {name!r} has DoRA or trained biases: give one of plain LoRA, as `rectify train` makes"
                )
            with refusing(folders[name]):
                # not by its name, which peft would look for in the names of weights
                model = put_adapter(model, adapter, weights, f"adapter{number}")
        with refusing(folders[next(iter(adapters))]):
            check_own(model, fresh)
            check_finite(model, "the adapted backbone")
        blend = cls(ToxicityClassifier(config, model, tokenizer), folders)
        kept = dtype if config.quantization == "none" else None  # what is quantised has a dtype of its own
        return blend.requires_grad_(False).to(device=device, dtype=kept).eval()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._classifier.device

    @property
    def backbone(self) -> PreTrainedModel:
        """The model that the adapters share."""
        return self._classifier.inner

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
            InvalidArgumentError: the gates have another shape, or the backbone mixes rows and positions of a batch in
                one dimension.
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
        with self._gates.set(place):
            return self._classifier(input_ids, attention_mask)

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
        # weights that are known are the same wherever they lie; the backbone's place counts where they are not
        known = comparable(common.base_fingerprint, config.base_fingerprint)
        passed_over = {
            "calibration",
            "training",
            *(("base_model", "base_revision") if known else ("base_fingerprint",)),
        }
        for field in (field.name for field in fields(common) if field.name not in passed_over):
            wanted, found = getattr(common, field), getattr(config, field)
            if wanted != found:
                if field == "base_fingerprint":
                    wanted, found = (each and short(each) for each in (wanted, found))
                bases = f" ({config.base_model!r}, {common.base_model!r})" if field == "base_fingerprint" else ""
                raise InvalidArgumentError(
                    f"adapter {name!r} has {field} {found!r}, adapter {first!r} has {wanted!r}{bases}: give adapters "
                    "that were trained on one base, for the same labels and length"
                )
    return replace(common, calibration={}, training={})


# ---------------------------------------------------------------------------------------------------------------------
# Modules


class _Gates:
    """What the modules of a blend go by while it computes: gates of each row, or the one adapter that counts."""

    def __init__(self) -> None:
        self.current: Tensor | int = 0

    @contextmanager
    def set(self, gates: Tensor | int) -> Iterator[None]:
        """Have the modules use `[B, K]` gates, or the adapter of this place alone."""
        before, self.current = self.current, gates
        try:
            yield
        finally:
            self.current = before


def _of_rows(gates: Tensor, x: Tensor) -> Tensor:
    """`[B, K]` gates for `[B, ..., in]`, in its dtype: `[B, ..., K]`, with 1 for the dimensions between."""
    if len(gates) != len(x):
        raise InvalidArgumentError(
            f"a module of the backbone gets {len(x)} rows for {len(gates)} texts: weights of this backbone cannot be "
            "blended, blend logits"
        )
    return gates.to(x.dtype).view(len(x), *[1] * (x.ndim - 2), -1)


class _BlendedLinear(nn.Module):
    """A linear module and the adapters of it, in two matrix products whatever their number.

    Args:
        base: from `[B, ..., in]` to `[B, ..., out]`; also GPT-2's `Conv1D`, or a quantised one.
        adapters: A `[r, in]` and scaled B `[out, r]` of each; `r` differs, and is 0 for one that changes nothing here.
        gates: of the blend.
    """

    def __init__(self, base: nn.Module, adapters: Sequence[tuple[Tensor, Tensor]], gates: _Gates) -> None:
        super().__init__()
        self.base = base
        self.down: Tensor
        self.up: Tensor
        self.owner: Tensor
        ranks = [len(down) for down, _ in adapters]
        self.register_buffer("down", torch.cat([down for down, _ in adapters]))
        self.register_buffer("up", torch.cat([up for _, up in adapters], dim=1))
        self.register_buffer("owner", torch.repeat_interleave(torch.arange(len(ranks)), torch.tensor(ranks)))
        ends = np.cumsum(ranks).tolist()
        self._parts = [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]
        self._gates = gates

    def forward(self, x: Tensor) -> Tensor:
        result, gates = self.base(x), self._gates.current
        x = x.to(self.down.dtype)
        if isinstance(gates, int):
            part = self._parts[gates]
            low, up = F.linear(x, self.down[part]), self.up[:, part]
        else:
            low, up = F.linear(x, self.down), self.up
            low = low * _of_rows(gates, low)[..., self.owner]
        if result.dtype != low.dtype:
            return result + F.linear(low, up).to(result.dtype)
        # added while it is computed: one pass less over the outputs
        return result.flatten(0, -2).addmm_(low.flatten(0, -2), up.T).view(result.shape)


class _BlendedHead(nn.Module):
    """A linear layer that each adapter has for itself: `[B, ..., in]` to `[B, ..., out]`."""

    def __init__(self, layers: Sequence[nn.Linear], gates: _Gates) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor | None
        self.register_buffer("weight", torch.cat([layer.weight.detach() for layer in layers]))
        biases = [layer.bias.detach() for layer in layers if layer.bias is not None]
        self.register_buffer("bias", torch.cat(biases) if biases else None)
        self._adapters, self._gates = len(layers), gates

    def forward(self, x: Tensor) -> Tensor:
        each = F.linear(x, self.weight, self.bias).unflatten(-1, (self._adapters, -1))
        gates = self._gates.current
        if isinstance(gates, int):
            return each[..., gates, :]
        return (_of_rows(gates, x)[..., None] * each).sum(-2)


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


def _factors(path: str, module: LoraLayer, names: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """A and scaled B of each adapter of a module."""
    found = []
    for name in names:
        # an adapter of an embedding has no such part, that of a convolution another
        down, up = (dict(part).get(name) for part in (module.lora_A, module.lora_B))
        if name not in module.scaling:
            inputs, outputs = cast(int, module.in_features), cast(int, module.out_features)
            found.append((torch.empty(0, inputs), torch.empty(outputs, 0)))
        elif isinstance(down, nn.Linear) and isinstance(up, nn.Linear):
            found.append((down.weight.detach(), up.weight.detach() * module.scaling[name]))
        else:
            raise InvalidArgumentError(f"adapters change {path}, which is not linear: give some that do not")
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
