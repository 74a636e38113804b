"""Fillers by name, as the commands take them."""

from __future__ import annotations

import torch

from rectify.detectors import ToxicityClassifier
from rectify.errors import InvalidArgumentError
from rectify.hub import load_language_model
from rectify.methods.method import Method
from rectify.methods.rectification import Detector, Rectify, RectifyWithDetector, Static
from rectify.methods.specs import parse_method
from rectify.rephrasing.filler import Filler
from rectify.rephrasing.substitutions import Substitutions
from rectify.spec_pairs import read_pairs

FILLERS = {
    "causal:MODEL[,substitutions=FOLDER]": "a causal language model fills each gap under a method, from left to right; "
    "FOLDER is of `rectify train substitutions`, and says what people put in place of the same words",
    "seq2seq:ID": "an encoder-decoder that fills masks, such as seq2seq:beyond/genius-large",
    "chat:SPEC": "a chat model: chat:local:ID, or chat:endpoint:URL,model=NAME",
}
"""What there is, and what each is."""


def check_filler(spec: str, method: str) -> Method | None:
    """Refuse what `load_filler` would refuse before it loads anything; the method of a causal filler.

    Raises:
        InvalidArgumentError: there is no such filler, or the method does not fit one.
        CheckpointError: the substitutions that it names cannot be used.
    """
    chosen = _method(spec, method)
    if chosen is not None and (folder := _causal(spec)[1]) is not None:
        Substitutions.from_pretrained(folder)
    return chosen


def _method(spec: str, method: str) -> Method | None:
    """That of a causal filler; `None` of others."""
    kind, _, name = spec.partition(":")
    if kind not in {form.partition(":")[0] for form in FILLERS} or not name:
        raise InvalidArgumentError(f"filler is {spec!r}: give one of {', '.join(FILLERS)}")
    if kind != "causal":
        return None
    chosen = parse_method(method)
    if not isinstance(chosen, Rectify | Detector | RectifyWithDetector | Static):
        raise InvalidArgumentError(f"fill_method is {method!r}: give rectify, static or detector, with parameters")
    return chosen


def load_filler(
    spec: str,
    *,
    method: str = "rectify:pocket-q",
    reward_model: str = "pocket-reward",
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    seed: int = 0,
) -> Filler:
    """The filler of a name.

    Args:
        spec: one of `FILLERS`, with what follows the colon put in.
        method: of a causal filler: what keeps it from being toxic.
        reward_model: of a causal filler: the classifier that ranks what may be filled in.
        device, dtype: of the models.
        seed: of all noise.

    Raises:
        InvalidArgumentError: there is no such filler.
        RectifyError: it cannot be loaded.

    Example:
        >>> from rectify.rephrasing.load import load_filler
        >>> filler = load_filler("causal:pocket")
        >>> filler.fill(["You are such a <MASK>, and I told you so"], attempt=0)
    """
    chosen = _method(spec, method)
    kind, _, name = spec.partition(":")
    # imported when asked for, so that one does not wait for another's libraries
    if kind == "seq2seq":
        from rectify.rephrasing.seq2seq_filler import Seq2SeqFiller

        return Seq2SeqFiller.from_pretrained(name, device=device, seed=seed)
    if chosen is None:
        from rectify.chat import make_chat
        from rectify.rephrasing.chat_filler import ChatFiller

        return ChatFiller(make_chat(name), seed)
    from rectify.rephrasing.causal_filler import CausalFiller

    name, folder = _causal(spec)
    substitutions = Substitutions.from_pretrained(folder) if folder else None
    model, tokenizer = load_language_model(name, dtype, device)
    reward = ToxicityClassifier.from_pretrained(reward_model, device=device)
    decoder = chosen.bind(model, tokenizer, {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 0.9})
    named = f"causal:{name},{chosen.label},{reward_model}"
    return CausalFiller(model, tokenizer, decoder, reward.probabilities, named, substitutions=substitutions, seed=seed)


def _causal(spec: str) -> tuple[str, str | None]:
    """The model and the substitutions that a causal filler's name gives."""
    name, *pairs = spec.removeprefix("causal:").split(",")
    given = read_pairs(pairs, {"substitutions": str}, f"filler {spec!r}")
    if not name or not all(given.values()):
        raise InvalidArgumentError(f"filler is {spec!r}: give causal:MODEL or causal:MODEL,substitutions=FOLDER")
    return name, given.get("substitutions")
