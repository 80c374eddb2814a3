"""Bindings: who may speak under which node key, and what looks like one identity used twice."""

import base64
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from intramural.core.errors import TrustError
from intramural.core.files import write_atomic
from intramural.core.journal import utc_now
from intramural.server.bindings import KEYS_PER_SITE_MAX, LAST_WORDS_S, SILENCE_S, Bindings
from intramural.trust.alerts import Alerts
from intramural.trust.denial import Denied
from intramural.trust.proxy import DEACTIVATE, REGISTER, UNREGISTER

PULL = "pull-messages"


def key(name: str) -> str:
    """Return a node key's header; its bytes are as good as a real one's here."""
    return base64.b64encode(name.encode()).decode()


class Table:
    """Bindings with a clock to set, and what it told."""

    def __init__(self, path: Path, *, time_s: float = 100.0) -> None:
        self.time_s = time_s
        self.path = path
        self.alerts: list[dict[str, Any]] = []
        alerts = Alerts(self.alerts.append, now=utc_now)
        self.bindings = Bindings(path, alerts=alerts, clock=lambda: self.time_s)

    def ask(self, site: str, verb: str, name: str) -> str:
        """Ask as a gate does when SuperLink accepts all; return the denial's reason or ''."""
        try:
            self.bindings.admit(site, verb, key(name))
        except Denied as denied:
            return denied.reason
        self.bindings.accepted(site, verb, key(name))
        return ""

    def restarted(self) -> "Table":
        write_atomic(self.path, self.bindings.content())
        return Table(self.path, time_s=self.time_s)

    @property
    def words(self) -> list[tuple[str, str]]:
        return [(one["alert"], one["peer"]) for one in self.alerts]


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "bindings.json")


def test_a_key_is_its_sites_once_superlink_accepted_it(table: Table) -> None:
    assert table.ask("a", PULL, "1") == "unknown-key"
    table.bindings.admit("a", REGISTER, key("1"))  # and SuperLink refuses it
    assert table.ask("a", PULL, "1") == "unknown-key"
    assert table.ask("b", REGISTER, "1") == ""  # so it is nobody's yet
    assert table.ask("a", PULL, "1") == "foreign-key"
    assert table.ask("a", REGISTER, "1") == "foreign-key"
    assert table.ask("b", PULL, "1") == ""
    assert table.words == [("key-of-another-site", "a")]  # twice within a minute: told once


@pytest.mark.parametrize("header", ["", "not base64!", "YQ", "\xe9", key("x" * 2000)])
@pytest.mark.parametrize("verb", [REGISTER, PULL])
def test_a_header_that_holds_no_key_is_refused(table: Table, header: str, verb: str) -> None:
    with pytest.raises(Denied, match="no-key"):
        table.bindings.admit("a", verb, header)


def test_a_second_node_waits_until_the_first_is_silent(table: Table) -> None:
    assert table.ask("a", REGISTER, "1") == ""
    table.time_s += 7
    assert table.ask("a", PULL, "1") == ""
    table.time_s += SILENCE_S - 0.1
    assert table.ask("a", REGISTER, "2") == "second-node"
    assert table.ask("a", REGISTER, "1") == ""  # the first, whose answer was lost, tries again
    assert table.ask("b", REGISTER, "3") == ""  # and other sites are not concerned
    assert table.ask("a", PULL, "2") == "unknown-key"
    table.time_s += SILENCE_S
    assert table.ask("a", REGISTER, "2") == ""
    assert table.ask("a", PULL, "2") == ""
    assert table.words == [("second-node", "a")]
    assert table.alerts[0]["silent_s"] == SILENCE_S - 0.1


def test_asking_in_vain_does_not_keep_the_first_alive(table: Table) -> None:
    table.ask("a", REGISTER, "1")
    answers = []
    for _ in range(4):
        table.time_s += 3
        answers.append(table.ask("a", REGISTER, "2"))
    assert answers == ["second-node"] * 3 + [""]  # after 3, 6, 9 and 12 s


def test_a_node_that_was_replaced_may_only_say_goodbye_and_is_told_of(table: Table) -> None:
    table.ask("a", REGISTER, "1")
    table.time_s += SILENCE_S
    table.ask("a", REGISTER, "2")
    assert [table.ask("a", verb, "1") for verb in (DEACTIVATE, UNREGISTER)] == ["", ""]
    assert table.words == []
    assert table.ask("a", PULL, "1") == "superseded-key"
    assert table.words == [("replaced-node-speaks", "a")]
    assert table.ask("a", PULL, "2") == ""


