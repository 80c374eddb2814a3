"""Which federations can be run: what no key alone can say, checked before anything starts."""

from collections.abc import Callable

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig


def check_federation(federation: FederationConfig) -> None:
    """Refuse a federation whose rule, personal parts or privacy plan cannot work.

    Raises:
        ConfigError: It has a line for each problem, with the keys and what to do.
    """
    # Here, for commands that check nothing should not wait for NumPy.
    from intramural.models.personal_check import check_personal
    from intramural.strategies.registry import check_rule

    checks: list[Callable[[FederationConfig], object]] = [check_rule, check_personal]
    if federation.privacy is not None:
        from intramural.privacy.plan import PrivacyPlan  # here: accounting takes seconds to load

        checks.append(PrivacyPlan.of)
    problems = []
    for check in checks:
        try:
            check(federation)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("\n".join(problems))
