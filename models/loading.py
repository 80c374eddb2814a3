"""Building the model a federation trains: base, head, adapter, and what travels of it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from intramural.core.errors import ModelError
from intramural.core.federation import FederationConfig
from intramural.core.layout import Layout
from intramural.core.route import RESIDUAL, downlink, factor_of
from intramural.core.seeds import derive_seed
from intramural.models.base import Base, quiet_transformers
from intramural.models.exchange import Exchange
from intramural.models.head import train_head_alone
from intramural.models.personal_check import check_personal
from intramural.models.residual import FrozenWeights


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A model ready to train, on its device."""

    model: Any
    """A transformers model, or a PEFT model around one."""
    tokenizer: Any
    exchange: Exchange
    device: torch.device

    @cached_property
    def modules(self) -> tuple[nn.Module, ...]:
        """All modules of the model, found once: that takes as long as to write a small one."""
        return tuple(self.model.modules())


def pick_device(name: str) -> torch.device:
    """Return the device that `compute.device` means here: 'auto' is CUDA, else MPS, else CPU.

    Raises:
        ModelError: The device is not on this machine.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    here = {"cpu": True, "cuda": torch.cuda.is_available()}
    if not here.get(device.type, torch.backends.mps.is_available()):
        raise ModelError(f"compute.device {name!r} is not on this machine; use 'auto' or 'cpu'")
    return device


def load_model(
    federation: FederationConfig, base: Base, *, device: str = "auto", rank: int | None = None
) -> Loaded:
    """Build the model. Parameters that the base lacks (a head) are drawn from the seed.

    Args:
        federation: Says what to build.
        base: The base model on this disk.
        device: As `compute.device`.
        rank: Of the adapter here; None: exchange.rank, which the layout always has.

    Raises:
        ConfigError: As `check_personal`.
        ModelError: The base's digest is another, an adapter target matches nothing, the model
            holds layers that couple the records of a batch, or the rule cannot add to its weights.
    """
    check_personal(federation)
    if federation.model.digest not in (None, base.digest):
        raise ModelError(
            f"model {base.name!r} has digest {base.digest}, the federation wants "
            f"{federation.model.digest}; install that version"
        )
    place = pick_device(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(federation.federation.seed, "model"))
        model, tokenizer, invented = _load_base(federation, base)
        if federation.model.pooler == "identity":
            _reset_pooler(model, base)
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
            raise ModelError(f"model {base.name!r} has batch normalisation; use another base")
        with _old_names():
            if federation.exchange.kind == "lora":
                model = _add_adapter(model, federation, invented, rank=rank)
            elif federation.exchange.kind == "head":
                train_head_alone(model, _trained_whole(model, federation, invented))
            if federation.training.gradient_checkpointing:
                model.gradient_checkpointing_enable()
                model.enable_input_require_grads()  # else a frozen embedding cuts the graph
    model.to(place)
    exchange = _exchange(model, federation)
    return Loaded(model=model, tokenizer=tokenizer, exchange=exchange, device=place)


def _exchange(model: Any, federation: FederationConfig) -> Exchange:
    """Return what is trained, with the layout of the coordinator's vector."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rank = federation.exchange.rank
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for name, parameter in trained.items():
        rows, *rest = parameter.shape
        match factor_of(name):
            case "A":
                shapes.append((name, (rank, *rest)))
            case "B":
                shapes.append((name, (rows, rank)))
            case _:
                shapes.append((name, (rows, *rest)))
    layout = downlink(federation, Layout(tuple(shapes)))
    layers = [n.removeprefix(RESIDUAL) for n, _ in layout.entries if n.startswith(RESIDUAL)]
    frozen = FrozenWeights(model, layers) if layers else None
    return Exchange(trained, layout=layout, frozen=frozen)


@contextmanager
def _old_names() -> Iterator[None]:
    """Silence transformers' notice of new names, which PEFT does not use and 5.0 does not have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`(is_)?gradient_checkpointing", FutureWarning)
        yield


def _load_base(federation: FederationConfig, base: Base) -> tuple[Any, Any, list[str]]:
    """Return model, tokenizer, and the names of parameters that the base did not hold."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    quiet_transformers()
    options: dict[str, Any] = {
        "dtype": torch.float32,
        "output_loading_info": True,
        "use_safetensors": True,
        "trust_remote_code": False,
        "local_files_only": True,
    }
    auto: Any = AutoModelForCausalLM
    if federation.task.kind == "classification":
        auto = AutoModelForSequenceClassification
        names = dict(enumerate(federation.task.labels))
        options |= {"id2label": names, "label2id": {label: i for i, label in names.items()}}
    try:
        model, found = auto.from_pretrained(base.folder, **options)
        tokenizer = AutoTokenizer.from_pretrained(base.folder, local_files_only=True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
        raise ModelError(f"model {base.name!r}: cannot load: {first}; check its folder") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, sorted(found["missing_keys"])


def _reset_pooler(model: Any, base: Base) -> None:
    """Set the pooler's matrix to the identity, a public start that any site can make."""
    dense = getattr(getattr(model.base_model, "pooler", None), "dense", None)
    if dense is None:
        raise ModelError(f"model.pooler: {base.name!r} has no pooler; leave the key out")
    with torch.no_grad():
        dense.weight.copy_(torch.eye(len(dense.weight)))
        dense.bias.zero_()


def _add_adapter(
    model: Any, federation: FederationConfig, invented: list[str], *, rank: int | None
) -> Any:
    """Freeze the base and add LoRA; what the base lacks is trained whole, so that it travels.

    Whatever the rank here, the product of the factors counts alpha / exchange.rank.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    exchange = federation.exchange
    whole = _trained_whole(model, federation, invented)
    _require(model, federation, exchange.target_modules)
    kinds = {"classification": TaskType.SEQ_CLS, "generation": TaskType.CAUSAL_LM}
    settings = LoraConfig(
        task_type=kinds[federation.task.kind],
        r=rank or exchange.rank,
        lora_alpha=exchange.alpha * (rank or exchange.rank) / exchange.rank,
        lora_dropout=exchange.dropout,
        target_modules=list(exchange.target_modules),
        modules_to_save=list(whole) or None,
    )
    return get_peft_model(model, settings)


def _trained_whole(
    model: Any, federation: FederationConfig, invented: list[str]
) -> tuple[str, ...]:
    """Return the ends of the names of modules trained whole: those named, or the invented ones."""
    whole = federation.exchange.trained_modules
    if whole is None:
        whole = tuple(sorted({name.rpartition(".")[0] for name in invented}))
    _require(model, federation, whole)
    return whole


def _require(model: Any, federation: FederationConfig, ends: tuple[str, ...]) -> None:
    missing = [end for end in ends if not _ends_with(model, end)]
    if missing:
        linear = {
            n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)
        }
        raise ModelError(
            f"exchange: no module of {federation.model.base!r} ends with {missing}; "
            f"its linear layers are {sorted(linear)}"
        )


def _ends_with(model: nn.Module, end: str) -> bool:
    return any(name == end or name.endswith(f".{end}") for name, _ in model.named_modules())