def test_a_node_that_said_goodbye_leaves_its_place_at_once(table: Table) -> None:
    table.ask("a", REGISTER, "1")
    assert table.ask("a", DEACTIVATE, "1") == ""
    assert table.ask("a", REGISTER, "2") == "second-node"
    assert table.ask("a", UNREGISTER, "1") == ""
    assert table.ask("a", REGISTER, "2") == ""
    assert table.ask("a", PULL, "1") == "superseded-key"


@pytest.mark.parametrize("restarted", [False, True])
def test_a_pull_that_was_under_way_at_the_goodbye_alarms_nobody(
    table: Table, restarted: bool
) -> None:
    table.ask("a", REGISTER, "1")
    assert [table.ask("a", verb, "1") for verb in (PULL, DEACTIVATE, UNREGISTER)] == [""] * 3
    if restarted:
        assert table.ask("a", REGISTER, "2") == ""
    table.time_s += LAST_WORDS_S - 0.1
    assert table.ask("a", PULL, "1") == "superseded-key"
    assert table.words == []
    table.time_s += 0.1  # no gate holds a pull for so long
    assert table.ask("a", PULL, "1") == "superseded-key"
    assert table.words == [("replaced-node-speaks", "a")]


def test_a_goodbye_excuses_neither_other_nodes_nor_the_same_one_come_back(table: Table) -> None:
    table.ask("a", REGISTER, "1")
    table.time_s += SILENCE_S
    table.ask("a", REGISTER, "2")
    table.ask("a", UNREGISTER, "2")
    assert table.ask("a", PULL, "1") == "superseded-key"  # it never said goodbye
    assert table.words == [("replaced-node-speaks", "a")]
    table.ask("b", REGISTER, "3")
    table.ask("b", UNREGISTER, "3")
    table.ask("b", REGISTER, "3")
    assert table.ask("b", PULL, "3") == ""
    table.time_s += SILENCE_S
    table.ask("b", REGISTER, "4")
    assert table.ask("b", PULL, "3") == "superseded-key"
    assert table.words[1:] == [("replaced-node-speaks", "b")]


def test_a_restart_forgets_nobody(table: Table) -> None:
    table.ask("a", REGISTER, "1")
    table.ask("b", REGISTER, "2")
    again = table.restarted()
    assert again.ask("a", PULL, "1") == ""
    assert again.ask("a", PULL, "2") == "foreign-key"
    later = again.restarted()
    assert later.ask("b", REGISTER, "3") == "second-node"  # the first may speak in a moment
    later.time_s += SILENCE_S
    assert later.ask("b", REGISTER, "3") == ""
    assert later.ask("b", PULL, "2") == "superseded-key"


def test_a_site_that_restarts_often_fills_no_memory(table: Table) -> None:
    for number in range(50):
        assert table.ask("a", REGISTER, str(number)) == ""
        if number < 49:
            assert table.ask("a", UNREGISTER, str(number)) == ""
        table.time_s += SILENCE_S
    assert len(table.bindings._site_of) == KEYS_PER_SITE_MAX
    assert len(table.bindings._left) == KEYS_PER_SITE_MAX - 1
    assert len(table.bindings.content()) < 100 * KEYS_PER_SITE_MAX
    assert table.ask("a", PULL, "49") == ""
    assert table.ask("a", PULL, "48") == "superseded-key"
    assert table.ask("a", PULL, "0") == "unknown-key"


DAMAGES: dict[str, Callable[[Path], object]] = {
    "is damaged": lambda path: path.write_text('{"sites": {"a": ["1"]'),
    "is damaged;": lambda path: path.write_text('{"sites": {"a": 1}}'),
    "one key to two sites": lambda path: path.write_text('{"sites": {"a": ["1"], "b": ["1"]}}'),
    "cannot read": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_table_stops_the_gate_and_is_named(tmp_path: Path, message: str) -> None:
    path = tmp_path / "bindings.json"
    DAMAGES[message](path)
    with pytest.raises(TrustError, match=rf"bindings\.json: .*{message}"):
        Table(path)
