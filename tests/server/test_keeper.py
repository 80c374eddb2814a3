"""Orders and their keeper: what is wanted is submitted, whatever died; what is over is left."""

import json
import os
from pathlib import Path

import pytest
import tomli_w

from intramural.core.errors import ConfigError, Interrupted, RoundRefused, TrustError
from intramural.core.files import exclusive
from intramural.core.journal import Journal
from intramural.server.follow import follow
from intramural.server.keeper import PAUSE_S, START_S, Keeper
from intramural.server.orders import Order, order_named, orders, place_order
from intramural.server.settings import Coordinator
from intramural.server.standing import federation_of, run_standing, verify_run
from intramural.trust.keys import read_public
from tests.server.fakes import Seen
from tests.tiny import federation, table

FLWR = """#!/bin/sh
# A flwr that notes what it is asked and answers as Flower does.
echo "$@" >> "$FLWR_HOME/calls"
if [ -e "$FLWR_HOME/broken" ]; then
  echo '{"success": false, "error-message": "no link"}'
  exit 1
fi
count=$(grep -c '^run' "$FLWR_HOME/calls")
echo "{\\"success\\": true, \\"run-id\\": \\"$count\\"}"
"""


class Time:
    """A clock that the test turns."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Return a coordinator's folder with keys."""
    from intramural.server.founding import init_coordinator

    folder = tmp_path / "coordinator"
    init_coordinator(folder, Coordinator(name="tiny", host="127.0.0.1"))
    return folder


