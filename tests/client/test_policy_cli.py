"""`intramural client policy explain`: all that would be refused, from every form of a manifest."""

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from click.testing import Result
from typer.testing import CliRunner

from intramural.client.approval import Approvals
from intramural.client.policy_cli import policy_app, read_manifest
from intramural.core.errors import AwaitsApproval, ConfigError, TrustError
from intramural.core.federation import FederationConfig
from intramural.core.site import SitePolicy, load_site
from intramural.privacy.accountant import epsilon_pld
from intramural.privacy.charges import Charge
from intramural.privacy.ledger import Ledger
from intramural.privacy.plan import PrivacyPlan
from tests.client.envelopes import PRIVACY, envelope_of
from tests.privacy.ledgers import charge, clock
from tests.tiny import Json, federation, rows, site, table

PRIVATE: Json = {"strategy": {"weights": "equal"}, "privacy": PRIVACY}


def made(base: Path = Path("nowhere"), **sections: Json) -> FederationConfig:
    return federation(base, **PRIVATE | sections)


def own(folder: Path, **sections: Json) -> Path:
    plain: Json = {"policy": {"require_privacy": True, "exchange": ["lora"]}}
    return site(folder, "st-elsewhere", rows()[:2], **plain | sections)


def call(place: Path, manifest: Path, *words: str) -> Result:
    given = ["explain", str(manifest), "--site", str(place), *words]
    return CliRunner().invoke(policy_app, given, catch_exceptions=False)


def write(folder: Path, config: FederationConfig) -> Path:
    path = folder / "manifest.json"
    path.write_text(config.manifest())
    return path


def explained(place: Path, config: FederationConfig) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(call(place, write(place.parent, config), "--json").output)
    return found


def keys_of(place: Path, config: FederationConfig) -> list[str]:
    return [violation["key"] for violation in explained(place, config)["violations"]]


def test_a_manifest_that_keeps_all_limits_ends_with_0(tmp_path: Path) -> None:
    found = call(own(tmp_path), write(tmp_path, made()))
    assert found.exit_code == 0
    assert "tiny: the site refuses nothing of it" in found.output
    assert "a run would cost epsilon" in found.output


def test_everything_refused_is_printed_with_its_remedy_and_ends_with_3(tmp_path: Path) -> None:
    place = own(tmp_path, policy={"require_privacy": True, "tasks": ["generation"]})
    found = call(place, write(tmp_path, federation(Path("nowhere"))))
    assert found.exit_code == 3
    assert found.output.splitlines() == [
        "policy.require_privacy allows federations with [privacy] alone, the federation asks for "
        "no [privacy]; require_privacy is true: add [privacy] to federation.toml, or set it to "
        "false in site.toml",
        "policy.tasks allows ['generation'], the federation asks for task.kind = 'classification';"
        " add it to policy.tasks in site.toml",
    ]


def test_every_form_of_a_manifest_is_read(tmp_path: Path) -> None:
    config = made()
    content = table(Path("nowhere"), **PRIVATE)
    toml, manifest, envelope = (tmp_path / name for name in ("f.toml", "m.json", "e.json"))
    toml.write_text(tomli_w.dumps(content))
    manifest.write_text(config.manifest())
    envelope.write_text(envelope_of(config))
    store = Approvals(tmp_path, policy=SitePolicy(), journal=tmp_path / "journal.jsonl")
    with pytest.raises(AwaitsApproval):
        store.admit(envelope_of(config), config)
    (waiting,) = (tmp_path / "pending").iterdir()
    for path in (toml, manifest, envelope, waiting):
        assert read_manifest(path) == config


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.json", "", "neither TOML nor JSON"),
        ("m.json", "[]", "is no manifest"),
        ("m.json", "{}", "federation: missing"),
        ("m.json", "{" * 20_000, "neither TOML nor JSON"),
        ("f.toml", "[federation]", "federation.name: missing"),
    ],
)
def test_what_is_no_manifest_is_wrong_use(
    tmp_path: Path, name: str, content: str, words: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError, match=words) as caught:
        read_manifest(path)
    assert caught.value.exit_code == 2
    with pytest.raises(ConfigError, match="cannot read"):
        read_manifest(tmp_path / "none.json")
    (tmp_path / "e.json").write_text('{"payload": "?"}')
    with pytest.raises(TrustError):
        read_manifest(tmp_path / "e.json")


