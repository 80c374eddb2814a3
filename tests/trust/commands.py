"""The commands of enrolment, put together as `intramural server` and `intramural client`."""

import json
from typing import Any

import typer
from typer.testing import CliRunner

from intramural.client import enrol_cli as at_site
from intramural.server import enrol_cli as at_coordinator

server_app = typer.Typer()
server_app.command("init")(at_coordinator.init_command)
server_app.command("enrol")(at_coordinator.enrol_command)
server_app.command("rotate")(at_coordinator.rotate_command)
server_app.command("revoke")(at_coordinator.revoke_command)
server_app.command("renew")(at_coordinator.renew_command)
server_app.command("roster")(at_coordinator.roster_command)

client_app = typer.Typer()
client_app.command("init")(at_site.init_command)
client_app.command("rotate")(at_site.rotate_command)
client_app.command("join")(at_site.join_command)


def call(app: typer.Typer, *words: object, typed: str = "") -> str:
    """Return what a command says on its standard output; its errors are raised."""
    # `main` turns the errors raised here into a line and an exit code
    found = CliRunner().invoke(app, [str(w) for w in words], input=typed, catch_exceptions=False)
    assert found.exit_code == 0, found.output
    return found.stdout


def asked(app: typer.Typer, *words: object, typed: str = "") -> str:
    """Return what a command says to the person who is asked, whatever comes of the answer."""
    return CliRunner().invoke(app, [str(w) for w in words], input=typed).stderr


def told(app: typer.Typer, *words: object, typed: str = "") -> dict[str, Any]:
    """Return the object that a command prints with --json."""
    found: dict[str, Any] = json.loads(call(app, *words, "--json", typed=typed))
    return found
