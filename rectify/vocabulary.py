"""The identity of a vocabulary: a Q network and the model that it rectifies must share token ids exactly."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from rectify.errors import InvalidArgumentError, VocabularyMismatchError

_SAMPLES = 32
_SHA256, _ID = re.compile("[0-9a-f]{64}"), re.compile("[0-9]{1,10}")


@dataclass(frozen=True)
class Fingerprint:
    """What identifies a vocabulary.

    Attributes:
        size: number of tokens, added ones included.
        sha256: hash of all tokens in the order of their ids.
        samples: some ids and their tokens, so that a message can show a difference.
    """

    size: int
    sha256: str
    samples: dict[str, str]

    def __post_init__(self) -> None:
        if self.size < 1 or not _SHA256.fullmatch(self.sha256) or not all(map(_ID.fullmatch, self.samples)):
            raise InvalidArgumentError(
                f"a vocabulary has size {self.size}, sha256 {self.sha256!r:.80} and samples of ids: give what was saved"
            )

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Fingerprint:
        """The fingerprint of a tokenizer's vocabulary."""
        tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
        digest = hashlib.sha256()
        for index, token in tokens:
            digest.update(f"{index}\t{token}\n".encode("utf-8", "surrogatepass"))
        step = max(1, len(tokens) // _SAMPLES)
        return cls(len(tokens), digest.hexdigest(), {str(index): token for index, token in tokens[::step]})

    def check(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Refuse a tokenizer of another vocabulary.

        Raises:
            VocabularyMismatchError: says what differs.
        """
        other = Fingerprint.of(tokenizer)
        if other.sha256 == self.sha256:
            return
        differences = [f"it has {other.size} tokens, not {self.size}"] if other.size != self.size else []
        for index, token in self.samples.items():
            found = tokenizer.convert_ids_to_tokens(int(index)) if int(index) < other.size else None
            if found != token:
                differences.append(f"its token {index} is {found!r}, not {token!r}")
                break
        raise VocabularyMismatchError(
            f"tokenizer {tokenizer.name_or_path!r} is not the one this Q network was trained with: "
            f"{'; '.join(differences) or 'some of its tokens differ'}. Use a Q network of the model's own vocabulary; "
            "to pad, reuse an existing token instead of adding one"
        )
