"""Tiny things to federate: two models small enough to train in milliseconds, a table, builders."""

import csv
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import tomli_w
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from intramural.core.config import check_config
from intramural.core.federation import FederationConfig

CSV = Path(__file__).parent / "fixtures" / "icd10_200.csv"
LABELS = ("circulatory", "digestive", "mental", "respiratory")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' [SEP] ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant :' }}{% endif %}"
)
VOCABULARY = 300
Row = dict[str, str]
Json = dict[str, Any]


def rows() -> list[Row]:
    """Return the fixture's 200 rows, the four chapters in turn."""
    with open(CSV, newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    return [row for four in zip(*(table[i::50] for i in range(50)), strict=True) for row in four]


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


def table(base: Path, **sections: Json) -> Json:
    """Return a federation.toml of two rounds of classification; a section's keys are replaced."""
    content: Json = {
        "federation": {"name": "tiny", "rounds": 2, "seed": 7},
        "model": {"base": str(base), "max_length": 32},
        "task": {"kind": "classification", "labels": list(LABELS)},
        "exchange": {"kind": "lora", "rank": 2, "alpha": 4.0},
        "training": {
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "batch_size": 8,
            "local_steps": 2,
        },
        "sites": {"min": 1},
    }
    for section, keys in sections.items():
        content[section] = content.get(section, {}) | keys
    return content


def federation(base: Path, **sections: Json) -> FederationConfig:
    """Return the federation of `table`."""
    return check_config(table(base, **sections), FederationConfig, source="test")


def generation(base: Path, **sections: Json) -> FederationConfig:
    """Return a federation that learns titles from codes, on the tiny Llama."""
    content = table(base, **sections)
    content["task"] = {"kind": "generation", "instruction": "title of {text}", "new_tokens_max": 4}
    content["exchange"].setdefault("target_modules", ["q_proj", "v_proj"])
    return check_config(content, FederationConfig, source="test")


def site(
    folder: Path,
    name: str,
    records: Iterable[Row],
    *,
    full: bool = False,
    kind: str = "classification",
    **sections: Json,
) -> Path:
    """Write a site's folder and return its site.toml; a section's keys are replaced."""
    target = {"label": "chapter"} if kind == "classification" else {"response": "title"}
    content: Json = {
        "site": {"name": name},
        "data": {
            "path": "records.jsonl",
            "text": "title" if kind == "classification" else "code",
            **target,
        },
        "policy": {"require_privacy": False, "exchange": ["full" if full else "lora"]},
        "compute": {"device": "cpu", "threads": 1},
    }
    for section, keys in sections.items():
        content[section] = content.get(section, {}) | keys
    home = folder / name
    home.mkdir(parents=True)
    lines = [json.dumps(record) for record in records]
    (home / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (home / "site.toml").write_text(tomli_w.dumps(content), encoding="utf-8")
    return home / "site.toml"


def sites(folder: Path, count: int, *, records: Sequence[Row] = (), full: bool = False) -> Path:
    """Write `count` sites that share the rows in turn; return the folder that holds them."""
    rows_ = records or rows()
    for number in range(count):
        site(folder, f"site-{number + 1}", rows_[number::count], full=full)
    return folder
