"""What a federation may not ask its sites to keep is refused by its keys, with what to do."""

from pathlib import Path

import pytest

from intramural.core.errors import ConfigError
from intramural.models.base import resolve_base
from intramural.models.loading import load_model
from intramural.models.personal_check import check_personal
from tests.models.test_private_training import PRIVACY
from tests.tiny import Json, federation

DITTO: Json = {"kind": "ditto", "steps": 2}
TUNED: Json = {"kind": "fine-tune", "steps": 2}
EQUAL: Json = {"weights": "equal"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"personal": DITTO}, None),
        ({"personal": TUNED, "strategy": {"rule": "flora"}}, None),
        ({"exchange": {"personal": ["classifier"]}, "privacy": PRIVACY, "strategy": EQUAL}, None),
        (
            {"personal": DITTO, "privacy": PRIVACY, "strategy": EQUAL},
            r"remove \[personal\], or use exchange.personal",
        ),
        (
            {"strategy": {"rule": "scaffold"} | EQUAL, "privacy": PRIVACY},
            "use 'fedavg' with training.proximal",
        ),
        ({"personal": TUNED, "exchange": {"personal": ["classifier"]}}, "keep one of the two"),
        ({"personal": TUNED, "strategy": {"rule": "fedsa-lora"}}, "keep one of the two"),
        ({"personal": DITTO, "strategy": {"rule": "fedsvd"}}, "use 'fine-tune'"),
        ({"personal": DITTO, "strategy": {"rule": "flora"}}, "use 'fine-tune'"),
    ],
)
def test_what_does_not_go_together_is_refused(bert: Path, sections: Json, said: str | None) -> None:
    config = federation(bert, **sections)
    if said is None:
        check_personal(config)
        return
    with pytest.raises(ConfigError, match=said):
        check_personal(config)
    with pytest.raises(ConfigError, match=said):  # so at the coordinator, before a round
        load_model(config, resolve_base(str(bert)), device="cpu")
