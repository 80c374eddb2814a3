"""coordinator.toml, and the two files that `server init` writes for people to edit."""

from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from intramural.core.config import check_config, load_config
from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.privacy.plan import PrivacyPlan
from intramural.server.settings import Coordinator, CoordinatorConfig, load_coordinator
from intramural.server.starter import coordinator_toml, federation_toml


def settings(**changes: Any) -> Coordinator:
    table = {"name": "icd", "host": "fl.example.org"} | changes
    return check_config({"coordinator": table}, CoordinatorConfig, source="test").coordinator


@pytest.mark.parametrize(
    "host", ["fl.example.org", "a", "xn--bcher-kva.example", "10.0.0.3", "fd00::7", "::1", "1a.b2"]
)
def test_a_host_is_a_name_or_an_address(host: str) -> None:
    assert settings(host=host).host == host


def test_an_address_has_one_spelling() -> None:
    assert settings(host="FD00:0::7").host == "fd00::7"


@pytest.mark.parametrize(
    "host",
    [
        "",
        "FL.example.org",
        "fl.example.org:8443",
        "https://fl.example.org",
        "fl.example.org.",
        "-a.b",
        "a-.b",
        "a..b",
        "a_b",
        "a b",
        "bücher.example",
        "10.0.0.300",
        "0.0.0.0",
        "::",
        "fe80::1%eth0",
        "x" * 64,
        ".".join(["x" * 63] * 4),
        "a\n",
    ],
)
def test_other_hosts_are_refused_by_key(host: str) -> None:
    with pytest.raises(ConfigError, match=r"test: coordinator\.host: must be"):
        settings(host=host)


@given(st.text(alphabet="aZ0-._:/% é", max_size=12))
def test_a_host_that_passes_fits_a_certificate(host: str) -> None:
    try:
        found = settings(host=host).host
    except ConfigError:
        return
    try:
        x509.DNSName(found)
    except ValueError:
        raise AssertionError(host) from None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"listen": "localhost"}, r"coordinator\.listen: must be an IP address"),
        ({"port": 0}, r"coordinator\.port: "),
        ({"port": 65536}, r"coordinator\.port: "),
        ({"port": "8443"}, r"coordinator\.port: "),
        ({"superlink_port": 8443}, "must differ"),
        ({"name": "ICD"}, r"coordinator\.name: "),
        ({"ports": 1}, "did you mean 'port'"),
    ],
)
def test_other_keys_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**changes)


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    for made in (settings(), settings(host="fd00::7", listen="::", port=1, superlink_port=2)):
        (tmp_path / "coordinator.toml").write_text(coordinator_toml(made))
        assert load_coordinator(tmp_path) == made


def test_a_folder_without_settings_is_wrong_use(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"coordinator\.toml: cannot read") as found:
        load_coordinator(tmp_path)
    assert found.value.exit_code == 2


def test_the_federation_to_edit_is_well_formed_and_private(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(federation_toml("icd"))
    config = load_config(path, FederationConfig)
    assert config.federation.name == "icd"
    assert PrivacyPlan.of(config).cost() <= 8.0
