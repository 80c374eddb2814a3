"""Policy: the site's own limits win."""

from pathlib import Path

import pytest

from intramural.client.policy import check_manifest, check_records
from intramural.core.errors import Refused
from intramural.core.federation import FederationConfig
from intramural.core.site import SitePolicy
from tests.tiny import Json, federation

PRIVACY = {
    "unit": "record", "epsilon": 8.0, "delta": 1e-5, "clip_norm": 1.0, "nominal_records": 2000
}  # fmt: skip


def made(**sections: Json) -> FederationConfig:
    return federation(Path("base"), **sections)


def policy(**keys: object) -> SitePolicy:
    return SitePolicy.model_validate(keys)


def test_a_federation_within_the_limits_passes() -> None:
    check_manifest(policy(require_privacy=False), made())
    check_manifest(policy(), made(privacy=PRIVACY))
    check_manifest(policy(), made(privacy=PRIVACY, exchange={"kind": "head"}))
    check_manifest(
        policy(require_privacy=False, exchange=["lora", "full"]), made(exchange={"kind": "full"})
    )


@pytest.mark.parametrize(
    ("limits", "config", "words"),
    [
        (policy(), made(), r"policy\.require_privacy is true and the federation has no"),
        (
            policy(require_privacy=False),
            made(exchange={"kind": "full"}),
            r"policy\.exchange allows \['lora', 'head'\], the federation exchanges 'full'",
        ),
    ],
)
def test_a_federation_outside_the_limits_is_refused(
    limits: SitePolicy, config: FederationConfig, words: str
) -> None:
    with pytest.raises(Refused, match=words) as caught:
        check_manifest(limits, config)
    assert caught.value.exit_code == 3


def test_too_few_records_are_refused_and_their_count_is_not_told() -> None:
    check_records(policy(records_min=200), 200)
    with pytest.raises(Refused, match=r"fewer training records than its policy\.records_min") as e:
        check_records(policy(records_min=200), 199)
    assert not any(character.isdigit() for character in str(e.value))
