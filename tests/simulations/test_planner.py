"""The planner: pencil and paper against hours, bytes, memory and epsilon; what it refuses."""

from pathlib import Path
from typing import Any

import pytest

from intramural.core.config import check_config
from intramural.core.errors import ConfigError, Refused
from intramural.core.federation import FederationConfig
from intramural.core.site import SitePolicy
from intramural.models.footprint import Footprint
from intramural.simulations.hardware import Hardware, load_hardware, this_machine
from intramural.simulations.plan_times import Phase, probe_of_report
from intramural.simulations.planner import Plan, plan_run, plan_words, probe_of
from tests.reference.pld import pld_epsilon
from tests.tiny import Json, federation

MB = 1_000_000
PRIVACY: Json = {
    "unit": "record",
    "noise_multiplier": 4.0,
    "delta": 1e-5,
    "clip_norm": 1.0,
    "nominal_records": 80,
}
OPEN = SitePolicy(require_privacy=False, exchange=("lora",))
NEED = Footprint(
    parameters=50 * MB,
    trained=1 * MB,
    weights_bytes=200 * MB,
    gradients_bytes=4 * MB,
    optimizer_bytes=8 * MB,
    activations_bytes=788 * MB,
)
"""1000 MB on the device, 12 MB of vectors in main memory, 4 MB a vector."""


def probe(*, sites: int = 2, seconds: tuple[float, float] = (30.0, 26.0), **more: Any) -> Json:
    """Return the report of two rounds; the second alone was evaluated.

    A site received 4 MB in the first round, sent 4 MB, and received 4 MB more in the second.
    """
    names = [f"site-{n + 1}" for n in range(sites)]
    down, up = 4 * MB * sites, 4 * MB * sites
    first = {"sites": names, "metrics": {}, "bytes_down": down, "bytes_up": up}
    second = first | {"metrics": {"accuracy": 0.5}, "bytes_down": 2 * down}
    rounds = [first | {"seconds": seconds[0]}, second | {"seconds": seconds[1]}]
    return {"rounds": rounds, "sites": [{"name": n, "train": 100} for n in names], **more}


def hardware(**sections: Any) -> Hardware:
    default = {"memory_gb": 16.0}
    return check_config({"default": default, **sections}, Hardware, source="hardware.toml")


def planned(
    config: FederationConfig, report: Json, machines: Hardware, *, policy: SitePolicy | None = None
) -> Plan:
    return plan_run(config, report, machines, need=NEED, policy=policy)


def ten(**sections: Json) -> FederationConfig:
    """Return ten rounds of two sites, evaluated after every fifth."""
    told: dict[str, Json] = {
        "federation": {"rounds": 10},
        "evaluation": {"every": 5},
        "sites": {"min": 2},
    }
    for name, keys in sections.items():
        told[name] = told.get(name, {}) | keys
    return federation(Path("base"), **told)


def test_the_first_round_tells_what_training_sends_and_the_second_what_evaluation_adds() -> None:
    told = probe_of_report(ten(), probe(seconds=(20.0, 26.0)))
    # two sites, one after another: 10 s of training each, and 3 s of evaluation
    assert told.train == Phase(down_bytes=4 * MB, up_bytes=4 * MB, compute_s=10.0)
    assert told.evaluate == Phase(down_bytes=4 * MB, up_bytes=0.0, compute_s=3.0)
    assert told.start_s == 0.0


def test_the_first_rounds_start_is_counted_once() -> None:
    told = probe_of_report(ten(), probe(seconds=(30.0, 26.0)))
    assert told.train.compute_s == 13.0  # 26 / 2: no round of the probe took less
    assert told.evaluate.compute_s == 0.0  # it is in there
    assert told.start_s == 4.0  # 30 - 26


