"""`intramural`, `python -m intramural`: the command line, put together from the floors."""

import logging
import os
import sys
from collections.abc import Callable

import typer

from intramural import __version__
from intramural.client import enrol_cli as site_enrolment
from intramural.client import up_cli as site_up
from intramural.client.approve_cli import approve_command
from intramural.client.check_cli import client_check_command
from intramural.client.ledger_cli import ledger_app
from intramural.client.model_cli import model_command
from intramural.client.policy_cli import policy_app
from intramural.core.errors import IntramuralError
from intramural.privacy.cli import privacy_app
from intramural.server import enrol_cli as enrolment
from intramural.server import run_cli as runs
from intramural.server.cli import bundle_command, check_command, report_command, verify_command
from intramural.simulations.cli import simulate_command

INTERRUPTED = 130

app = typer.Typer(
    help="Fine-tune a language model together; every record stays within its own walls.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("simulate")(simulate_command)
app.command("check")(check_command)
app.command("bundle")(bundle_command)
app.command("report")(report_command)
app.command("verify")(verify_command)
app.add_typer(privacy_app, name="privacy")

server_app = typer.Typer(
    help="At the coordinator: keys, sites and runs.\n\nExample: intramural server init DIR",
    no_args_is_help=True,
)
SERVER: dict[str, Callable[..., None]] = {
    "init": enrolment.init_command,
    "enrol": enrolment.enrol_command,
    "rotate": enrolment.rotate_command,
    "revoke": enrolment.revoke_command,
    "renew": enrolment.renew_command,
    "roster": enrolment.roster_command,
    "up": runs.up_command,
    "run": runs.run_command,
    "runs": runs.runs_command,
    "status": runs.status_command,
    "show": runs.show_command,
    "stop": runs.stop_command,
    "report": runs.report_command,
    "verify": runs.verify_command,
}
for name, command in SERVER.items():
    server_app.command(name)(command)
app.add_typer(server_app, name="server")

client_app = typer.Typer(
    help="At a site: its keys, policy, agent, journal and privacy ledger.\n\n"
    "Example: intramural client check site.toml",
    no_args_is_help=True,
)
CLIENT: dict[str, Callable[..., None]] = {
    "init": site_enrolment.init_command,
    "join": site_enrolment.join_command,
    "rotate": site_enrolment.rotate_command,
    "check": client_check_command,
    "approve": approve_command,
    "model": model_command,
    "up": site_up.up_command,
    "log": site_up.log_command,
    "verify": site_up.verify_command,
    "service": site_up.service_command,
}
for name, command in CLIENT.items():
    client_app.command(name)(command)
client_app.add_typer(policy_app, name="policy")
client_app.add_typer(ledger_app, name="ledger")
app.add_typer(client_app, name="client")


@app.callback(invoke_without_command=True)
def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
    """Fine-tune a language model together; every record stays within its own walls."""
    if version:
        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Run the command line; an expected error is one line and an exit code, never a traceback."""
    # Flower reads these at import; a federation of hospitals calls nobody
    os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
    os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
    logging.basicConfig(level=logging.ERROR, format="%(levelname)s %(name)s: %(message)s")
    try:
        app()
    except IntramuralError as error:
        typer.echo(f"intramural: {error}", err=True)
        sys.exit(error.exit_code)
    except SystemExit as end:  # typer makes this of a KeyboardInterrupt, without a word
        if end.code == INTERRUPTED:
            line = "intramural: stopped; the last committed round is kept, add --resume"
            typer.echo(line, err=True)
        raise


if __name__ == "__main__":
    main()
