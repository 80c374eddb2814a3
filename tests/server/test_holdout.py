"""The coordinator's own records: what they say of arrays, and rounds that are judged by them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from intramural.core.errors import ConfigError, DataError, Refused
from intramural.core.federation import FederationConfig
from intramural.core.layout import Vector
from intramural.core.records_file import load_holdout
from intramural.models.resident import resident_model
from intramural.server.holdout import Holdout, check_holdout
from intramural.server.planning import check_federation
from tests.server.fakes import Done, coordinate, grid_of, honest, small
from tests.tiny import federation, rows

STEP = 14 / 6  # (1*1 + 2*2 + 3*3) / (1 + 2 + 3): what every round moves every parameter by
BY_COORDINATOR = {"judge": "coordinator"}


class Said:
    """Stands for records of which each round's arrays give a loss as foretold."""

    digest = "sha256:0"

    def __init__(self, losses: list[float | None]) -> None:
        """Foretell losses, round by round; None: the model diverged."""
        self._losses = iter(losses)
        self.seen: list[float] = []

    def measure(self, vector: Vector) -> dict[str, float]:
        self.seen.append(float(vector[0]))
        loss = next(self._losses)
        return {} if loss is None else {"loss": loss}


def judged(folder: Path, losses: list[float | None], **sections: Any) -> tuple[Done, Said]:
    config = small(
        federation={"rounds": len(losses)},
        gate=BY_COORDINATOR,
        strategy={"momentum": 0.0},
        **sections,
    )
    said: Any = Said(losses)
    return coordinate(folder, config, grid_of(honest), holdout=said), said


def rolled(done: Done) -> list[bool]:
    return [bool(record.get("rolled_back")) for record in done.outcome.history]


def test_the_coordinator_s_records_judge_and_the_sites_do_not(tmp_path: Path) -> None:
    # the sites' loss is the same each round; 3.0 is worse than 2.0, and 1.5 is not
    done, said = judged(tmp_path, [2.0, 3.0, 1.5])
    assert rolled(done) == [False, True, False]
    assert done.outcome.history[1]["gate"] == {"metric": "loss", "kept": 2.0, "round": 3.0}
    assert [record["holdout"] for record in done.outcome.history] == [
        {"loss": 2.0},
        {"loss": 3.0},
        {"loss": 1.5},
    ]
    assert done.outcome.vector[0] == pytest.approx(2 * STEP)
    # it saw what each round made: round 3 starts again from what round 1 left
    np.testing.assert_allclose(np.array(said.seen) - said.seen[0], [0.0, STEP, STEP], rtol=1e-5)


def test_it_judges_where_the_sites_evaluate_never(tmp_path: Path) -> None:
    done, _ = judged(tmp_path, [2.0, 3.0], evaluation={"every": 0})
    assert rolled(done) == [False, True]
    assert [record["metrics"] for record in done.outcome.history] == [{}, {}]


def test_a_diverged_model_is_not_kept(tmp_path: Path) -> None:
    done, _ = judged(tmp_path, [2.0, None])
    assert rolled(done) == [False, True]


def test_rounds_judged_by_the_coordinator_stay_within_a_claim_for_sites() -> None:
    claim = {"clip_norm": 1.0, "noise_multiplier": 1.0, "delta": 1e-3}
    config = small(gate=BY_COORDINATOR, strategy={"weights": "equal"}, site_privacy=claim)
    assert config.gate is not None
    with pytest.raises(ConfigError, match="which it does not cover"):
        small(gate={}, strategy={"weights": "equal"}, site_privacy=claim)


def test_under_privacy_any_metric_of_the_coordinator_s_own_can_judge() -> None:
    privacy = {
        "unit": "record",
        "noise_multiplier": 1.0,
        "delta": 1e-5,
        "clip_norm": 1.0,
        "nominal_records": 100,
    }
    small(privacy=privacy, gate=BY_COORDINATOR | {"metric": "macro_f1"}, evaluation={"every": 0})
    with pytest.raises(ConfigError, match=r"gate\.judge = 'coordinator'"):
        small(privacy=privacy, gate={"metric": "accuracy"})


