"""The resident model: built once in a process, shared by all agents that need the same one."""

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from intramural.core.canonical import digest_json
from intramural.core.federation import FederationConfig
from intramural.models.base import Base, resolve_base
from intramural.models.classification import Classification
from intramural.models.generation import Generation
from intramural.models.head import FrozenBody
from intramural.models.loading import Loaded, load_model
from intramural.models.padding import check_padding
from intramural.models.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A built model with its task; whoever uses it writes its own parameters first."""

    base: Base
    loaded: Loaded
    task: Task


_resident: dict[str, Resident] = {}
_asked: dict[tuple[object, ...], Resident] = {}
"""The same model by what was asked: a site asks several times a message."""
_features: dict[str, dict[bytes, Tensor]] = {}
"""Features of texts, by frozen encoder: a base model rebuilt says the same of them."""


def resident_model(
    federation: FederationConfig, *, places: dict[str, str], device: str, fresh: bool = False
) -> Resident:
    """Return the federation's model, building it at first use. One is kept at a time.

    Args:
        federation: Says which model.
        places: Folders of base models by name.
        device: As `compute.device`.
        fresh: Build it anew, for its initial parameters: who used it last left others in it.

    Raises:
        ModelError: As `resolve_base` and `load_model`.
        Unclippable: Under [privacy], padding changes what the model says of a record, or the
            federation's engine cannot clip the model.
    """
    asked = (federation.digest, *sorted(places.items()), device)
    if asked in _asked and not fresh:
        return _asked[asked]
    base = resolve_base(federation.model.base, places=places)
    content = federation.to_json()
    needs = [content[name] for name in ("model", "task", "exchange", "training")]
    seed, privacy = federation.federation.seed, federation.privacy
    engine = privacy.engine if privacy is not None else None
    key = digest_json([*needs, seed, engine, str(base.folder), device])
    if fresh or key not in _resident:
        _resident.clear()  # the old model's memory is needed for the new one
        _asked.clear()
        loaded = load_model(federation, base, device=device)
        task = make_task(federation, loaded, base=base)
        if privacy is not None:
            from intramural.models.rehearsal import rehearse  # here: Opacus takes seconds to load

            check_padding(loaded, length_max=federation.model.max_length)
            rehearse(loaded, task, federation)
        _resident[key] = Resident(base=base, loaded=loaded, task=task)
    _asked[asked] = _resident[key]
    return _resident[key]


def forget_models() -> None:
    """Let go of the models that this process keeps; the next that is asked for is built anew."""
    _resident.clear()
    _asked.clear()


def make_task(federation: FederationConfig, loaded: Loaded, *, base: Base) -> Task:
    """Return the federation's task."""
    length_max, tokenizer = federation.model.max_length, loaded.tokenizer
    if federation.task.kind == "classification":
        body = None
        if federation.exchange.kind == "head":
            body = FrozenBody(
                loaded.model,
                filler=tokenizer.pad_token_id,
                device=loaded.device,
                seen=_features.setdefault(f"{base.digest} {loaded.device}", {}),
            )
        return Classification(tokenizer, federation.task.labels, length_max=length_max, body=body)
    return Generation(tokenizer, instruction=federation.task.instruction, length_max=length_max)


def save_model(resident: Resident, folder: Path) -> None:
    """Write the model as transformers or PEFT alone can load it: safetensors, tokenizer."""
    resident.loaded.model.save_pretrained(folder)
    resident.loaded.tokenizer.save_pretrained(folder)
