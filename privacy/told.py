"""How an epsilon is told to people; light, for every floor prints one."""


def told(epsilon: float) -> str:
    """Return epsilon to four decimals, rounded up, so that no print under-reports."""
    rounded = f"{epsilon:.4f}"
    return rounded if float(rounded) >= epsilon - 1e-9 else f"{epsilon + 1e-4:.4f}"
