"""Asking: what a command asks the person before it, a passphrase or a comparison by voice.

All of it goes to the standard error stream, so that `--json` leaves one object on the other.
"""

import os

import click
import typer

from intramural.core.errors import ConfigError, TrustError
from intramural.trust.keys import (
    FINGERPRINT_GROUPS,
    GROUP_DIGITS,
    PASSPHRASE,
    fingerprint,
    same_fingerprint,
)

TYPED_GROUPS = 2

ASK_PASSPHRASE = typer.Option(
    "--passphrase", help="Ask for the keys' passphrase; INTRAMURAL_PASSPHRASE answers unasked."
)
FINGERPRINT = typer.Option(
    "--fingerprint", help="All 8 groups as the other side reads them aloud; nothing is asked then."
)
JSON = typer.Option("--json", help="Print one JSON object.")


def passphrase_of_environment() -> str | None:
    """Return the passphrase that INTRAMURAL_PASSPHRASE holds; None when it is unset or empty."""
    return os.environ.get(PASSPHRASE) or None


def ask_passphrase(asked: bool, *, new: bool = False) -> str | None:
    """Return the keys' passphrase.

    Args:
        asked: The person wants to be asked, unless the environment holds it.
        new: The keys are made now, so that it is asked for twice.

    Returns:
        None where neither the environment nor the person gives one.

    Raises:
        ConfigError: Nobody is there to answer.
    """
    known = passphrase_of_environment()
    if known is not None or not asked:
        return known
    try:
        found: str = typer.prompt("passphrase", hide_input=True, confirmation_prompt=new, err=True)
    except click.Abort:
        raise ConfigError(f"no passphrase was given; set {PASSPHRASE}") from None
    return found


def ask_to_type(public: bytes, *, told: str | None, whose: str) -> None:
    """Have the person compare a fingerprint by voice; two groups are typed, the rest is shown.

    What is typed is not on the screen, so that it can come from the voice alone.

    Args:
        public: The key whose fingerprint it is.
        told: All groups, as an option gave them; then nothing is asked.
        whose: Who reads it aloud, such as "site 'st-elsewhere'".

    Raises:
        TrustError: The fingerprints differ, or nobody compared them.
    """
    if told is None:
        groups = fingerprint(public).split()
        blank = ["....."] * TYPED_GROUPS
        typer.echo(f"fingerprint: {' '.join(blank + groups[TYPED_GROUPS:])}", err=True)
        typer.echo(
            f"Call {whose}, on a number that you know, and have all {FINGERPRINT_GROUPS} groups "
            f"read aloud. Compare the last {FINGERPRINT_GROUPS - TYPED_GROUPS} with those above.",
            err=True,
        )
        typed = _answer(f"type the first {TYPED_GROUPS} groups", whose)
        is_all = sum(map(str.isdigit, typed)) > TYPED_GROUPS * GROUP_DIGITS
        told = typed if is_all else " ".join([typed, *groups[TYPED_GROUPS:]])
    _compare(public, told, whose)


def ask_to_confirm(public: bytes, *, told: str | None, whose: str) -> None:
    """Have the person compare a fingerprint by voice and say yes; see `ask_to_type`."""
    if told is not None:
        _compare(public, told, whose)
        return
    typer.echo(f"fingerprint: {fingerprint(public)}", err=True)
    typer.echo(
        f"Call {whose}, on a number that you know, and compare all {FINGERPRINT_GROUPS} groups.",
        err=True,
    )
    if _answer("are they the same? type yes or no", whose).strip().lower() != "yes":
        raise TrustError(
            f"fingerprint of {whose} was not confirmed; nothing was changed, ask for the file again"
        )


def _answer(question: str, whose: str) -> str:
    try:
        found: str = typer.prompt(question, err=True)
    except click.Abort:
        raise TrustError(
            f"fingerprint of {whose} was not compared; give --fingerprint where nobody can type"
        ) from None
    return found


def _compare(public: bytes, told: str, whose: str) -> None:
    if not same_fingerprint(public, told):
        raise TrustError(
            f"fingerprint of {whose} is another one than was told: the file may have been "
            "exchanged on its way; nothing was changed, ask for it again"
        )
