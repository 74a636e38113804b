"""Where checkpoints come from: a local folder, the name of a bundled model, or a Hub id."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from rectify.errors import CheckpointError

POCKET = {"pocket": "lm", "pocket-q": "q"}


def checkpoint_folder(name: str | Path, revision: str | None = None, files: list[str] | None = None) -> Path:
    """The local folder of a checkpoint, downloaded first where the name is a Hub id.

    Args:
        name: a folder, `"pocket"` or `"pocket-q"` (the models inside the package), or a Hub id.
        revision: branch, tag or commit of a Hub id.
        files: patterns of the files to download; all by default.

    Raises:
        CheckpointError: there is no such folder, and the Hub does not give one.
    """
    if str(name) in POCKET:
        return Path(str(resources.files("rectify.pocket") / POCKET[str(name)]))
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise CheckpointError(f"{str(name)!r} is a file: give the folder that holds the checkpoint")
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{str(name)!r} is neither a folder here nor a model that the Hub gives ({reason}): "
            "check the path, or the id and the connection"
        ) from error
