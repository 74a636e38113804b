"""The pocket language model: its tokenizer, its shape and its training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import rectify.training  # noqa: F401  # isort: skip (before transformers' Trainer: see there)
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    EarlyStoppingCallback,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from rectify.pocket.texts import LabelledText

logger = logging.getLogger(__name__)

VOCABULARY = 8192
CONTEXT = 1024
SHORT = 256
END = "<|endoftext|>"


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose one special token begins, ends and pads, as GPT-2's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=CONTEXT
    )


def language_model_config() -> LlamaConfig:
    """A Llama shape of 6.5 M parameters: 13 MB in bfloat16."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


class PackedBlocks(Dataset):
    """Texts as one stream of token ids, each ended by the end token, cut into blocks of equal length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> None:
        order = np.random.default_rng(seed).permutation(len(texts))
        encoded = tokenizer([texts[i] for i in order], add_special_tokens=False)["input_ids"]
        stream = np.fromiter((i for ids in encoded for i in (*ids, tokenizer.eos_token_id)), dtype=np.int32)
        self.blocks = stream[: len(stream) // CONTEXT * CONTEXT].reshape(-1, CONTEXT)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.from_numpy(self.blocks[index].astype(np.int64))}


def collate(items: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """A batch of whole blocks, or, three times in four, of short ones: most texts and all prompts are short."""
    ids = torch.stack([item["input_ids"] for item in items])
    if int(ids.sum()) % 4:  # chosen by the content, so that a resumed run makes the same choice
        ids = ids.view(-1, SHORT)
    return {"input_ids": ids, "labels": ids}


def training_arguments(output: Path, **changes: Any) -> TrainingArguments:
    """What the pocket trainings share, and what one of them changes."""
    defaults: dict[str, Any] = {
        "output_dir": str(output),
        "lr_scheduler_type": "cosine",
        "warmup_steps": 100,
        "weight_decay": 0.1,
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "bf16": True,
        "use_cpu": not torch.cuda.is_available(),
        "eval_strategy": "steps",
        "save_strategy": "steps",
        "save_total_limit": 1,
        "logging_steps": 50,
        "report_to": "none",
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }
    return TrainingArguments(**defaults | changes)


def train_or_resume(trainer: Trainer) -> None:
    """Train, from the last checkpoint if there is one."""
    work = Path(str(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(work)) if work.exists() else None)


def train_language_model(texts: Sequence[LabelledText], output: Path, epochs: float, seed: int) -> None:
    """Train tokenizer and language model, and save them together in bfloat16 under `output`."""
    train = [text.text for text in texts if text.split == "train"]
    validation = [text.text for text in texts if text.split == "validation"]
    tokenizer = train_tokenizer(train)
    set_seed(seed)
    model = LlamaForCausalLM(language_model_config())
    blocks = PackedBlocks(tokenizer, train, seed)
    logger.info("language model: %d parameters, %d training tokens", model.num_parameters(), blocks.blocks.size)
    work = output.with_name(output.name + ".work")
    trainer = Trainer(
        model=model,
        args=training_arguments(
            work,
            seed=seed,
            learning_rate=3e-3,
            num_train_epochs=epochs,
            per_device_train_batch_size=8,
            per_device_eval_batch_size=8,
            eval_steps=300,
            save_steps=300,
            save_total_limit=2,
            load_best_model_at_end=True,
        ),
        train_dataset=blocks,
        eval_dataset=PackedBlocks(tokenizer, validation, seed),
        data_collator=collate,
        callbacks=[EarlyStoppingCallback(early_stopping_patience=2)],
    )
    train_or_resume(trainer)
    logger.info("language model: %s", trainer.evaluate())
    # as in RealToxicityPrompts runs
    model.generation_config = GenerationConfig(
        do_sample=True, top_p=0.9, max_new_tokens=20, bos_token_id=0, eos_token_id=0, pad_token_id=0
    )
    model.config.use_cache = True  # Trainer switches it off
    cast(Any, model).to(torch.bfloat16).save_pretrained(output)
    tokenizer.save_pretrained(output)
