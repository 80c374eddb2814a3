"""Two models small enough to train in milliseconds, with random weights."""

from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from tests.tiny import rows

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)
VOCABULARY = 300


def _tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """Return a WordPiece tokenizer of the fixture's words; letters stand in for the rest."""
    words = Counter(word for row in rows() for word in row["title"].lower().split())
    letters = list("abcdefghijklmnopqrstuvwxyz0123456789,-()/.[]':")
    vocabulary = [*SPECIAL, *letters, *("##" + letter for letter in letters)]
    new = (word for word, _ in words.most_common() if word not in vocabulary)
    vocabulary += list(new)[: VOCABULARY - len(vocabulary)]
    ids = {word: number for number, word in enumerate(vocabulary)}
    inner = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token"), SPECIAL, strict=True))
    names |= {"eos_token": "[SEP]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, **names)
    if chat:
        fast.chat_template = CHAT
    return fast


def save_bert(folder: Path) -> Path:
    """Write a random two-layer BERT without a head."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    BertModel(config).save_pretrained(folder)
    _tokenizer(chat=False).save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """Write a random two-layer Llama and a tokenizer with a chat template."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    _tokenizer(chat=True).save_pretrained(folder)
    return folder
