"""What a round may carry, where an update is a part of what came."""

from intramural.client.policy import bytes_a_round
from tests.client.test_policy import bare, keys_of, made
from tests.tiny import Json


def test_an_update_that_is_smaller_than_what_came_counts_as_what_it_is() -> None:
    config = made(strategy={"rule": "ffa-lora"})
    assert bytes_a_round(config, 1000, 400) == 2400  # down twice, and up
    known: Json = {"vector_bytes": 1000, "up_bytes": 400}
    assert keys_of(bare(bytes_per_round_max=2400), config, **known) == []
    refused = keys_of(bare(bytes_per_round_max=2399), config, **known)
    assert refused == ["policy.bytes_per_round_max"]
