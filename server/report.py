"""report.json of a run: what was run, how each round went, how the final model does."""

from importlib.metadata import version
from typing import Any

from intramural.core.federation import FederationConfig
from intramural.core.metrics import Sums, add_sums, bootstrap_intervals, metrics_of
from intramural.core.seeds import generator
from intramural.server.export import Beginning
from intramural.server.report_personal import personal_sums
from intramural.server.setting import Outcome

REPORT_VERSION = 1
PACKAGES = ("intramural", "flwr", "torch", "transformers", "peft", "numpy")


def result_of(federation: FederationConfig, sums: Sums) -> dict[str, Any]:
    """Return the metrics of evaluation sums, with 95 % bootstrap intervals where they exist."""
    kind = federation.task.kind
    result: dict[str, Any] = dict(metrics_of(kind, sums))
    result["interval"] = {}
    if "confusion" in sums.counts:
        rng = generator(federation.federation.seed, "bootstrap")
        intervals = bootstrap_intervals(sums.counts["confusion"], rng=rng)
        result["interval"] = {name: list(bounds) for name, bounds in intervals.items()}
    return result


def run_report(
    federation: FederationConfig,
    first: Beginning,
    outcome: Outcome,
    *,
    digest: str,
    engine: str,
    site_privacy: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the report of a finished run, as a JSON value; docs/report.md lists its keys."""
    test = outcome.test
    own = {site: {"federated": result_of(federation, s)} for site, s in sorted(test.items())}
    history = outcome.history
    return {
        "version": REPORT_VERSION,
        "name": federation.federation.name,
        "task": federation.task.kind,
        "exchange": federation.exchange.kind,
        "engine": engine,
        "digest": digest,
        "manifest": federation.digest,
        "model": {
            "base": federation.model.base,
            "digest": first.base,
            "parameters": first.parameters,
            "trained": first.layout.size,
        },
        "labels": list(federation.task.labels),
        "plan": {
            "rounds": federation.federation.rounds,
            "local_steps": federation.training.local_steps,
            "local_epochs": federation.training.local_epochs,
            "batch_size": federation.training.batch_size,
            "learning_rate": federation.training.learning_rate,
            "rule": federation.strategy.rule,
            "seed": federation.federation.seed,
        },
        "sites": [],
        "initial": {"validation": None, "test": None},
        "rounds": history,
        "final": {
            "federated": result_of(federation, add_sums(list(test.values()))) if test else None,
            "pooled": None,
            "baseline": None,
            "local": {},
            "own_test": own,
            **({} if federation.personal is None else {"personal": _personal(federation, test)}),
        },
        "samples": [],
        "bytes_up": sum(r["bytes_up"] for r in history),
        "bytes_down": sum(r["bytes_down"] for r in history),
        "seconds": round(sum(r["seconds"] for r in history), 3),
        "privacy": None,
        "privacy_plan": _privacy_plan(federation, history),
        "site_privacy": site_privacy,
        "notes": [],
        "versions": {name: version(name) for name in PACKAGES},
    }


def _personal(federation: FederationConfig, test: dict[str, Sums]) -> dict[str, Any]:
    return {site: result_of(federation, sums) for site, sums in personal_sums(test).items()}


def _privacy_plan(
    federation: FederationConfig, history: list[dict[str, Any]]
) -> dict[str, Any] | None:
    """Return what [privacy] planned; what was spent only the sites' own ledgers know."""
    if federation.privacy is None:
        return None
    from intramural.privacy.accountant import answered_by  # here: it takes a second to load
    from intramural.privacy.plan import SAMPLER, PrivacyPlan

    plan = PrivacyPlan.of(federation)
    heard = history[-1]["ledgers"] if history else {}
    return {
        "epsilon": plan.cost(),
        "delta": plan.delta,
        "unit": plan.unit,
        "relation": plan.relation,
        "sampler": SAMPLER,
        "sample_rate": plan.sample_rate,
        "noise_multiplier": plan.noise_multiplier,
        "clip_norm": plan.clip_norm,
        "accountant": answered_by(plan.total(), delta=plan.delta),
        "seeded": sorted(site for site, ledger in heard.items() if ledger["seeded"]),
    }
