"""A federation outside the matrix is refused by every command that plans a run, before any file."""

from pathlib import Path
from typing import Any

import pytest
import tomli_w
from typer.testing import CliRunner

from intramural.__main__ import app
from intramural.core.errors import ConfigError
from tests.simulations.sweeps import sweep_of
from tests.tiny import rows, site, table

PRIVACY = {
    "unit": "record",
    "noise_multiplier": 1.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 100,
}
DITTO = {"kind": "ditto", "steps": 1}
OUTSIDE: list[tuple[dict[str, Any], str]] = [
    ({"strategy": {"rule": "median"}, "exchange": {"rank_min": 1}}, "use 'flexlora', or leave exc"),
    ({"strategy": {"rule": "median", "hostile_max": 2}}, "needs 5 updates a round"),
    ({"strategy": {"rule": "fedsvd"}, "personal": DITTO}, "sets them anew each round"),
    ({"privacy": PRIVACY, "personal": DITTO}, r"which \[privacy\] does not cover"),
]


@pytest.mark.parametrize("command", ["check", "server run", "simulate"])
@pytest.mark.parametrize(("sections", "message"), OUTSIDE)
def test_it_is_refused(
    tmp_path: Path, command: str, sections: dict[str, Any], message: str
) -> None:
    file, out = tmp_path / "federation.toml", tmp_path / "out"
    file.write_text(tomli_w.dumps(table(Path("base"), **sections)))
    words = [*command.split(), str(file)]
    if command == "server run":
        words += ["--dir", str(out)]
    elif command == "simulate":
        template = site(tmp_path, "a", rows()[:40], policy={"require_privacy": False})
        words += ["--data", str(template), "--sites", "4", "--out", str(out)]
    with pytest.raises(ConfigError, match=message):
        CliRunner().invoke(app, words, catch_exceptions=False)
    assert not out.exists()


def test_a_sweep_names_the_cells_that_are_outside_before_one_is_run(tmp_path: Path) -> None:
    text = '[sweep]\nkind = "grid"\n[parameters]\nexchange.rank_min = [1, 2]\n'
    with pytest.raises(
        ConfigError, match=r"'fedavg' does not go with exchange\.rank_min.*flexlora"
    ):
        sweep_of(tmp_path, text)
