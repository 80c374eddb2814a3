"""Asking: what a person must do before a key is trusted, and where the question goes."""

import pytest
import typer

from intramural.core.errors import ConfigError, TrustError
from intramural.trust.asking import (
    ask_passphrase,
    ask_to_confirm,
    ask_to_type,
    passphrase_of_environment,
)
from intramural.trust.keys import PASSPHRASE
from tests.trust.commands import asked, call

# see test_keys: the fingerprint of b"abc"
GROUPS = ["32319", "60650", "95486", "93091", "11619", "21116", "12833", "91821"]

app = typer.Typer()


@app.command()
def typing(told: str | None = None) -> None:
    ask_to_type(b"abc", told=told, whose="site 'x'")
    typer.echo("done")


@app.command()
def confirming(told: str | None = None) -> None:
    ask_to_confirm(b"abc", told=told, whose="the coordinator")
    typer.echo("done")


@app.command()
def secret(new: bool = False, asked: bool = False) -> None:
    typer.echo(repr(ask_passphrase(asked, new=new)))


@pytest.mark.parametrize(
    "typed", [" ".join(GROUPS[:2]), "".join(GROUPS[:2]), "-".join(GROUPS[:2]), " ".join(GROUPS)]
)
def test_the_first_two_groups_are_typed_or_all(typed: str) -> None:
    assert call(app, "typing", typed=f"{typed}\n") == "done\n"


def test_what_is_typed_is_not_on_the_screen() -> None:
    shown = asked(app, "typing", typed=" ".join(GROUPS[:2]) + "\n").split("type the first")[0]
    assert all(group in shown for group in GROUPS[2:])
    assert not any(group in shown for group in GROUPS[:2])


@pytest.mark.parametrize(
    "typed",
    [
        GROUPS[0],
        "",
        "yes",
        " ".join(GROUPS[2:4]),
        f"{GROUPS[1]} {GROUPS[0]}",
        " ".join(GROUPS[:3]),
        "32319 60651",
        " ".join([*GROUPS[:7], "91822"]),
    ],
)
def test_other_groups_are_refused(typed: str) -> None:
    with pytest.raises(TrustError, match=r"of site 'x' (is another one|was not compared)"):
        call(app, "typing", typed=f"{typed}\n")


@pytest.mark.parametrize("command", ["typing", "confirming"])
def test_all_groups_given_ask_nothing(command: str) -> None:
    assert call(app, command, "--told", " ".join(GROUPS)) == "done\n"
    assert asked(app, command, "--told", " ".join(GROUPS)) == ""
    for told in (" ".join(GROUPS[:2]), " ".join([*GROUPS[:7], "91822"]), "yes", ""):
        with pytest.raises(TrustError, match="another one than was told"):
            call(app, command, "--told", told, typed="yes\n")


@pytest.mark.parametrize("command", ["typing", "confirming"])
def test_nobody_there_is_a_refusal(command: str) -> None:
    with pytest.raises(TrustError, match="was not compared; give --fingerprint"):
        call(app, command)


def test_a_confirmation_shows_all_groups_and_takes_yes_alone() -> None:
    assert call(app, "confirming", typed="yes\n") == "done\n"
    assert " ".join(GROUPS) in asked(app, "confirming", typed="yes\n")
    for typed in ("no", "y", "ok", "1"):
        with pytest.raises(TrustError, match="not confirmed; nothing was changed"):
            call(app, "confirming", typed=f"{typed}\n")


def test_a_passphrase_is_of_the_environment_or_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PASSPHRASE, raising=False)
    assert passphrase_of_environment() is None
    assert call(app, "secret", typed="x\n") == "None\n"
    assert call(app, "secret", "--asked", typed="five words\n") == "'five words'\n"
    assert call(app, "secret", "--asked", "--new", typed="a\na\n") == "'a'\n"
    with pytest.raises(ConfigError, match="no passphrase was given; set INTRAMURAL_PASSPHRASE"):
        call(app, "secret", "--asked", "--new", typed="a\nb\n")
    monkeypatch.setenv(PASSPHRASE, "known")
    assert call(app, "secret", "--asked") == "'known'\n"
    assert call(app, "secret") == "'known'\n"
    monkeypatch.setenv(PASSPHRASE, "")
    assert call(app, "secret") == "None\n"