def test_hours_on_slow_links_are_those_of_pencil_and_paper() -> None:
    slow = {
        "name": "slow",
        "memory_gb": 16.0,
        "relative_speed": 0.5,
        "up_mbit": 4.0,
        "down_mbit": 8.0,
        "latency_ms": 500.0,
    }
    plan = planned(ten(), probe(seconds=(20.0, 26.0)), hardware(site=[slow]))
    # training: 32 Mbit down at 8: 4 s; 10 s at half the speed: 20 s; 32 Mbit up at 4: 8 s; 0.5 s
    assert plan.train_s == pytest.approx(4 + 20 + 8 + 0.5)
    # evaluation: 4 s down, 3 s at half the speed, nothing up, 0.5 s
    assert plan.evaluate_s == pytest.approx(4 + 6 + 0.5)
    assert plan.evaluations == 3  # after rounds 5 and 10, and the last test
    assert plan.hours == pytest.approx((10 * 32.5 + 3 * 10.5) / 3600)
    by_name = {site.name: site for site in plan.sites}
    assert by_name["slow"].busy_s == pytest.approx(10 * 32.5 + 3 * 10.5)
    other = by_name["default-2"]
    assert other.busy_s == pytest.approx(10 * 10 + 3 * 3)  # no link, the probe's own speed
    assert other.down_bytes == 10 * 4 * MB + 3 * 4 * MB
    assert other.up_bytes == 10 * 4 * MB
    assert plan.hub_up_bytes == 2 * (52 * MB)
    assert plan.hub_down_bytes == 2 * (40 * MB)


def test_the_coordinators_link_is_shared_by_the_cohort() -> None:
    hub = {"up_mbit": 16.0, "down_mbit": 64.0}
    plan = planned(ten(), probe(seconds=(20.0, 26.0)), hardware(coordinator=hub))
    # two sites x 32 Mbit: 4 s out at 16, 1 s in at 64
    assert plan.train_s == pytest.approx(4 + 10 + 1)


def test_a_cohort_is_drawn_from_the_sites_and_may_be_the_slowest() -> None:
    machines = [
        {"name": f"site-{speed}", "memory_gb": 16.0, "relative_speed": float(speed)}
        for speed in (1, 2, 4, 5)
    ]
    config = ten(sites={"min": 2, "share": 0.5})
    plan = planned(config, probe(seconds=(20.0, 26.0)), hardware(site=machines))
    assert plan.train_s == pytest.approx(10.0)
    busy = {site.name: site.busy_s for site in plan.sites}
    assert busy["site-5"] == pytest.approx((10 * 2 + 3 * 0.6) / 2)  # in half the rounds


def test_rounds_that_were_all_evaluated_count_as_evaluated_rounds() -> None:
    report = probe()
    report["rounds"] = [entry | {"metrics": {"accuracy": 0.5}} for entry in report["rounds"]]
    plan = planned(ten(), report, hardware())
    assert (plan.train_s, plan.evaluate_s, plan.evaluations) == (13.0, 0.0, 0)
    assert plan.sites[0].down_bytes == 10 * 8 * MB


def test_with_local_epochs_the_largest_site_sets_the_pace() -> None:
    training: Json = {"local_epochs": 1, "local_steps": None}
    config = ten()
    config = config.model_copy(update={"training": config.training.model_copy(update=training)})
    report = probe(seconds=(20.0, 26.0))
    report["sites"] = [{"name": "site-1", "train": 300}, {"name": "site-2", "train": 100}]
    assert planned(config, report, hardware()).train_s == pytest.approx(15.0)  # 10 x 300 / 200


def test_memory_is_what_was_measured_else_what_is_estimated() -> None:
    gpu = {"name": "a", "device": "gpu", "memory_gb": 24.0}
    plan = planned(ten(), probe(), hardware(site=[gpu]))
    assert plan.sites[0].memory_bytes == 1000 * MB  # on the GPU
    assert plan.sites[1].memory_bytes == (500 + 1000 + 12) * MB  # runtime, device, vectors
    measured = planned(ten(), probe(peak_rss_bytes=900 * MB), hardware(site=[gpu]))
    assert [site.memory_bytes for site in measured.sites] == [1000 * MB, 900 * MB]
    assert plan.hub_memory_bytes == (500 + 200) * MB  # 8 vectors are 32 MB, the base model 200


def test_what_cannot_fit_is_refused_with_every_reason() -> None:
    small = {"name": "small", "device": "gpu", "memory_gb": 0.5}
    config = ten(sites={"min": 2, "deadline_s": 9.0})
    policy = OPEN.model_copy(update={"require_privacy": True})
    machines = hardware(site=[small], coordinator={"memory_gb": 0.1})
    with pytest.raises(ConfigError) as caught:
        planned(config, probe(), machines, policy=policy)
    lines = str(caught.value).splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == ["hardware.toml"] * 2 + [
        "sites.deadline_s"
    ]
    assert "small needs about 1.0 GB of GPU memory and has 0.5" in lines[0]
    assert "coordinator.memory_gb" in lines[1]
    assert "small, default-2 takes up to 13 s for training" in lines[2]
    assert "policy.require_privacy" in lines[3]
    assert caught.value.exit_code == 2


