"""Made-up reports: one full, one of a generation task, both small and without randomness."""

from typing import Any

DIGEST = "sha256:" + "9f2c4e7a" * 8
SITES = ("st-elsewhere", "county-general", "lakeview")
LABELS = ("circulatory", "digestive", "<b>x</b>")

Json = dict[str, Any]


def scores(macro_f1: float, *, examples: int = 400) -> Json:
    """Return a classification's metrics; the interval is four points to both sides."""
    accuracy = macro_f1 + 0.05
    return {
        "accuracy": accuracy,
        "macro_f1": macro_f1,
        "loss": 2.0 - macro_f1,
        "examples": examples,
        "interval": {
            "accuracy": [accuracy - 0.04, accuracy + 0.04],
            "macro_f1": [macro_f1 - 0.04, macro_f1 + 0.04],
        },
    }


def likelihood(loss: float) -> Json:
    """Return a generation's metrics."""
    return {"loss": loss, "perplexity": 4 * loss, "token_accuracy": loss / 8, "examples": 60}


def round_of(number: int, metrics: Json, *, sites: tuple[str, ...] = SITES) -> Json:
    """Return one round's entry."""
    return {
        "round": number,
        "sites": list(sites),
        "metrics": metrics,
        "train_loss": 2.0 / number,
        "bytes_up": 1_254_000,
        "bytes_down": 3_762_000,
        "seconds": 38.5,
        "refusals": {} if len(sites) == len(SITES) else {"egress-refused": 1},
    }


def report(**changes: Any) -> Json:
    """Return a full classification report: federated 0.700, pooled 0.720, locals 0.5 to 0.6."""
    local = dict(zip(SITES, (0.6, 0.55, 0.5), strict=True))
    own = dict(zip(SITES, (0.65, 0.71, 0.52), strict=True))
    value = {
        "version": 1,
        "name": "icd-chapters",
        "task": "classification",
        "exchange": "lora",
        "engine": "in-process",
        "digest": DIGEST,
        "manifest": DIGEST,
        "model": {"base": "minilm", "digest": DIGEST, "parameters": 22_000_000, "trained": 312_981},
        "labels": list(LABELS),
        "plan": {"rounds": 3, "local_steps": 20, "batch_size": 32, "rule": "fedavg", "seed": 7},
        "sites": [
            {"name": site, "train": 800, "validation": 100, "test": 133, "labels": mix}
            for site, mix in zip(
                SITES, ({LABELS[0]: 700, LABELS[2]: 333}, {LABELS[1]: 1033}, {}), strict=True
            )
        ],
        "rounds": [
            round_of(1, scores(0.4)),
            round_of(2, scores(0.6), sites=SITES[:2]),
            round_of(3, scores(0.69)),
        ],
        "final": {
            "federated": scores(0.7),
            "pooled": scores(0.72),
            "baseline": scores(0.58),
            "local": {site: scores(f1) for site, f1 in local.items()},
            "own_test": {
                site: {
                    "federated": scores(0.7, examples=133),
                    "pooled": scores(0.73, examples=133),
                    "local": scores(f1, examples=133),
                }
                for site, f1 in own.items()
            },
        },
        "samples": [],
        "bytes_up": 3_762_000,
        "bytes_down": 11_286_000,
        "seconds": 125.0,
        "privacy": None,
        "notes": ["All sites ran on one machine."],
        "versions": {"torch": "2.9.0"},
    }
    return value | changes


def statement(**changes: Any) -> Json:
    """Return a site's privacy statement, with the terms that its epsilon has."""
    value = {
        "site": SITES[0],
        "data": "notes",
        "claim": "(7.9100, 1e-05)-differential privacy for one record added or removed",
        "private": True,
        "epsilon": 7.91,
        "epsilon_of_this_run": 5.5,
        "delta": 1e-5,
        "unit": "record",
        "records_per_person": None,
        "relation": "add-remove",
        "sampler": "poisson",
        "sample_rate": 0.016,
        "clip_norm": 1.0,
        "noise_multiplier": 0.8,
        "steps": 60,
        "random": "aes-256-ctr",
        "accountant": "PLD, dp-accounting 0.6.0",
        "trust": "The site's own machine is trusted.",
        "not_covered": ["what the site releases elsewhere"],
    }
    return value | changes


def generation() -> Json:
    """Return a generation's report, without a baseline and without sites' label counts."""
    return report(
        task="generation",
        labels=[],
        sites=[{"name": site, "train": 80, "validation": 10, "test": 13} for site in SITES],
        rounds=[round_of(number, likelihood(3.0 - number / 4)) for number in (1, 2, 3)],
        final={
            "federated": likelihood(2.0),
            "pooled": likelihood(1.9),
            "baseline": None,
            "local": {site: likelihood(2.4) for site in SITES},
            "own_test": {
                site: {"federated": likelihood(2.0), "local": likelihood(2.2)} for site in SITES
            },
        },
        samples=[
            {
                "prompt": "Summarise <the> note",
                "reference": "a reference",
                "before": "words before",
                "after": "words after",
            }
        ],
    )
