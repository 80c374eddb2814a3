"""Which federations fit what a site keeps for itself; looks at the manifest alone."""

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.route import CONTROL_RULES, PERSONAL_B, RESIDUAL_RULES

REFACTORED = RESIDUAL_RULES | {"fedsvd", "flexlora"}
"""Rules that write the same adapter with other factors: no factor can be pulled toward them."""


def check_personal(federation: FederationConfig) -> None:
    """Refuse a federation whose sites could not keep what it wants them to.

    Raises:
        ConfigError: It names the keys and what to do.
    """
    personal, rule = federation.personal, federation.strategy.rule
    is_partial, gate = federation.exchange.personal or rule in PERSONAL_B, federation.gate
    if is_partial and gate is not None and gate.judge == "coordinator":
        raise ConfigError(
            "gate.judge = 'coordinator' needs a whole model at the coordinator, and "
            f"exchange.personal (or strategy.rule = {rule!r}) leaves a part of it at the sites; "
            "set gate.judge = 'sites'"
        )
    if federation.privacy is not None and rule in CONTROL_RULES:
        raise ConfigError(
            f"strategy.rule = {rule!r} corrects steps by what earlier ones were, which is not "
            "built for [privacy]; use 'fedavg' with training.proximal"
        )
    if personal is None:
        return
    if federation.privacy is not None:
        raise ConfigError(
            "[personal] trains and tests each site's own model without noise, which [privacy] does "
            "not cover; remove [personal], or use exchange.personal, whose parameters stay at the "
            "site and are trained with noise"
        )
    if is_partial:
        raise ConfigError(
            "[personal] makes a whole model for each site, and exchange.personal (or strategy.rule "
            f"= {rule!r}) a part of one; keep one of the two"
        )
    if personal.kind == "ditto" and rule in REFACTORED:
        raise ConfigError(
            f"personal.kind = 'ditto' pulls to the federation's factors, and strategy.rule = "
            f"{rule!r} sets them anew each round; use 'fine-tune'"
        )
