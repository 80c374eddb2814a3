"""The catalogue's rules for LoRA: which factor is trained, and how the factors become the next."""

from collections.abc import Callable

from intramural.core.errors import ConfigError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.strategies.fedavg import FedAvg
from intramural.strategies.fedsvd import FedSVD
from intramural.strategies.kind import Kind
from intramural.strategies.lora import Pairs
from intramural.strategies.lora_products import FedExLora, FlexLoRA, FLoRA, ProductRule
from intramural.strategies.rule import Rule, Traits

EXACT = Traits(sums_only=True, exact_for_lora=True, mixed_ranks=False, byzantine=False)
"""One factor is trained at a time: products add up as the factor does, and need only its sum."""
FIXED_A = Traits(
    sums_only=True, exact_for_lora=True, mixed_ranks=False, byzantine=False, asynchronous=True
)
"""A never changes, so an update means the same whenever it started."""
SHARED_A = Traits(
    sums_only=True, exact_for_lora=False, mixed_ranks=False, byzantine=False, asynchronous=True
)
"""A is averaged, and each site has a B of its own: there is no common product to be exact."""
TURNED_A = Traits(
    sums_only=True, exact_for_lora=True, mixed_ranks=False, byzantine=False, optimizer=False
)
"""A is set anew each round: a velocity of B's old directions would mean nothing."""


def _mean_alone(federation: FederationConfig, layout: Layout) -> Rule:
    del layout
    return FedAvg.of(federation)


def _fedsvd(federation: FederationConfig, layout: Layout) -> Rule:
    for pair in Pairs(federation, layout):
        rank, inputs = pair.a.shape
        if rank > inputs:
            raise ConfigError(
                f"exchange.rank = {rank} is more than the {inputs} inputs of {pair.layer}; "
                "'fedsvd' needs at most as many"
            )
    return FedSVD(FedAvg.of(federation), federation, layout)


def _products(
    kind: Callable[[FedAvg, FederationConfig, Layout], ProductRule],
) -> Callable[[FederationConfig, Layout], Rule]:
    return lambda federation, layout: kind(FedAvg.of(federation), federation, layout)


KINDS: dict[str, Kind] = {
    "ffa-lora": Kind(
        title="FFA-LoRA",
        paper="Sun et al. 2024, https://arxiv.org/abs/2403.12313",
        traits=FIXED_A,
        make=_mean_alone,
        needs_lora=True,
    ),
    "rolora": Kind(
        title="RoLoRA",
        paper="Chen et al. 2025, https://arxiv.org/abs/2502.01755",
        traits=EXACT,
        make=_mean_alone,
        needs_lora=True,
    ),
    "fedsvd": Kind(
        title="FedSVD",
        paper="Lee et al. 2025, https://arxiv.org/abs/2505.12805",
        traits=TURNED_A,
        make=_fedsvd,
        needs_lora=True,
        routed=False,
    ),
    "flora": Kind(
        title="FLoRA",
        paper="Wang et al. 2024, https://arxiv.org/abs/2409.05976",
        traits=FLoRA.traits,
        make=_products(FLoRA),
        needs_lora=True,
        routed=False,
    ),
    "flexlora": Kind(
        title="FlexLoRA",
        paper="Bai et al. 2024, https://arxiv.org/abs/2402.11505",
        traits=FlexLoRA.traits,
        make=_products(FlexLoRA),
        needs_lora=True,
        routed=False,
    ),
    "fedex-lora": Kind(
        title="FedEx-LoRA",
        paper="Singhal et al. 2025, https://arxiv.org/abs/2410.09432",
        traits=FedExLora.traits,
        make=_products(FedExLora),
        needs_lora=True,
        routed=False,
    ),
    "fedsa-lora": Kind(
        title="FedSA-LoRA",
        paper="Guo et al. 2025, https://arxiv.org/abs/2410.01463",
        traits=SHARED_A,
        make=_mean_alone,
        needs_lora=True,
    ),
}
