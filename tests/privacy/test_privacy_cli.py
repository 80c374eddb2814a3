"""`intramural privacy plan`."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import tomli_w
from typer.testing import CliRunner

from intramural.core.errors import ConfigError
from intramural.privacy.cli import privacy_app
from tests.tiny import table

OPTIONS = {
    "--nominal-records": 1000,
    "--batch": 20,
    "--steps": 10,
    "--rounds": 5,
    "--delta": 1e-5,
}


def call(*words: object) -> str:
    result = CliRunner().invoke(
        privacy_app, ["plan", *map(str, words)], catch_exceptions=False, env={"COLUMNS": "100"}
    )
    assert result.exit_code == 0
    return result.output


def options(**changed: Any) -> list[object]:
    wanted = OPTIONS | {"--" + name.replace("_", "-"): value for name, value in changed.items()}
    return [word for pair in wanted.items() if pair[1] is not None for word in pair]


def written(folder: Path, **privacy: Any) -> Path:
    claim = {"unit": "record", "delta": 1e-5, "clip_norm": 1.0, "nominal_records": 1000} | privacy
    file = folder / "federation.toml"
    content = table(Path("base"), privacy=claim, strategy={"weights": "equal"})
    file.write_text(tomli_w.dumps(content))
    return file


def test_a_plan_is_told_with_all_that_gives_epsilon_its_meaning() -> None:
    found = json.loads(call(*options(noise=1.5), "--json"))
    assert (found["unit"], found["relation"], found["delta"]) == ("record", "add-remove", 1e-5)
    assert (found["sampler"], found["sample_rate"], found["divisor"]) == ("poisson", 0.02, 20.0)
    costs = found["epsilon"]
    assert costs["pld"] < costs["prv"] < costs["rdp"]
    assert found["accountant"].startswith("PLD, dp-accounting")
    shown = " ".join(call(*options(noise=1.5)).split())
    for words in ("one record added or removed", "poisson, each record at rate 0.02 a step",
                  "nominal", "5 rounds", "1e-05", "epsilon, PLD", "Opacus, a check"):  # fmt: skip
        assert words in shown
    assert f"{costs['pld']:.3f}" in shown


def test_noise_follows_from_epsilon() -> None:
    found = json.loads(call(*options(epsilon=1), "--json"))
    assert 0.995 < found["epsilon"]["pld"] <= 1.0
    assert found["noise_multiplier"] == round(found["noise_multiplier"], 4)


def test_replacement_costs_more_and_has_no_second_opinion() -> None:
    add, replace = (
        json.loads(call(*options(noise=2, relation=relation), "--json"))["epsilon"]
        for relation in ("add-remove", "replace-one")
    )
    assert replace["pld"] > add["pld"]
    assert replace["prv"] is None
    assert "no answer" in call(*options(noise=2, relation="replace-one"))


def test_a_federations_file_is_a_plan(tmp_path: Path) -> None:
    file = written(tmp_path, noise_multiplier=2.0, metrics_noise=30.0)
    found = json.loads(call("--federation", file, "--json"))
    # two rounds of validation and a test; batches of 8 of 1000
    assert (found["evaluations"], found["sample_rate"], found["rounds"]) == (3, 0.008, 2)
    shown = " ".join(call("--federation", file).split())
    assert "3 in epsilon, noise multiplier 30" in shown


def test_persons_are_told_as_persons(tmp_path: Path) -> None:
    person = {"unit": "person", "nominal_persons": 200, "records_per_person": 3}
    file = written(tmp_path, noise_multiplier=2.0, **person)
    shown = " ".join(call("--federation", file).split())
    assert "one person added or removed" in shown
    assert "200 persons a site, 8 a step" in shown


def test_warnings_are_shown() -> None:
    assert "warning: delta 0.0005 is above 1 / (10 x 1000 records)" in " ".join(
        call(*options(noise=2, delta=5e-4)).split()
    )


@pytest.mark.parametrize("relation", ["add-remove", "replace-one"])
def test_the_plot_is_an_svg_and_the_same_each_time(tmp_path: Path, relation: str) -> None:
    file = tmp_path / "plots" / "epsilon.svg"
    words = [*options(noise=2, relation=relation), "--json", "--plot", file]
    call(*words)
    first = file.read_bytes()
    text = "".join(ElementTree.fromstring(first).itertext())
    for part in ("rounds", "epsilon at delta = 1e-05", relation, "one record", "poisson", "PLD"):
        assert part in text
    assert ("RDP, an upper bound" in text) == (relation == "add-remove")
    call(*words)
    assert file.read_bytes() == first


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (options(noise=1, batch=None, delta=None), "missing: --batch, --delta; or give --fed"),
        (options(), "exactly one of --epsilon and --noise"),
        (options(noise=1, epsilon=1), "exactly one of --epsilon and --noise"),
        (options(noise=1, relation="swap"), "--relation is add-remove or replace-one"),
        (options(noise=1, steps=0, rounds=-1), "must be at least 1: --steps, --rounds"),
        (options(noise=1, batch=1001), "the sample rate would be above 1; lower the batch"),
        (options(noise=1, delta=0.001), "below 1 / 1000"),
        (options(noise=0), "noise_multiplier must be above 0"),
        (options(epsilon=1e-9), "raise privacy.epsilon or the nominal number"),
        (["--federation", "f.toml", "--noise", "1"], "leave out --noise"),
        (["--federation", "f.toml", "--relation", "replace-one"], "leave out --relation"),
    ],
)
def test_impossible_plans_are_refused(words: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        call(*words)
    assert caught.value.exit_code == 2


def test_the_command_has_help_and_stands_in_a_group() -> None:
    result = CliRunner().invoke(privacy_app, ["--help"], env={"COLUMNS": "100"})
    assert "plan" in result.output
    assert "what a federation costs in privacy" in call("--help")
