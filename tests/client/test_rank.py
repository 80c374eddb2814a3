"""compute.rank: a site trains a smaller adapter, where the federation lets it."""

from pathlib import Path

import numpy as np
import pytest

from intramural.client.agent import SiteAgent
from intramural.client.foresight import foresee
from intramural.client.rank import rank_of
from intramural.core.errors import Refused
from intramural.core.messages import Refusal, Reply, TrainRequest, Update
from intramural.core.site import SiteConfig, load_site
from intramural.models import resident
from intramural.models.resident import resident_model
from tests.tiny import Json, federation, rows, site

PRIVACY: Json = {
    "unit": "record",
    "noise_multiplier": 2.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 60,
}


def made(folder: Path, rank: int | None, name: str = "a") -> SiteConfig:
    compute: Json = {} if rank is None else {"compute": {"rank": rank}}
    return load_site(site(folder, name, rows()[:40], **compute))


def train(of: SiteAgent) -> Reply:
    vector = np.random.default_rng(0).normal(size=of.layout.size).astype(np.float32)
    return of.answer(
        TrainRequest(manifest=of.federation.digest, round=1, layout=of.layout.digest, vector=vector)
    )


@pytest.mark.parametrize(
    ("exchange", "rank", "said"),
    [
        ({"rank": 8, "rank_min": 2}, 2, None),
        ({"rank": 8, "rank_min": 2}, 8, None),
        ({"rank": 8}, 8, None),
        ({"kind": "head"}, 4, None),  # which has no adapter
        ({"rank": 8, "rank_min": 2}, 1, "change compute.rank in site.toml"),
        ({"rank": 8, "rank_min": 2}, 9, "from exchange.rank_min = 2 to exchange.rank = 8"),
        ({"rank": 8}, 4, "set exchange.rank_min in federation.toml"),
    ],
)
def test_a_rank_outside_the_federation_s_bounds_is_refused_with_what_to_do(
    tmp_path: Path, exchange: Json, rank: int, said: str | None
) -> None:
    config, own = federation(Path("nowhere"), exchange=exchange), made(tmp_path, rank)
    found = [v for v in foresee(own, config).violations if v.key == "compute.rank"]
    if said is None:
        rank_of(own, config)
        assert not found
        return
    with pytest.raises(Refused, match=f"^compute.rank allows rank {rank}") as told:
        rank_of(own, config)
    assert said in str(told.value)
    assert [str(violation) for violation in found] == [str(told.value)]


def test_a_refused_rank_is_an_answer(tmp_path: Path, bert: Path) -> None:
    config = federation(bert, exchange={"rank": 4, "rank_min": 2})
    of = SiteAgent(made(tmp_path, None), config)
    layout = of.layout  # as the coordinator has it
    small = SiteAgent(made(tmp_path, 1, "b"), config)
    vector = np.zeros(layout.size, dtype=np.float32)
    reply = small.answer(
        TrainRequest(manifest=config.digest, round=1, layout=layout.digest, vector=vector)
    )
    assert isinstance(reply, Refusal)
    assert reply.reason == "refused"
    assert "compute.rank" in reply.detail


@pytest.mark.parametrize("private", [False, True])
def test_sites_of_several_ranks_share_a_process_and_a_layout(
    tmp_path: Path, bert: Path, private: bool
) -> None:
    sections: Json = {"privacy": PRIVACY, "strategy": {"weights": "equal"}} if private else {}
    config = federation(bert, exchange={"rank": 8, "rank_min": 1}, **sections)
    resident.forget_models()
    agents = [SiteAgent(made(tmp_path, r, f"s{r}"), config) for r in (1, 2, 4)]
    models = [of.resident() for of in agents]
    assert [of.resident() for of in agents] == models  # one for each rank, kept
    assert len({of.layout.digest for of in agents}) == 1
    for of, rank in zip(agents, (1, 2, 4), strict=True):
        update = train(of)
        assert isinstance(update, Update), update
        start = np.random.default_rng(0).normal(size=of.layout.size).astype(np.float32)
        after = update.delta + start
        for name, values in of.layout.unflatten(after).items():
            if "lora_A" in name:
                assert values[:rank].all()
                assert not values[rank:].any()
            elif "lora_B" in name:
                assert values[:, :rank].all()
                assert not values[:, rank:].any()
    if private:  # whose guards looked at the sites' own models, and built no other
        assert {rank for _, rank in resident._resident} == {1, 2, 4}
        assert all(len(of._guarded().ledger.charges) == 1 for of in agents)
    assert [of.resident() for of in agents] == models


def test_another_federation_s_models_make_room(bert: Path) -> None:
    config = federation(bert, exchange={"rank": 4, "rank_min": 1})
    first = resident_model(config, places={}, device="cpu", rank=1)
    second = resident_model(config, places={}, device="cpu", rank=2)
    fresh = resident_model(config, places={}, device="cpu", rank=2, fresh=True)
    assert fresh is not second
    assert resident_model(config, places={}, device="cpu", rank=1) is first
    other = federation(bert, exchange={"rank": 4, "rank_min": 1}, strategy={"rule": "ffa-lora"})
    resident_model(other, places={}, device="cpu", rank=1)
    assert resident_model(config, places={}, device="cpu", rank=1) is not first
