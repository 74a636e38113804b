"""The one door to what transformers loads: no code that comes with a model is run, and no weight is made up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import CHAT_TEMPLATE_DIR

from rectify.adapter_config import ADAPTER_FILE, read_adapter_config
from rectify.errors import CheckpointError, MissingExtraError, RectifyError, first_line
from rectify.quiet import quiet_loading
from rectify.saved_config import read_object
from rectify.saved_weights import check_finite, weight_shapes

GIVEN: dict[str, Any] = {"trust_remote_code": False}
"""What every call gets. Without it transformers would ask on standard input whether to run a model's code."""
_MODEL_FILE = "config.json"
_WEIGHTS = {".safetensors", ".bin"}
_FEWEST_ELEMENTS, _ELEMENTS_A_BYTE = 1 << 26, 16
_FEWEST_LAYERS = 256
_FEWEST_TOKENS = 64


@contextmanager
def refusing_unusable(what: str, remedy: str) -> Iterator[None]:
    """Refuse in one sentence what transformers cannot load, for whatever reason.

    Args:
        what: is loaded, with its name.
        remedy: what to give instead.

    Raises:
        CheckpointError: loading fails.
    """
    try:
        yield
    except CheckpointError as error:
        if str(error).startswith(what):
            raise
        raise CheckpointError(f"{what}: {error}") from error
    except RectifyError:
        raise
    except Exception as error:  # damaged files make of other libraries whatever they like, MemoryError among it
        said = _own_words(error) or first_line(error)
        raise CheckpointError(
            f"{what} is neither a usable folder nor a model that the Hub gives ({said}): {remedy}"
        ) from error


@contextmanager
def refusing(name: str | Path) -> Iterator[None]:
    """Turn whatever fails over a damaged checkpoint into one `CheckpointError` of one line that names it."""
    try:
        yield
    except MissingExtraError:  # nothing is damaged
        raise
    except RectifyError as error:  # with its own remedy
        refusal = CheckpointError(f"{str(name)!r} could not be loaded: {_one_line(error)}")
        refusal.hint = error.hint
        raise refusal from error
    except Exception as error:  # damaged files make of other libraries whatever they like
        raise CheckpointError(f"{str(name)!r} could not be loaded ({_one_line(error)}): is it complete?") from error


def _one_line(error: Exception) -> str:
    hint = error.hint if isinstance(error, RectifyError) else ""
    said = " ".join((_own_words(error) or str(error)).removesuffix(hint).split()) or type(error).__name__
    return said if len(said) <= 600 else f"{said[:597]}..."


def _own_words(error: Exception) -> str | None:
    """What is to be said where the libraries advise to run code nevertheless."""
    if isinstance(error, UnpicklingError):
        return "its weights are a pickle of other things, of which nothing is run"
    if "contains custom code" in str(error):
        return "it needs code of its own, of which nothing is run"
    return None


def read_model_config(place: str | Path, revision: str | None = None, **changes: Any) -> PreTrainedConfig:
    """The configuration of a model; to be called within `refusing_unusable`.

    Args:
        place: see `hub.model_place`.
        revision: of a Hub id.
        changes: of its settings.

    Raises:
        CheckpointError: it names code to run, or a file of its folder is none.
    """
    if isinstance(place, Path):
        _check_files(place)
    config = AutoConfig.from_pretrained(place, revision=revision or "main", **changes, **GIVEN)
    check_config(config, str(place))
    return config


