"""What a dead-end Q network says of next tokens, while a model generates."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rectify.causal_body import is_body_of
from rectify.errors import InvalidArgumentError, VocabularyMismatchError
from rectify.first_aid import with_q_advice
from rectify.prefix_memo import MASKED, PrefixMemo
from rectify.risk_model import RiskModel
from rectify.trunk_tap import TrunkTap


class QValue:
    """A Q network and a memo of its states.

    Args:
        q_network: the dead-end Q network, or another risk model; put in evaluation mode.
        model: that generates; where it has the Q network's trunk, its own states are caught.
        tokenizer: the model's, whose vocabulary is checked.
        use_cache: reuse states between calls.

    Raises:
        VocabularyMismatchError: the tokenizer has another vocabulary.
    """

    def __init__(
        self,
        q_network: RiskModel,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        use_cache: bool = True,
    ) -> None:
        self.q_network = q_network.eval()  # with dropout it would be no function of the prefix
        self.memo: PrefixMemo | TrunkTap = PrefixMemo(q_network, use_cache)
        if model is not None and is_body_of(getattr(q_network, "trunk", None), model):
            self.memo = TrunkTap(q_network, model, use_cache)
        self._same_vocabulary = False
        names = (getattr(each, "name_or_path", None) for each in (model, tokenizer))
        self._model_name: str = next(filter(None, names), "MODEL")
        if tokenizer is not None and q_network.config.vocabulary is not None:
            try:
                q_network.config.vocabulary.check(tokenizer)
            except VocabularyMismatchError as error:
                raise with_q_advice(error, self._model_name) from None
            self._same_vocabulary = True

    def check_width(self, vocab_size: int | None) -> None:
        """Refuse scores of another vocabulary.

        Raises:
            VocabularyMismatchError: they are of another size, and no tokenizer showed that the vocabularies agree.
        """
        own = self.q_network.config.vocab_size
        if vocab_size is not None and vocab_size != own and not self._same_vocabulary:
            refusal = VocabularyMismatchError(
                f"the model scores {vocab_size} tokens, the Q network {own}: use a Q network of the model's "
                "vocabulary, or pass the tokenizer if the model's embeddings are only padded"
            )
            raise with_q_advice(refusal, self._model_name)

    def last_hidden(self, prefixes: Tensor) -> Tensor | None:
        """The states after the prefixes, `[B, H]`; `None` where an assistant drafts, which is left alone.

        Args:
            prefixes: `[B, T]` int64, `MASKED` at padding.

        Raises:
            InvalidArgumentError: the prefixes are empty, or longer than the Q network's context.
        """
        if not prefixes.shape[1] and not isinstance(self.memo, TrunkTap):
            raise InvalidArgumentError("input_ids are empty: give generate token ids, not inputs_embeds")
        context = self.q_network.context
        if context is not None and prefixes.shape[1] > context:
            longest = int((prefixes != MASKED).sum(-1).max())
            if longest > context:
                raise InvalidArgumentError(
                    f"the text is {longest} tokens long, and the Q network's context is {context}: "
                    "generate fewer tokens, or use a Q network with a longer context"
                )
        return self.memo.last_hidden(prefixes.to(self.q_network.device))

    def log_survival(self, hidden: Tensor, tokens: Tensor | None, vocab_size: int | None) -> Tensor:
        """`log(1 + Q)` in `[B, H]` states: `[B, vocab_size]`, or of `[B, K]` tokens."""
        hidden = hidden.to(self.q_network.device)
        own = self.q_network.config.vocab_size
        # rows that pad a model's embeddings stand for no token
        if tokens is not None:
            tokens = tokens.to(hidden.device)
            log_survival = self.q_network.head.log_survival(hidden, tokens.clamp_max(own - 1))
            return log_survival if vocab_size == own else log_survival.masked_fill(tokens >= own, -torch.inf)
        log_survival = self.q_network.head.log_survival(hidden)
        extra = 0 if vocab_size is None else vocab_size - own
        return torch.nn.functional.pad(log_survival, (0, extra), value=-torch.inf) if extra else log_survival
