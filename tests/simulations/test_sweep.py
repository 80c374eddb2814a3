"""A sweep's runs: finished cells stay, dead ones get one more chance, a stopped sweep goes on."""

import signal
from pathlib import Path

import pytest

from intramural.core.errors import ConfigError
from intramural.core.files import exclusive
from intramural.simulations.sweep import LOCK, LOG, folder_of
from tests.simulations.sweeps import RATES, Script, ran, sweep_of


def test_every_cell_runs_once_and_finished_cells_never_again(tmp_path: Path) -> None:
    _, cells = sweep_of(tmp_path)
    script = Script()
    results, told = ran(cells, tmp_path / "out", script)
    assert [r.state for r in results] == ["done"] * 3
    assert script.started == [1, 2, 3]
    assert told[:2] == ["1 started", "1 done"]
    results, told = ran(cells, tmp_path / "out", script)
    assert script.started == [1, 2, 3]
    assert told == ["1 kept", "2 kept", "3 kept"]
    assert [r.report["rounds"][-1]["metrics"]["macro_f1"] for r in results] == [0.1, 0.2, 0.3]


def test_a_cell_keeps_its_folder_when_a_new_value_shifts_its_number(tmp_path: Path) -> None:
    _, cells = sweep_of(tmp_path)
    ran(cells, tmp_path / "out", Script())
    before = {cell.digest: folder_of(cell, tmp_path / "out") for cell in cells}
    _, more = sweep_of(tmp_path, RATES.replace("[0.1,", "[0.05, 0.1,"))
    script = Script()
    ran(more, tmp_path / "out", script)
    assert script.started == [1]  # 0.05 alone is new
    assert all(folder_of(cell, tmp_path / "out") == before[cell.digest] for cell in more[1:])


def test_a_cell_that_dies_once_goes_on_and_one_that_dies_twice_is_reported(tmp_path: Path) -> None:
    _, cells = sweep_of(tmp_path)
    script = Script({1: [-9], 2: [-9, 1]})
    results, told = ran(cells, tmp_path / "out", script)
    assert script.started == [1, 1, 2, 2, 3]
    assert [r.state for r in results] == ["done", "failed", "done"]
    lives = [["started", "again", "done"], ["started", "again", "failed"], ["started", "done"]]
    assert told == [f"{n} {what}" for n, life in enumerate(lives, start=1) for what in life]
    assert results[1].reason.startswith("exit code 1; see 002-")
    results, _ = ran(cells, tmp_path / "out", script)  # later it has its two chances anew
    assert [r.state for r in results] == ["done"] * 3


@pytest.mark.parametrize("code", [2, 3])
def test_wrong_use_and_a_refusal_are_not_tried_again(tmp_path: Path, code: int) -> None:
    _, cells = sweep_of(tmp_path)
    log = folder_of(cells[0], tmp_path / "out") / LOG
    log.parent.mkdir(parents=True)
    log.write_text("Traceback: a record's text\nintramural: site-1: too few records\n")
    script = Script({1: [code]})
    results, _ = ran(cells, tmp_path / "out", script)
    assert script.started == [1, 2, 3]
    assert results[0].reason == "site-1: too few records"  # our own line, and nothing else's


def test_an_exit_without_a_report_is_no_success(tmp_path: Path) -> None:
    _, cells = sweep_of(tmp_path)

    def start(cell: object, folder: Path) -> object:
        fake = Script({1: [7]})(cells[0], folder)
        fake._code = 0
        return fake

    results, _ = ran(cells[:1], tmp_path / "out", start)  # type: ignore[arg-type]
    assert results[0].state == "failed"


def test_no_more_cells_run_at_once_than_workers(tmp_path: Path) -> None:
    _, cells = sweep_of(tmp_path)
    _, told = ran(cells, tmp_path / "out", Script(), workers=2)
    assert told[:2] == ["1 started", "2 started"]
    assert told.index("3 started") > told.index("1 done")


def test_a_stopped_sweep_stops_its_cells_as_ctrl_c_would(tmp_path: Path) -> None:
    _, cells = sweep_of(tmp_path)
    script = Script({1: [None], 2: [None]})

    def interrupt(_: float) -> None:
        raise KeyboardInterrupt

    from intramural.simulations.sweep import run_cells

    with pytest.raises(KeyboardInterrupt):
        run_cells(
            cells,
            tmp_path / "out",
            workers=2,
            start=script,
            tell=lambda *_: None,
            sleep=interrupt,
        )
    assert script.log == [f"cell {n} signal {int(signal.SIGINT)}" for n in (1, 2)]


def test_two_sweeps_do_not_share_a_folder(tmp_path: Path) -> None:
    _, cells = sweep_of(tmp_path)
    out = tmp_path / "out"
    with exclusive(out / LOCK), pytest.raises(ConfigError, match="another process sweeps"):
        ran(cells, out, Script())
