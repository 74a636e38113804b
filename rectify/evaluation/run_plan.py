"""Which prompts are continued together: decided once, so that results do not depend on processes and restarts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from transformers import PreTrainedModel

from rectify.errors import InvalidArgumentError
from rectify.generation.prompts import Prompt
from rectify.json_files import read_json, write_json
from rectify.trunk_states import input_device

PLAN_FILE = "plan.json"
_ROWS = {"cpu": 400}
_ROWS_ELSEWHERE = 2048
_SHARE = 0.25  # of the memory that is free


def ordered(prompts: Sequence[Prompt], lengths: Sequence[int]) -> list[Prompt]:
    """The prompts by their length in tokens, so that batches have little padding, and then by a hash."""

    def place(number: int) -> tuple[int, str]:
        return lengths[number], hashlib.sha256(prompts[number].key.encode("utf-8", "surrogatepass")).hexdigest()

    return [prompts[number] for number in sorted(range(len(prompts)), key=place)]


def automatic_batch_size(model: PreTrainedModel, n: int, length: int) -> int:
    """Prompts at a time, by the memory that is free where the model is.

    Args:
        model: where it is to run.
        n: continuations of each prompt.
        length: tokens of the longest text.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys = 2 * config.num_hidden_layers * heads * size * length * model.dtype.itemsize
    scores = 8 * config.vocab_size * 8  # several copies, some in float64
    device = input_device(model)
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    rows = min(_ROWS.get(device.type, _ROWS_ELSEWHERE), int(free * _SHARE / (2 * keys + scores)))
    return max(1, rows // n)


def planned_batch_size(folder: str | Path, asked: int, choose: Callable[[], int]) -> int:
    """The batch size of a run: that of its first start, else what was asked for, else what `choose()` finds.

    Raises:
        InvalidArgumentError: another one is asked for than the run was begun with.
    """
    path = Path(folder) / PLAN_FILE
    if not path.exists():
        write_json(path, {"batch_size": asked or choose()})
    kept = int(read_json(path)["batch_size"])
    if asked not in (0, kept):
        raise InvalidArgumentError(
            f"batch_size is {asked}, and {str(folder)!r} was begun with {kept}: give that, or another output_dir"
        )
    return kept
