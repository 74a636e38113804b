"""Tiny tokenizers of several kinds, which say where their tokens are, and trunks for them."""

import torch
from conftest import build_model
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE, WordPiece
from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrstuvwxyz!,.—"
KINDS = ["encoder", "llama", "gpt2"]


def word_pieces():
    """As BERT's: no casing, no accents, words in pieces, special tokens around each text."""
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "bad", "worse", "##st", *LETTERS, *(f"##{c}" for c in LETTERS)]
    tokenizer = Tokenizer(WordPiece({piece: index for index, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]")


def byte_level():
    """As GPT-2's, of single bytes, whose words begin with a blank."""
    vocabulary = {piece: index for index, piece in enumerate(["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    vocabulary |= {"Ġb": 257, "ad": 258, "Ġbad": 259}
    tokenizer = Tokenizer(BPE(vocabulary, [("Ġ", "b"), ("a", "d"), ("Ġb", "ad")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


def sentence_pieces():
    """As Llama's: a first token, characters, and a mark for blanks."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *LETTERS, *LETTERS.upper()[:26], "▁bad"]
    tokenizer = Tokenizer(
        BPE({piece: index for index, piece in enumerate(pieces)}, [], unk_token="<unk>", fuse_unk=False)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {"encoder": word_pieces, "gpt2": byte_level, "llama": sentence_pieces}


def save_backbone(kind, folder):
    """Write a trunk of random weights and its tokenizer."""
    tokenizer = TOKENIZERS[kind]()
    if kind == "encoder":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        torch.manual_seed(0)
        # saved without the pooler, which is of no use here
        model = BertForMaskedLM(
            BertConfig(vocab_size=len(tokenizer), max_position_embeddings=160, initializer_range=0.3, **sizes)
        )
    else:
        model = build_model(kind, vocab_size=len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