def read_tokenizer(place: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; to be called within `refusing_unusable`.

    Args:
        place: see `hub.model_place`.
        revision: of a Hub id.

    Raises:
        CheckpointError: it knows no words, its longest length is none, or a file of its folder is none.
    """
    if isinstance(place, Path):
        _check_files(place)
    tokenizer: PreTrainedTokenizerBase
    with _panics_as_errors():
        tokenizer = AutoTokenizer.from_pretrained(place, revision=revision or "main", **GIVEN)
        tokenizer("a")  # some that lack a token for what they do not know say so only now
    # without its files transformers makes one of special tokens alone
    if len(tokenizer) < _FEWEST_TOKENS and set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise CheckpointError(f"the tokenizer at {str(place)!r} has no token of text: are its files there?")
    longest = tokenizer.model_max_length
    if isinstance(longest, bool) or not isinstance(longest, int | float) or not longest >= 1:
        raise CheckpointError(
            f"the tokenizer at {str(place)!r} has model_max_length {longest!r}: give a number above 0"
        )
    tokenizer.model_max_length = int(longest)
    return tokenizer


@contextmanager
def _panics_as_errors() -> Iterator[None]:
    """Make an error of the panics by which the tokenizers library, written in Rust, ends over some damaged files."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which is no `Exception`
            raise
        raise ValueError(f"the tokenizers library panicked: {first_line(error)}") from error


def embedding_rows(model: PreTrainedModel) -> int:
    """How many tokens a model has embeddings of."""
    rows: int = cast(Any, model.get_input_embeddings()).weight.shape[0]
    return rows


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer of whose special tokens, which stand in every batch, the model has no embeddings.

    Raises:
        CheckpointError: one is beyond them.
    """
    rows = embedding_rows(model)
    highest = max(tokenizer.all_special_ids, default=0)
    if highest >= rows:
        raise CheckpointError(
            f"the tokenizer {tokenizer.name_or_path!r} has the token {highest}, the model {rows} of them: give its own"
        )


def read_model(
    auto: Any,
    place: str | Path,
    revision: str | None = None,
    *,
    config: PreTrainedConfig | None = None,
    new_head: bool = False,
    exact: bool = False,
    **given: Any,
) -> tuple[PreTrainedModel, set[str]]:
    """A model with all of its weights; to be called within `refusing_unusable`.

    Args:
        auto: the class of transformers that makes it, such as `AutoModel`.
        place: see `hub.model_place`.
        revision: of a Hub id.
        config: its configuration, where that was read already.
        new_head: its head, what it has beside its body, may be missing or of another shape, and is new then. A missing
            pooler, which the heads of encoders read, is new in any case.
        exact: it is a folder that this package wrote, which holds just the weights of the model, as safetensors.
        given: further arguments, as `dtype`.

    Returns:
        The model, and the names of the weights that are new.

    Raises:
        CheckpointError: weights are missing, are not finite, or cannot be those of the configuration; or a
            configuration names code to run.
    """
    if isinstance(place, Path):
        _check_files(place)
        if exact:
            _check_exact(place)
    if config is None and not (isinstance(place, Path) and (place / ADAPTER_FILE).exists()):
        config = _config_or_none(place, revision)
    if config is not None:
        if isinstance(place, Path):
            _check_size(auto, place, config)
        given["config"] = config
    with quiet_loading():
        model, report = auto.from_pretrained(
            place,
            revision=revision or "main",
            ignore_mismatched_sizes=new_head,
            output_loading_info=True,
            weights_only=True,  # of what is no safetensors: tensors, and nothing that runs
            **({"use_safetensors": True} if exact else {}),
            **given,
            **GIVEN,
        )
    mismatched = {name for name, *_ in report["mismatched_keys"]}
    new = set(report["missing_keys"]) | mismatched
    body = f"{model.base_model_prefix}."
    heads = {name for name in new if not name.startswith(body)} if new_head and model.base_model is not model else set()
    poolers = {name for name in new - mismatched if "pooler" in name.split(".")}
    # a buffer that is not there is what its module makes of the configuration, and not random
    counted = new if exact else new & {name for name, _ in model.named_parameters(remove_duplicate=False)}
    if lacking := counted - heads - poolers:
        raise CheckpointError(
            f"{str(place)!r} lacks the weights {min(lacking)!r}, which would be random: give a model that has them"
        )
    if report.get("error_msgs") or report.get("conversion_errors"):
        raise CheckpointError(f"{str(place)!r} has weights that are not those of its {_MODEL_FILE}: is it complete?")
    if exact and report["unexpected_keys"]:
        raise CheckpointError(
            f"{str(place)!r} holds weights {min(report['unexpected_keys'])!r}, which have no place: is it complete?"
        )
    check_finite(model, f"the model at {str(place)!r}")
    return model, new


def _config_or_none(place: str | Path, revision: str | None) -> PreTrainedConfig | None:
    """The configuration of a model; `None` of an adapter on the Hub, whose model transformers finds."""
    try:
        return read_model_config(place, revision)
    except OSError as error:
        if isinstance(place, Path) or isinstance(error, CheckpointError):
            raise
        return None


def _check_files(folder: Path, within: bool = False) -> None:
    """Refuse a folder with a device or a pipe in it, from which reading might never end, and adapters that run code."""
    for path in sorted([*folder.iterdir(), *folder.glob(f"{CHAT_TEMPLATE_DIR}/*")]):
        if path.exists() and not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{str(path)!r} is no file: give a folder of files")
    for path in sorted(folder.glob("*.index.json")):
        _check_index(path)
    if (folder / ADAPTER_FILE).exists():  # which transformers would follow to the model below
        base = str(read_adapter_config(folder).base_model_name_or_path or "")
        if base and not within and Path(base).is_dir() and Path(base).resolve() != folder.resolve():
            _check_files(Path(base), within=True)
            check_config(AutoConfig.from_pretrained(base, **GIVEN), base)


def _check_index(path: Path) -> None:
    """Refuse an index that says of weights that they are elsewhere than beside it."""
    remedy = "put back the file that was written"
    places = read_object(path, remedy).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise CheckpointError(f"{str(path)!r} cannot be used (it has no weight_map): {remedy}")
    for place in places.values():
        if not isinstance(place, str) or place in ("", ".", "..") or "/" in place or "\\" in place:
            raise CheckpointError(
                f"{str(path)!r} cannot be used (it leads to {str(place)[:60]!r}, which is no file beside it): {remedy}"
            )


def _check_exact(folder: Path) -> None:
    """Refuse a folder that this package did not write."""
    if (folder / ADAPTER_FILE).exists():
        raise CheckpointError(f"{str(folder)!r} holds {ADAPTER_FILE}, which has no place there: take it away")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{str(folder)!r} holds no weights as .safetensors: is it complete?")
    for path in files:
        weight_shapes(path)


def check_config(config: PreTrainedConfig, place: str) -> None:
    """Refuse a configuration that has code fetched, an attention of the Hub's kernels, or is out of every range.

    Args:
        config: it.
        place: where it was read, for the message.

    Raises:
        CheckpointError: it is one.
    """
    file = repr(f"{place}/{_MODEL_FILE}")
    for name in ("hidden_size", "num_attention_heads", "intermediate_size", "vocab_size"):
        size = getattr(config.get_text_config(), name, None)
        if isinstance(size, int) and size < 0:
            raise CheckpointError(f"{file} has {name} {size}: give a number above 0")
    if not all(isinstance(label, str) for label in (config.id2label or {}).values()):
        raise CheckpointError(f"{file} has labels in id2label that are no strings: give names")
    parts = [config, *(getattr(config, name, None) for name in config.sub_configs)]
    for part in parts:
        for name in ("_attn_implementation", "_experts_implementation"):
            value = getattr(part, name, None)
            if value is not None and not (isinstance(value, str) and "/" not in value):
                raise CheckpointError(f"{file} has {name} {value!r}, code of the Hub: take it out")


def _check_size(auto: Any, folder: Path, config: PreTrainedConfig) -> None:
    """Refuse a configuration of a model that is far larger than the files of its weights, before it fills memory."""
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    layers = 1 if layers is None else layers
    files = [path for path in folder.iterdir() if path.suffix in _WEIGHTS]
    size = sum(path.stat().st_size for path in files)
    if not 0 < layers <= max(_FEWEST_LAYERS, size // 64):
        raise CheckpointError(
            f"{str(folder / _MODEL_FILE)!r} has {layers} layers, its weights {size} bytes: is it whole?"
        )
    with torch.device("meta"), quiet_loading():
        elements = sum(weight.numel() for weight in auto.from_config(deepcopy(config), **GIVEN).parameters())
    if elements > max(_FEWEST_ELEMENTS, _ELEMENTS_A_BYTE * size):
        raise CheckpointError(
            f"{str(folder / _MODEL_FILE)!r} is of {elements} weights, and its files hold {size} bytes: is it whole?"
        )
