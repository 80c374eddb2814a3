"""`intramural`, `python -m intramural`: the command line, put together from the floors."""

import logging
import os
import sys

import typer

from intramural import __version__
from intramural.client.ledger_cli import ledger_app
from intramural.core.errors import IntramuralError
from intramural.privacy.cli import privacy_app
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
client_app = typer.Typer(
    help="At a site: its privacy ledger.\n\nExample: intramural client ledger show site.toml",
    no_args_is_help=True,
)
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