def test_a_quorum_closes_the_round_at_its_deadline_without_the_late_site() -> None:
    late = {"name": "late", "memory_gb": 16.0, "relative_speed": 0.1}  # 100 s, and 30 s
    config = ten(sites={"min": 2, "deadline_s": 40.0, "quorum": 0.5})
    plan = planned(config, probe(seconds=(20.0, 26.0)), hardware(site=[late]))
    assert plan.train_s == 40.0
    assert plan.evaluate_s == 30.0
    assert "late answers after sites.deadline_s" in plan.warnings[0]
    whole = ten(sites={"min": 2, "deadline_s": 40.0})
    with pytest.raises(ConfigError, match="2 of 2 answers may not come in time"):
        planned(whole, probe(seconds=(20.0, 26.0)), hardware(site=[late]))


def test_epsilon_is_that_of_one_run_and_above_the_policy_it_is_refused() -> None:
    config = ten(privacy=PRIVACY, strategy={"weights": "equal"})
    plan = planned(config, probe(), hardware(), policy=OPEN)
    expected = pld_epsilon((0.1, 4.0, 20), delta=1e-5)  # 8 of 80, 10 rounds of 2 steps
    assert plan.privacy is not None
    assert plan.privacy["epsilon"] == pytest.approx(expected, rel=1e-3)
    assert plan.privacy["epsilon_probe"] == pytest.approx(
        pld_epsilon((0.1, 4.0, 4), delta=1e-5), rel=1e-3
    )
    told = " ".join(plan_words(plan))
    assert "at delta 1e-05, one record, add-remove, poisson sampling" in told
    for limits in ({"epsilon_run": 0.1}, {"epsilon_lifetime": 0.1}):
        with pytest.raises(Refused, match=f"{next(iter(limits))} allows 0[.]1") as caught:
            planned(config, probe(), hardware(), policy=OPEN.model_copy(update=limits))
        assert caught.value.exit_code == 3


def test_a_probe_takes_two_rounds_of_the_whole_plans_noise() -> None:
    privacy = PRIVACY | {"noise_multiplier": None, "epsilon": 3.0}
    given = {key: value for key, value in privacy.items() if value is not None}
    config = ten(privacy=given, strategy={"weights": "equal"})
    found = probe_of(config)
    assert (found.federation.rounds, found.evaluation.every) == (2, 2)
    assert found.privacy is not None
    assert found.privacy.noise_multiplier is not None
    whole = pld_epsilon((0.1, found.privacy.noise_multiplier, 20), delta=1e-5)
    assert 2.99 < whole <= 3.0  # as the whole plan is calibrated, not the probe
    silent = probe_of(ten(evaluation={"every": 0}))
    assert silent.evaluation.every == 0


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "names no machine"),
        ("[default]\nmemory_gb = 0.0\n", "default.memory_gb: input should be greater than 0"),
        ('[default]\nmemory_gb = 1.0\ndevice = "tpu"\n', "default.device: input should be"),
        ("[default]\nmemory_gb = 1.0\nup_mbits = 1.0\n", "did you mean 'up_mbit'"),
        (2 * '[[site]]\nname = "a"\nmemory_gb = 1.0\n', "names a site twice"),
    ],
)
def test_a_wrong_hardware_file_is_told(tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "hardware.toml").write_text(text)
    with pytest.raises(ConfigError, match=told):
        load_hardware(tmp_path / "hardware.toml")


def test_too_few_machines_or_rounds_are_refused() -> None:
    alone = check_config(
        {"site": [{"name": "a", "memory_gb": 16.0}]}, Hardware, source="hardware.toml"
    )
    with pytest.raises(ConfigError, match=r"names 1 site, and sites\.min = 2"):
        planned(ten(), probe(), alone)
    short = probe()
    short["rounds"] = short["rounds"][:1]
    with pytest.raises(ConfigError, match="has 1 whole rounds and needs 2"):
        planned(ten(), short, hardware())


def test_this_machine_has_memory() -> None:
    (machine,) = this_machine().machines(1).values()
    assert machine.memory_gb > 0.1
