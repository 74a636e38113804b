"""Training of a model that detoxifies itself: a LoRA adapter by cross-entropy on chains, and by a contrastive loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ExportableState

from rectify.adapters import save_adapter
from rectify.builders.cmd_records import ChainExample, to_json
from rectify.builders.cmd_stages import check_contrast
from rectify.causal_body import causal_body
from rectify.chain import closed_length
from rectify.detectors.classifier import pad
from rectify.errors import InvalidArgumentError
from rectify.hub import current_fingerprint, load_language_model, model_place
from rectify.json_files import sha256_of, write_json
from rectify.keyed_noise import KeyedSampling, row_keys
from rectify.methods.self_detoxifier import DetoxifierConfig
from rectify.padding import pad_left
from rectify.pretrained import read_model_config, refusing_unusable
from rectify.quiet_peft import PeftModel
from rectify.sampling import Sampling
from rectify.sentence_encoder import masked_mean
from rectify.training.chain_data import EncodedChains, collate
from rectify.training.cmd_loss import contrastive_loss
from rectify.training.language_model import AdapterSettings, check_length, nats_a_token, text_nll, with_adapter
from rectify.training.running import RESULTS_FILE, checkpoint_to_resume
from rectify.training.trainer import AdapterTrainer, ModelTraining, run_record, use_fast_attention
from rectify.vocabulary import Fingerprint
from rectify.weights_digest import weights_digest


@dataclass
class ChainSettings(AdapterSettings):
    """What is trained; each field is a flag of `rectify train cmd`."""

    max_length: int = field(default=280, metadata={"help": "tokens of a chain; longer ones are left out"})
    contrastive_weight: float = field(default=0.5, metadata={"help": "of the contrastive loss; 0 leaves it out"})
    temperature: float = field(default=1.0, metadata={"help": "τ of the contrastive loss"})
    sample_tokens: int = field(default=20, metadata={"help": "tokens that the model writes to be compared"})
    sample_top_p: float = field(default=0.9, metadata={"help": "of their sampling"})
    lora_r: int = field(default=8, metadata={"help": "rank of the adapter"})
    lora_alpha: int = field(default=16, metadata={"help": "the adapter is scaled by lora_alpha / lora_r"})
    lora_dropout: float = field(default=0.05, metadata={"help": "dropout before the adapter"})

    def __post_init__(self) -> None:
        if not 0 <= self.contrastive_weight < float("inf"):
            raise InvalidArgumentError(f"contrastive_weight is {self.contrastive_weight}: give 0 or more")
        if not self.temperature > 0:
            raise InvalidArgumentError(f"temperature is {self.temperature}: give a number above 0")
        if self.sample_tokens < 1:
            raise InvalidArgumentError(f"sample_tokens is {self.sample_tokens}: give 1 or more")
        _ = self.sampling  # refuses bad values

    @property
    def sampling(self) -> Sampling:
        """How the model writes what is compared."""
        return Sampling(do_sample=True, top_p=self.sample_top_p)


def train_chains(
    settings: ChainSettings,
    arguments: TrainingArguments,
    train: Sequence[ChainExample],
    validation: Sequence[ChainExample],
    callbacks: Sequence[TrainerCallback] = (),
) -> DetoxifierConfig:
    """Train an adapter into `arguments.output_dir`; killed, the same call goes on from its checkpoint.

    At each log step the Trainer's log has `contrastive_active`, the share of the examples since the last one whose
    contrastive term was active, and the same of toxic ones alone, `contrastive_active_toxic`.

    Args:
        settings: what is trained.
        arguments: how, for `transformers.Trainer`.
        train, validation: what to learn.
        callbacks: of the Trainer.

    Returns:
        What was saved; its `training` has `nll`, in nats a token of the validation chains after their frames,
        `base_nll` of the model as it was, and the shares of active contrastive terms over the whole training.

    Raises:
        InvalidArgumentError: the model is an encoder-decoder, the contrastive loss would have no effect, no chain is
            short enough, a setting is out of range, or the folder holds another training.
        CheckpointError: nothing usable is at `model_name_or_path`.
    """
    folder = Path(str(arguments.output_dir))
    name, revision = settings.model_name_or_path, settings.model_revision
    _refuse_encoder_decoder(name, revision)
    if settings.contrastive_weight:
        check_contrast(train, "train_file")
    fingerprint = current_fingerprint(name, revision)
    checkpoint = checkpoint_to_resume(
        arguments,
        RESULTS_FILE,
        **asdict(settings),
        base_fingerprint=fingerprint,
        examples_sha256=sha256_of([to_json(example) for example in [*train, *validation]]),
    )
    base, tokenizer = load_language_model(name, revision=revision)
    digest = weights_digest(causal_body(base))
    check_length(base, settings.max_length)
    length, most = settings.max_length, settings.sample_tokens
    data = EncodedChains(tokenizer, train, length, most, "train_file")
    held = EncodedChains(tokenizer, validation, length, most, "validation_file")
    held.items.sort(key=lambda item: -len(item["input_ids"]))  # batches of nearly equal length
    set_seed(arguments.seed)
    model = with_adapter(base, settings)
    use_fast_attention(base, arguments)
    learning = ChainLearning(model, tokenizer, settings, data.close_ids, arguments.seed)
    trainer = ChainTrainer(
        model=learning,
        args=arguments,
        train_dataset=data,
        eval_dataset=held,
        data_collator=collate,
        compute_metrics=nats_a_token,
        callbacks=[_Steps(), *callbacks],
    )
    results = trainer.train_to_end(checkpoint)
    results |= trainer.predict(cast(Any, held), metric_key_prefix="eval").metrics or {}
    with model.disable_adapter():
        before = trainer.predict(cast(Any, held), metric_key_prefix="base").metrics or {}
    config = DetoxifierConfig(name, Fingerprint.of(tokenizer), revision, digest)
    config.training = {
        "chains": len(data),
        "toxic": sum(item["toxic"] for item in data.items),
        "validation_chains": len(held),
        "too_long": data.too_long + held.too_long,
        **run_record(trainer),
        "contrastive_weight": settings.contrastive_weight,
        "nll": results["eval_nll"],
        "base_nll": before["base_nll"],
        **_of_all(trainer.state.log_history),
    }
    if trainer.is_world_process_zero():
        save_adapter(model, folder, name)
        config.save_pretrained(folder)
        write_json(folder / RESULTS_FILE, results)
    return config


def _refuse_encoder_decoder(name: str, revision: str | None) -> None:
    place = model_place(name, revision)
    with refusing_unusable(f"model {name!r}", "give a causal language model with its tokenizer"):
        config = read_model_config(place, revision)
    # of some, transformers would make a causal model of the decoder alone
    if config.is_encoder_decoder:
        raise InvalidArgumentError(f"model {name!r} is an encoder-decoder: give a causal model, which writes chains on")


# ---------------------------------------------------------------------------------------------------------------------
# Model


class ChainLearning(ModelTraining):
    """A language model and its loss on chains, in the form that `Trainer` expects.

    In training the model writes a continuation of each chain that has something to shun, and the states of this are
    compared with those of the known continuations, all of them read without their context. States are means over the
    tokens that there are, of the last layer. What it writes depends on the step, the chain and the seed alone.

    Args:
        model: the language model with its adapter.
        tokenizer: its tokenizer.
        settings: see `ChainSettings`.
        close_ids: token ids of the marker that ends a continuation.
        seed: of the noise.

    Attributes:
        step: the optimiser's, by which noise is keyed.
        counts: of examples since they were last taken, of toxic ones, and of each the ones with an active term.
    """

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: ChainSettings,
        close_ids: Sequence[int],
        seed: int,
    ) -> None:
        super().__init__()
        self.model, self.settings, self.seed = model, settings, seed
        self.step = 0
        self.counts = dict.fromkeys(("examples", "active", "toxic", "active_toxic"), 0)
        self._close = list(close_ids)
        end = model.get_base_model().generation_config.eos_token_id  # type: ignore[union-attr]
        self._ends = [*(end if isinstance(end, list) else [end]), tokenizer.eos_token_id]
        self._padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor,
        toxic: Tensor | None = None,
        template_ids: Sequence[list[int]] = (),
        candidate_ids: Sequence[list[list[int]]] = (),
        key: Sequence[str] = (),
    ) -> dict[str, Tensor]:
        """The loss of a batch as `chain_data.collate` makes it, and the likelihood of each chain; see `text_nll`."""
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        nll, tokens = text_nll(logits, labels)
        loss = nll.sum() / tokens.sum().clamp_min(1)
        if self.training and self.settings.contrastive_weight:
            losses, active = self._contrast(template_ids, candidate_ids, key)
            loss = loss + self.settings.contrastive_weight * losses.sum() / active.sum().clamp_min(1)
            self._count(active.cpu(), cast(Tensor, toxic).cpu())
        return {"loss": loss, "nll": nll, "tokens": tokens}

    def _contrast(
        self, template_ids: Sequence[list[int]], candidate_ids: Sequence[list[list[int]]], key: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """`contrastive_loss` of a batch: `[B]` losses and `[B]` bool."""
        device = next(self.model.parameters()).device
        losses, active = torch.zeros(len(key), device=device), torch.zeros(len(key), dtype=torch.bool, device=device)
        able = [row for row, candidates in enumerate(candidate_ids) if len(candidates) > 1]
        texts = self.write([template_ids[row] for row in able], [key[row] for row in able])
        written = dict(zip(able, texts, strict=True))
        able = [row for row in able if written[row]]  # one that closes at once has nothing to compare
        if not able:
            return losses, active
        width = max(len(candidate_ids[row]) for row in able)
        rows = [text for row in able for text in (written[row], *candidate_ids[row])]
        states = self.states(rows)
        places = [(row, column) for row, each in enumerate(able) for column in range(len(candidate_ids[each]) + 1)]
        where = tuple(torch.tensor(places, device=device).T)
        table = states.new_zeros(len(able), width + 1, states.shape[-1]).index_put(where, states)
        known = torch.zeros(len(able), width + 1, dtype=torch.bool, device=device)
        known[where] = True
        some, are = contrastive_loss(table[:, 0], table[:, 1:], known[:, 1:], self.settings.temperature)
        index = torch.tensor(able, device=device)
        return losses.index_put((index,), some.to(losses.dtype)), active.index_put((index,), are)

    @torch.no_grad()
    def write(self, template_ids: Sequence[list[int]], keys: Sequence[str]) -> list[list[int]]:
        """What the model writes after each chain's marker, until it closes that; then dropout is as it was before."""
        if not template_ids:
            return []
        device = next(self.model.parameters()).device
        ids, mask = pad_left(template_ids, device)
        noise = KeyedSampling(row_keys(self.seed, [f"{self.step}:{key}" for key in keys], [0]), ids.shape[1])
        training = self.model.training
        self.model.eval()
        try:
            output = cast(Any, self.model).generate(
                input_ids=ids,
                attention_mask=mask,
                **self.settings.sampling.generate_kwargs()
                | {"do_sample": False, "logits_processor": [*self.settings.sampling.warpers(device), noise]},
                max_new_tokens=self.settings.sample_tokens,
                pad_token_id=self._padding,
            )
        finally:
            self.model.train(training)
        new = output[:, ids.shape[1] :].tolist()
        return [row[: closed_length(row, self._close, self._ends)] for row in new]

    def states(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """`[N, H]`: of texts of one token or more, the mean of the last layer's states, padding left aside."""
        device = next(self.model.parameters()).device
        ids, mask = (part.to(device) for part in pad(texts))
        hidden = causal_body(self.model)(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        return masked_mean(hidden, mask)

    def _count(self, active: Tensor, toxic: Tensor) -> None:
        for name, rows in (
            ("examples", torch.ones_like(active)),
            ("active", active),
            ("toxic", toxic),
            ("active_toxic", active & toxic),
        ):
            self.counts[name] += int(rows.sum())

    def take_counts(self) -> dict[str, int]:
        """The counts, which begin at 0 again."""
        counts = self.counts
        self.counts = dict.fromkeys(counts, 0)
        return counts


class ChainTrainer(AdapterTrainer):
    """The Trainer of a `ChainLearning`; its log says how often the contrastive term was active."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with shares of active terms where the loss of training is logged, and at its end."""
        if "loss" in logs or "train_loss" in logs:
            counts = cast(ChainLearning, self.accelerator.unwrap_model(self.model)).take_counts()
            logs = logs | active_shares(counts["active"], counts["examples"], counts["active_toxic"], counts["toxic"])
        super().log(logs, start_time)


class _Steps(TrainerCallback, ExportableState):
    """Tells a `ChainLearning` the optimiser's step, and keeps what it has counted in checkpoints."""

    _learning: ChainLearning | None = None

    def state(self) -> dict[str, Any]:
        counts = {} if self._learning is None else self._learning.counts
        return {"args": {}, "attributes": {"counts": counts}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **_: Any) -> None:
        self._learning = cast(ChainLearning, getattr(model, "module", model))
        kept = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        self._learning.counts |= kept.get("counts", {})

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        cast(ChainLearning, self._learning).step = state.global_step


def active_shares(active: int, examples: int, active_toxic: int, toxic: int) -> dict[str, float]:
    """What is logged of counts: the share of active terms of all examples and of toxic ones, and how many they are."""
    found: dict[str, float] = {}
    for name, part, whole in (("", active, examples), ("_toxic", active_toxic, toxic)):
        if whole:
            found |= {f"contrastive_active{name}": part / whole, f"contrastive_examples{name}": whole}
    return found


def _of_all(history: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """`active_shares` over a whole log."""
    sums: list[int] = []
    for name in ("", "_toxic"):
        entries = [entry for entry in history if f"contrastive_active{name}" in entry]
        examples = [entry[f"contrastive_examples{name}"] for entry in entries]
        active = [entry[f"contrastive_active{name}"] * count for entry, count in zip(entries, examples, strict=True)]
        sums += [round(sum(active)), sum(examples)]
    return active_shares(*sums)
