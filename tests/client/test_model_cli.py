"""`intramural client model`: the files are the site's own model, as the report measured it."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from intramural.client.agent import SiteAgent
from intramural.client.approve_cli import approvals_of
from intramural.client.model_cli import model_command
from intramural.core.config import check_config
from intramural.core.errors import ConfigError, DataRefused
from intramural.core.federation import FederationConfig
from intramural.core.site import SiteConfig, load_site
from intramural.server.watcher import Watcher
from intramural.simulations.simulate import Simulation, simulate
from intramural.simulations.sites import Deal
from tests.client.envelopes import envelope_of
from tests.tiny import CSV, LABELS, Json, federation, rows, site, table

OWN: dict[str, Json] = {
    "ditto": {"personal": {"kind": "ditto", "steps": 3}},
    "fine-tune": {"personal": {"kind": "fine-tune", "steps": 5}},
    "head": {"exchange": {"personal": ["classifier"]}},
    "fedsa-lora": {"strategy": {"rule": "fedsa-lora"}},
    "fine-tune on a moved base": {
        "personal": {"kind": "fine-tune", "steps": 5},
        "strategy": {"rule": "flora"},
    },
}


def simulated(folder: Path, config: FederationConfig) -> Json:
    content: Json = {
        "site": {"name": "template"},
        "data": {"path": str(CSV), "text": "title", "label": "chapter"},
        "policy": {"require_privacy": False, "exchange": ["lora"]},
        "compute": {"device": "cpu", "threads": 1},
    }
    template = check_config(content, SiteConfig, source="test")
    deal = Deal(federation=config, template=template, sites=2, partition="iid", folder=folder)
    return simulate(Simulation(deal=deal, compare=frozenset()), watcher=Watcher())


def accuracy(model: Path, base: Path, home: Path, config: FederationConfig) -> float:
    """Return the accuracy of a model's files on a site's test records, by transformers alone."""
    if (model / "adapter_config.json").is_file():
        inner = AutoModelForSequenceClassification.from_pretrained(base, num_labels=len(LABELS))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # peft asks transformers an old name
            loaded: Any = PeftModel.from_pretrained(inner, model)
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(model)
    tokenizer, right = AutoTokenizer.from_pretrained(model), []
    records = SiteAgent(load_site(home / "site.toml"), config).records_of("test")
    for record in records:
        with torch.no_grad():
            inputs = tokenizer(record.text, return_tensors="pt", truncation=True, max_length=32)
            found = int(loaded.eval()(**inputs).logits[0].argmax())
        right.append(config.task.labels[found] == record.target)
    return sum(right) / len(right)


@pytest.mark.parametrize("kind", list(OWN))
def test_the_files_are_the_model_that_the_report_measured(
    tmp_path: Path, bert: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sections: Json = {"sites": {"min": 2}, "training": {"learning_rate": 0.5}} | OWN[kind]
    report = simulated(tmp_path / "run", federation(bert, **sections))
    file = tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(table(bert, **sections)))
    final, seen = report["final"], set()
    for name in ("site-1", "site-2"):
        home, out = tmp_path / "run" / "sites" / name, tmp_path / name
        model_command(str(file), out=out, site=home / "site.toml", run=None, as_json=True)
        told = json.loads(capsys.readouterr().out)
        assert (told["site"], told["model"]) == (name, str(out))
        own = final["personal"][name] if "personal" in final else final["own_test"][name]
        wanted = own.get("federated", own)["accuracy"]
        assert accuracy(out, bert, home, federation(bert, **sections)) == pytest.approx(wanted)
        assert "one site's own model" in (out / "README.md").read_text()
        seen |= {path.read_bytes() for path in out.glob("*.safetensors")}
    assert len(seen) == 2  # each site's is another


def test_an_approved_manifest_is_named_by_its_federation(tmp_path: Path, bert: Path) -> None:
    sections: Json = {"sites": {"min": 2}} | OWN["head"]
    config = federation(bert, **sections)
    simulated(tmp_path / "run", config)
    file = tmp_path / "run" / "sites" / "site-1" / "site.toml"
    with pytest.raises(ConfigError, match="no such manifest"):
        model_command("tiny", out=tmp_path / "own", site=file, run=None)
    approvals = approvals_of(file, load_site(file))
    with pytest.raises(Exception, match="waits"):
        approvals.admit(envelope_of(config), config)
    approvals.approve(config.digest, by="Ada")
    model_command("tiny", out=tmp_path / "own", site=file, run=None)
    assert (tmp_path / "own" / "adapter_model.safetensors").is_file()
    with pytest.raises(ConfigError, match="is there already; name a new folder"):
        model_command("tiny", out=tmp_path / "own", site=file, run=None)
    with pytest.raises(DataRefused, match="keeps nothing of such a run; it has: sha256:"):
        model_command("tiny", out=tmp_path / "other", site=file, run="sha256:0")
    assert not (tmp_path / "other").exists()


def test_a_site_without_a_model_of_its_own_is_told_so(tmp_path: Path, bert: Path) -> None:
    place, file = site(tmp_path, "a", rows()[:8]), tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(table(bert)))
    with pytest.raises(ConfigError, match="take the coordinator's model"):
        model_command(str(file), out=tmp_path / "own", site=place, run=None)
    file.write_text(tomli_w.dumps(table(bert, **OWN["ditto"])))
    with pytest.raises(DataRefused, match="nothing of such a run; it has: none"):
        model_command(str(file), out=tmp_path / "own", site=place, run=None)


def test_a_run_that_is_not_over_has_none_yet(tmp_path: Path, bert: Path) -> None:
    sections: Json = {"sites": {"min": 2}} | OWN["ditto"]
    config = federation(bert, **sections)
    simulated(tmp_path / "run", config)
    home = tmp_path / "run" / "sites" / "site-1"
    (last,) = home.glob("memory/*/*/2.safetensors")
    last.unlink()  # as before the second of two rounds
    file = tmp_path / "federation.toml"
    file.write_text(tomli_w.dumps(table(bert, **sections)))
    with pytest.raises(DataRefused, match="has not been sent the final arrays yet"):
        model_command(str(file), out=tmp_path / "own", site=home / "site.toml", run=None)