@pytest.mark.parametrize(
    "parts", [{"strategy": {"rule": "fedsa-lora"}}, {"exchange": {"personal": ["classifier"]}}]
)
def test_a_model_whose_parts_stay_at_the_sites_cannot_be_judged_elsewhere(
    parts: dict[str, Any],
) -> None:
    lora = {"kind": "lora", "rank": 2, "alpha": 4, "target_modules": ["query"]}
    exchange = lora | {"trained_modules": ["classifier"]} | parts.get("exchange", {})
    with pytest.raises(ConfigError, match="leaves a part of it at the sites"):
        check_federation(small(**(parts | {"exchange": exchange}), gate=BY_COORDINATOR))


def test_a_gate_without_records_and_records_without_a_gate_are_refused(tmp_path: Path) -> None:
    file = write(tmp_path)
    with pytest.raises(ConfigError, match=r"holdout\.toml with --holdout"):
        check_holdout(small(gate=BY_COORDINATOR), None)
    for config in (small(), small(gate={})):
        with pytest.raises(ConfigError, match="nothing would use it"):
            check_holdout(config, file)
    check_holdout(small(gate=BY_COORDINATOR), file)
    check_holdout(small(gate={}), None)


def write(folder: Path, **data: Any) -> Path:
    records = rows()[:40]
    with (folder / "own.jsonl").open("w") as out:
        out.writelines(json.dumps(row) + "\n" for row in records)
    table = {"path": "own.jsonl", "text": "title", "label": "chapter"} | data
    lines = [f"{key} = {json.dumps(value)}" for key, value in table.items() if value is not None]
    (folder / "holdout.toml").write_text("\n".join(["[data]", *lines]))
    return folder / "holdout.toml"


def by_hand(config: FederationConfig, bert: Path, vector: Vector) -> tuple[float, float]:
    """Return accuracy and mean cross-entropy, one record at a time, by torch alone."""
    loaded = resident_model(config, places={}, device="cpu").loaded
    loaded.exchange.write(vector)
    tokenizer, right, losses = AutoTokenizer.from_pretrained(bert), [], []
    with torch.no_grad():
        for row in rows()[:40]:
            inputs = tokenizer(row["title"], return_tensors="pt", truncation=True, max_length=32)
            scores = loaded.model(**inputs).logits[0].float()
            target = config.task.labels.index(row["chapter"])
            right.append(int(scores.argmax()) == target)
            losses.append(float(torch.nn.functional.cross_entropy(scores, torch.tensor(target))))
    return float(np.mean(right)), float(np.mean(losses))


def test_the_metrics_are_those_of_the_arrays_on_the_records(tmp_path: Path, bert: Path) -> None:
    config = federation(bert, gate=BY_COORDINATOR, model={"base": str(bert), "max_length": 32})
    holdout = Holdout(write(tmp_path), config, {})
    assert len(holdout) == 40
    exchange = resident_model(config, places={}, device="auto").loaded.exchange
    rng = np.random.default_rng(1)
    for _ in range(2):  # the model is shared: what another left in it must not matter
        vector = rng.standard_normal(exchange.layout.size).astype(np.float32)
        found = holdout.measure(vector)
        accuracy, loss = by_hand(config, bert, vector)
        assert found["accuracy"] == accuracy
        assert found["loss"] == pytest.approx(loss, rel=1e-4)
    assert holdout.measure(np.full_like(vector, np.nan)) == {}


def test_a_holdout_that_cannot_be_read_names_file_and_remedy(tmp_path: Path, bert: Path) -> None:
    config = federation(bert, gate=BY_COORDINATOR)
    with pytest.raises(Refused, match=r"data\.label in .*holdout\.toml; name the column"):
        Holdout(write(tmp_path, label=None), config, {})
    with pytest.raises(DataError, match="nowhere"):
        Holdout(write(tmp_path, path="nowhere.jsonl"), config, {})
    with pytest.raises(ConfigError, match=r"data\.texts: unknown key; did you mean 'text'"):
        load_holdout(write(tmp_path, texts="title"))