def test_the_cost_of_a_run_is_that_of_its_plan_at_the_sites_delta(tmp_path: Path) -> None:
    place = own(tmp_path, policy={"delta_lifetime": 1e-6, "epsilon_run": 0.01})
    config = made()
    found = explained(place, config)
    plan = PrivacyPlan.of(config)
    epsilon = epsilon_pld(plan.total(), delta=1e-6, relation="add-remove")
    assert found["cost"]["epsilon_run"] == pytest.approx(epsilon)
    assert found["cost"]["epsilon_after"] == pytest.approx(epsilon)
    assert [violation["key"] for violation in found["violations"]] == ["policy.epsilon_run"]


def written(place: Path, *charges: Charge) -> bytes:
    config = load_site(place)
    path = config.ledger_file
    ledger = Ledger(path, site=config.site.name, data=config.data_name, now=clock())
    for one in charges:
        ledger.charge(one, epsilon_lifetime=None, delta=1e-5)
    return path.read_bytes()


def test_the_lifetime_budget_counts_what_was_spent_and_nothing_is_charged(tmp_path: Path) -> None:
    place = own(tmp_path, policy={"epsilon_lifetime": 2.6})
    assert keys_of(place, made()) == []
    assert not load_site(place).ledger_file.exists()  # and none was begun
    before = written(place, charge(steps=2000))  # 2.584 at rate 0.01, noise 1 (dp-accounting)
    assert explained(place, made())["cost"]["epsilon_spent"] == pytest.approx(2.584, abs=0.001)
    assert keys_of(place, made()) == []  # four steps at rate 0.004 add 0.001
    assert keys_of(place, made(training={"local_steps": 500})) == ["policy.epsilon_lifetime"]
    assert load_site(place).ledger_file.read_bytes() == before


def test_a_plan_that_cannot_be_kept_is_explained(tmp_path: Path) -> None:
    config = made(strategy={"weights": "examples"})
    found = explained(own(tmp_path), config)
    assert [violation["key"] for violation in found["violations"]] == ["privacy"]
    assert "strategy.weights" in found["violations"][0]["remedy"]
    assert found["cost"] is None


def test_columns_that_the_site_lacks_are_explained(tmp_path: Path) -> None:
    person = PRIVACY | {"unit": "person", "nominal_persons": 2000, "records_per_person": 1}
    place = own(tmp_path)
    assert keys_of(place, made(privacy=person)) == ["data.person"]
    generation = made(task={"kind": "generation", "labels": []})
    assert keys_of(place, generation) == ["data.response"]
    both = own(tmp_path / "both", data={"person": "code", "group": "category"})
    assert keys_of(both, made()) == ["data.group"]
    assert keys_of(both, made(privacy=person)) == ["data.group"]
    one = own(tmp_path / "one", data={"person": "code"})
    assert keys_of(one, made(privacy=person)) == []


def test_the_base_model_on_the_disk_is_compared_and_measured(tmp_path: Path, bert: Path) -> None:
    other = "sha256:" + "1" * 64
    place = own(tmp_path)
    found = explained(place, made(bert))
    # rank 2 on query and value of two layers of 32: 2 x 2 x 2 x (32 + 32); a head of 4 labels
    assert found["vector_bytes"] == 4 * (512 + 4 * 33)
    assert keys_of(place, made(bert)) == []
    assert keys_of(place, made(bert, model={"digest": other})) == ["model"]
    listed = own(tmp_path / "listed", policy={"models": [other]})
    assert keys_of(listed, made(bert)) == ["policy.models"]
    small = own(tmp_path / "small", policy={"bytes_per_round_max": 4000})
    assert keys_of(small, made(bert)) == ["policy.bytes_per_round_max"]
    assert keys_of(small, made()) == []  # nowhere on this disk: its size is not known
