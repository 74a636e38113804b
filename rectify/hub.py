"""Where models come from, a local folder, the name of a bundled model, or a Hub id, and what they run on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rectify.errors import CheckpointError, InvalidArgumentError, first_line
from rectify.pretrained import embedding_rows, read_model, read_model_config, read_tokenizer, refusing_unusable

POCKET = {
    "pocket": "lm",
    "pocket-q": "q",
    "pocket-q-shared": "q_shared",
    "pocket-reward": "reward",
    "pocket-scorer": "scorer",
}
_WEIGHTS = {".safetensors", ".bin"}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def checkpoint_folder(name: str | Path, revision: str | None = None, files: list[str] | None = None) -> Path:
    """The local folder of a checkpoint, downloaded first where the name is a Hub id.

    Args:
        name: a folder, a name in `POCKET` (the models inside the package), or a Hub id.
        revision: branch, tag or commit of a Hub id.
        files: patterns of the files to download; all by default.

    Raises:
        CheckpointError: there is no such folder, and the Hub does not give one.
    """
    if str(name) in POCKET:
        return Path(str(resources.files("rectify.pocket") / POCKET[str(name)]))
    if not str(name).strip():
        raise CheckpointError(f"the name of a checkpoint is {str(name)!r}: give a folder, a bundled name or a Hub id")
    try:
        folder = Path(name).expanduser()
        if folder.is_dir():
            return folder
        if folder.exists():
            raise CheckpointError(f"{str(name)!r} is a file: give the folder that holds the checkpoint")
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    except CheckpointError:
        raise
    except Exception as error:  # of the file system, the Hub's library, or the network below it
        raise CheckpointError(
            f"{str(name)!r} is neither a folder here nor a model that the Hub gives ({first_line(error)}): "
            "check the path, or the id and the connection"
        ) from error


def model_place(name: str, revision: str | None = None) -> str | Path:
    """What transformers loads a model from: its folder, or its Hub id, of which it fetches only what it needs.

    Raises:
        CheckpointError: there is no such folder, and the Hub does not give one.
    """
    # a name that leads nowhere is refused here at once; transformers would try for most of a minute
    folder = checkpoint_folder(name, revision, files=["config.json"])
    return folder if name in POCKET or Path(name).expanduser().is_dir() else name


def files_digest(*folders: Path, suffixes: Collection[str]) -> str:
    """What tells local models apart wherever they are: a SHA-256 of their files, the first 12 hexadecimal digits.

    Of the files and not of the weights in memory, which hold the rounding of this machine, and random starts of heads
    that an adapter replaces.

    Args:
        *folders: whose files count.
        suffixes: of the names that count, as `".safetensors"`.

    Raises:
        CheckpointError: one is no file.
    """
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(path for path in folder.iterdir() if path.suffix in suffixes):
            if not path.is_file():  # to read from a pipe might never end
                raise CheckpointError(f"{str(path)!r} is no file: give a folder of files")
            with path.open("rb") as file:
                digest.update(f"{path.name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:12]


def weights_fingerprint(place: str | Path, config: PreTrainedConfig) -> str | None:
    """What the weights of a model are known again by: `files_digest` of those in a folder, or their commit on the Hub.

    Args:
        place: see `model_place`.
        config: of the model as it was loaded.
    """
    return files_digest(place, suffixes=_WEIGHTS) if isinstance(place, Path) else config._commit_hash


def current_fingerprint(name: str, revision: str | None = None) -> str | None:
    """`weights_fingerprint` of a model that is not loaded.

    Raises:
        CheckpointError: nothing usable is there.
    """
    place = model_place(name, revision)
    with refusing_unusable(f"model {name!r}", "give a model of text with its tokenizer"):
        return weights_fingerprint(place, read_model_config(place, revision))


def check_weights(name: str, trained_on: str | None, fingerprint: str | None) -> None:
    """Refuse what was trained on other weights of a model than those that are there now.

    Args:
        name: of the model.
        trained_on: fingerprint of the weights of the training; `None` to take any.
        fingerprint: of those that are there.

    Raises:
        CheckpointError: they differ.
    """
    if trained_on not in (None, fingerprint):
        raise CheckpointError(
            f"it was trained on weights {trained_on} of {name!r}, and those there now are {fingerprint}: put the "
            "former back, or train anew; in the configuration, null in place of the former takes any"
        )


def load_language_model(
    name: str,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    revision: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, padding on the left, in evaluation mode.

    Args:
        name: a folder, `"pocket"` or a Hub id.
        dtype: of the weights; `None` for float32 on a CPU and the checkpoint's own elsewhere.
        device: where to put the model.
        revision: branch, tag or commit of a Hub id.

    Raises:
        CheckpointError: nothing usable is there.
    """
    place = model_place(name, revision)
    if dtype is None and torch.device(device).type == "cpu":
        dtype = torch.float32
    with refusing_unusable(f"model {name!r}", "give a causal language model with its tokenizer"):
        tokenizer = read_tokenizer(place, revision)
        model, _ = read_model(AutoModelForCausalLM, place, revision, dtype="auto" if dtype is None else dtype)
    tokenizer.padding_side = "left"
    # some came to their padding token after the training, and the model has no embedding of it
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= embedding_rows(model):
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer  # type: ignore[arg-type]


def available_device(name: str | None = None) -> torch.device:
    """The device of this name; without one an accelerator, or the CPU where there is none.

    Raises:
        InvalidArgumentError: there is no such device here.
    """
    try:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        device = torch.device(name) if name else accelerator or torch.device("cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InvalidArgumentError(f"device is {name!r} ({first_line(error)}): give another, such as cpu") from error
    return device
