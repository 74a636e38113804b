"""Best of n: whole continuations are drawn from the model, and the least toxic one is kept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.detectors import ToxicityClassifier
from rectify.errors import InvalidArgumentError
from rectify.methods.base import WarpingProcessor
from rectify.methods.method import Decoder, Method
from rectify.trunk_states import input_device


@dataclass(frozen=True)
class BestOfN(Method):
    """Of `n` draws of the base model, the least toxic by the classifier of `path` (default: `pocket-reward`).

    It costs `n` times the model, and the classifier. Whoever reads along sees nothing before the end.
    """

    name: ClassVar[str] = "best_of_n"
    source: ClassVar[str] = "rejection sampling by a reward model, on whole continuations"

    n: int = 4

    def __post_init__(self) -> None:
        if self.n < 1:
            raise InvalidArgumentError(f"n is {self.n}: give 1 or more")

    @property
    def strength(self) -> str:
        """The number of draws."""
        return "n"

    def bind(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, sampling: Mapping[str, Any]) -> Decoder:
        """See `Method.bind`."""
        classifier = ToxicityClassifier.from_pretrained(self.path or "pocket-reward").to(input_device(model)).eval()

        def toxicity(texts: Sequence[str]) -> np.ndarray:
            return classifier.probabilities([text.strip() for text in texts], batch_size=256)

        return Decoder(WarpingProcessor(model, tokenizer, sampling), self.n, toxicity, (classifier,))
