"""What tells weights apart wherever they come from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn


def weights_digest(module: nn.Module) -> str:
    """What tells weights apart wherever they come from: the start of the SHA-256 of all of them."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if ".original_module." in name:  # peft keeps the random head that a trained one stands in for
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


_LEAST = 1000  # elements: small tensors of ones or zeros are alike everywhere


@dataclass(frozen=True)
class Provenance:
    """What networks were made of, so that a judge can be told from what it judges.

    Attributes:
        parameters: how many weights they have together.
        tensors: a digest of the values of each large weight tensor.
        files: names, or digests, of the texts that they were trained on, as far as their configurations say.
    """

    parameters: int
    tensors: frozenset[str]
    files: frozenset[str]

    @classmethod
    def of(cls, modules: Iterable[nn.Module]) -> Provenance:
        """Of some networks together."""
        parameters, tensors, files = 0, set(), set()
        for module in modules:
            for weight in module.parameters():
                parameters += weight.numel()
                if weight.numel() >= _LEAST:
                    values = weight.detach().cpu().to(torch.bfloat16).contiguous().view(torch.uint8)
                    tensors.add(hashlib.sha256(values.numpy().tobytes()).hexdigest()[:16])
            training = getattr(getattr(module, "config", None), "training", None)
            if isinstance(training, dict):
                files |= {
                    Path(name).name
                    for key, value in training.items()
                    if "file" in key or "sha256" in key
                    for name in _names(value)
                }
        return cls(parameters, frozenset(tensors), frozenset(files))

    def shared_with(self, other: Provenance) -> str | None:
        """What both have, in words; `None` for nothing."""
        tensors, files = self.tensors & other.tensors, self.files & other.files
        found = [f"weights (tensors: {len(tensors)})"] if tensors else []
        found += [f"training texts ({', '.join(_short(name) for name in sorted(files))})"] if files else []
        return " and ".join(found) or None


def networks_of(owner: object) -> list[nn.Module]:
    """The networks among the attributes of an object, such as a scorer."""
    return [value for value in vars(owner).values() if isinstance(value, nn.Module)]


def _short(name: str) -> str:
    """The name of a file, or the start of a SHA-256."""
    return name[:12] if len(name) == 64 else name


def _names(value: object) -> list[str]:
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, str)]
