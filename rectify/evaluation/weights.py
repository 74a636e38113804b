"""What tells weights apart wherever they come from."""

from __future__ import annotations

import hashlib

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