@pytest.fixture
def flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Put a flwr of our own on the PATH; return the home that it notes its calls in."""
    binaries, flower_home = tmp_path / "bin", tmp_path / "flower"
    binaries.mkdir()
    flower_home.mkdir()
    (binaries / "flwr").write_text(FLWR)
    (binaries / "flwr").chmod(0o755)
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}{os.environ['PATH']}")
    return flower_home


def placed(home: Path, name: str | None = None) -> Order:
    file = home.parent / "federation.toml"
    file.write_text(tomli_w.dumps(table(Path("base"))))
    return place_order(home, file, name=name, models={"base": "/models/base"}, passphrase=None)


def keeper_of(home: Path, flower: Path) -> tuple[Keeper, Time]:
    clock = Time()
    return Keeper(home, {"FLWR_HOME": str(flower)}, clock=clock), clock


def calls(flower: Path) -> list[str]:
    file = flower / "calls"
    return [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []


def test_an_order_holds_the_signed_manifest_of_its_federation(home: Path) -> None:
    order = placed(home)
    assert order.name == "tiny-1"
    assert order.standing == "wanted"
    assert federation_of(order) == federation(Path("base"))
    assert order.places == {"base": "/models/base"}
    assert placed(home).name == "tiny-2"
    assert [found.name for found in orders(home)] == ["tiny-1", "tiny-2"]


def test_a_name_that_is_taken_or_unknown_is_refused(home: Path) -> None:
    placed(home, "autumn")
    with pytest.raises(ConfigError, match="there is such a run"):
        placed(home, "autumn")
    with pytest.raises(ConfigError, match="no run 'spring'; there are: autumn"):
        order_named(home, "spring")


def test_what_is_wanted_is_submitted_once_with_its_manifest(home: Path, flower: Path) -> None:
    order = placed(home)
    keeper, clock = keeper_of(home, flower)
    keeper.tend()
    clock.now_s += START_S - 1
    keeper.tend()  # it may still be starting
    assert calls(flower) == ["run"]
    settings = (order.folder / "bundle" / "run.toml").read_text()
    assert "payloadType" in settings
    assert str(home) in settings


def test_a_run_that_somebody_works_on_is_left_alone(home: Path, flower: Path) -> None:
    order = placed(home)
    keeper, clock = keeper_of(home, flower)
    keeper.tend()
    with exclusive(order.folder / "run.lock"):
        for _ in range(5):
            clock.now_s += START_S
            keeper.tend()
    assert calls(flower) == ["run"]


def test_a_run_whose_process_died_is_submitted_again(home: Path, flower: Path) -> None:
    order = placed(home)
    keeper, clock = keeper_of(home, flower)
    keeper.tend()
    with exclusive(order.folder / "run.lock"):
        keeper.tend()
    keeper.tend()
    assert calls(flower) == ["run"]  # not at once: Flower notices a death later than we do
    clock.now_s += PAUSE_S
    keeper.tend()
    assert calls(flower) == ["run", "stop", "run"]


def test_a_new_superlink_gets_the_run_at_once(home: Path, flower: Path) -> None:
    placed(home)
    keeper, _ = keeper_of(home, flower)
    keeper.tend()
    keeper.superlink_started()
    keeper.tend()
    assert calls(flower) == ["run", "run"]


def test_a_link_that_answers_nothing_is_tried_again_later(home: Path, flower: Path) -> None:
    placed(home)
    (flower / "broken").touch()
    keeper, clock = keeper_of(home, flower)
    keeper.tend()
    keeper.tend()
    assert calls(flower) == ["run"]
    (flower / "broken").unlink()
    clock.now_s += PAUSE_S
    keeper.tend()
    assert calls(flower) == ["run", "run"]


def test_a_disk_that_refuses_is_tried_again_later(home: Path, flower: Path) -> None:
    order = placed(home)
    (order.folder / "bundle").write_text("in the way")  # as a full disk: writing below it fails
    keeper, clock = keeper_of(home, flower)
    keeper.tend()
    assert calls(flower) == []
    (order.folder / "bundle").unlink()
    clock.now_s += PAUSE_S
    keeper.tend()
    assert calls(flower) == ["run"]


def test_a_run_that_is_over_or_stopped_is_not_submitted(home: Path, flower: Path) -> None:
    over, stopped = placed(home), placed(home)
    keeper, clock = keeper_of(home, flower)
    keeper.tend()
    over.end(error=None, exit_code=0)
    stopped.want(wanted=False)
    for _ in range(3):
        clock.now_s += 10 * START_S
        keeper.tend()
    assert calls(flower) == ["run", "run", "stop"]
    assert (over.standing, stopped.standing) == ("finished", "stopped")
    stopped.want(wanted=True)
    keeper.tend()
    assert calls(flower)[3:] == ["run"]


def test_following_tells_rounds_and_raises_what_the_run_ended_with(home: Path) -> None:
    order, seen = placed(home), Seen()
    journal = Journal(order.folder / "journal.jsonl")
    journal.append("committed", digest="sha256:1", round=1, metrics={}, sites=["a"])
    journal.close()
    order.end(error="0 of 2 sites can take part", exit_code=3)
    with pytest.raises(RoundRefused, match="tiny-1: 0 of 2 sites") as caught:
        follow(order, seen)
    assert caught.value.exit_code == 3
    assert [record["round"] for record in seen.records] == [1]
    order.want(wanted=False)
    (order.folder / "outcome.json").unlink()
    with pytest.raises(Interrupted, match="stopped"):
        follow(order, seen)
    order.want(wanted=True)
    order.end(error=None, exit_code=0)
    assert follow(order, seen)["error"] is None


def written(order: Order, rounds: list[int], manifest: str | None = None) -> None:
    journal = Journal(order.folder / "journal.jsonl")
    journal.append("started", manifest=manifest or federation_of(order).digest)
    for number in rounds:
        body = {"round": number, "sites": ["a", "b"], "metrics": {"loss": 1.0}}
        journal.append("committed", digest=f"sha256:{number}", **body)
    journal.close()


def test_a_run_stands_where_its_journal_says(home: Path) -> None:
    order = placed(home)
    assert run_standing(order)["committed"] == 0
    written(order, [1, 2])
    found = run_standing(order)
    assert (found["committed"], found["digest"]) == (2, "sha256:2")
    assert json.loads(json.dumps(found)) == found


def test_verify_proves_a_sound_run(home: Path) -> None:
    order, key = placed(home), read_public(home / "signing.pub")
    written(order, [1, 2])
    found = verify_run(order, key=key)
    assert (found["rounds"], found["entries"], found["checkpoint"]) == (2, 3, None)


@pytest.mark.parametrize("rounds", [[1, 3], [1, 1], [2]])
def test_verify_finds_gaps_and_doubles(home: Path, rounds: list[int]) -> None:
    order = placed(home)
    written(order, rounds)
    with pytest.raises(ConfigError, match="gaps or doubles"):
        verify_run(order, key=read_public(home / "signing.pub"))


def test_verify_finds_another_manifest_in_folder_or_journal(home: Path) -> None:
    order, key = placed(home), read_public(home / "signing.pub")
    written(order, [1], manifest="sha256:" + "0" * 64)
    with pytest.raises(TrustError, match="another manifest"):
        verify_run(order, key=key)
    envelope = json.loads(order.envelope)
    envelope["payload"] = envelope["payload"][:-8] + "AAAAAAA="
    (order.folder / "manifest.json").write_text(json.dumps(envelope))
    with pytest.raises(TrustError):
        verify_run(order, key=key)
