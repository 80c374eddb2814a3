"""The resident model: built once in a process, shared by all agents that need the same one."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from intramural.core.canonical import digest_json
from intramural.core.federation import FederationConfig
from intramural.models.base import Base, resolve_base
from intramural.models.classification import Classification
from intramural.models.generation import Generation
from intramural.models.head import FrozenBody
from intramural.models.loading import Loaded, load_model, pick_device
from intramural.models.padding import check_padding
from intramural.models.tasks import Task


@dataclass(frozen=True, kw_only=True)
class Resident:
    """A built model with its task; whoever uses it writes its own parameters first."""

    base: Base
    loaded: Loaded
    task: Task
    tokens_key: str
    """Names what makes tokens of records: the base's content, [model] and [task]."""


_resident: dict[tuple[str, int | None], Resident] = {}
"""By what the model is made of, and its adapter's rank."""
_asked: dict[tuple[object, ...], Resident] = {}
"""The same model by what was asked: a site asks several times a message."""
_features: dict[str, dict[bytes, Tensor]] = {}
"""Features of texts, by frozen encoder: a base model rebuilt says the same of them."""


def resident_model(
    federation: FederationConfig,
    *,
    places: dict[str, str],
    device: str,
    rank: int | None = None,
    fresh: bool = False,
) -> Resident:
    """Return the federation's model, building it at first use. One federation's are kept at a time.

    Args:
        federation: Says which model.
        places: Folders of base models by name.
        device: As `compute.device`.
        rank: Of the adapter; None: the federation's. Sites of a simulation may differ in it, and
            there is a model for each.
        fresh: Build it anew, for its initial parameters: who used it last left others in it.

    Raises:
        ConfigError, ModelError: As `resolve_base` and `load_model`.
        Unclippable: Under [privacy], padding changes what the model says of a record, or the
            federation's engine cannot clip the model.
    """
    asked = (federation.digest, *sorted(places.items()), device, rank)
    if asked in _asked and not fresh:
        return _asked[asked]
    base = resolve_base(federation.model.base, places=places)
    content = federation.to_json()
    needs = [content[name] for name in ("model", "task", "exchange", "training")]
    seed, privacy = federation.federation.seed, federation.privacy
    engine = privacy.engine if privacy is not None else None
    rule = federation.strategy.rule  # says what travels
    place = str(pick_device(device))  # by its name: a coordinator's 'auto' is a site's 'cpu'
    key = digest_json([*needs, rule, seed, engine, str(base.folder), place]), rank
    if fresh or key not in _resident:
        # another model's memory is needed for the new one
        for old in [other for other in _resident if other[0] != key[0] or other == key]:
            del _resident[old]
        _asked.clear()
        loaded = load_model(federation, base, device=place, rank=rank)
        task = make_task(federation, loaded, base=base)
        if privacy is not None:
            from intramural.models.rehearsal import rehearse  # here: Opacus takes seconds to load

            check_padding(loaded, length_max=federation.model.max_length)
            rehearse(loaded, task, federation)
        makes_tokens = [base.digest, content["model"], content["task"]]
        _resident[key] = Resident(
            base=base, loaded=loaded, task=task, tokens_key=digest_json(makes_tokens)[7:23]
        )
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


def save_model(resident: Resident, folder: Path, *, own: bool = False) -> None:
    """Write the model to a folder, whole or not at all, for transformers or PEFT alone to load.

    Where the rule moved weights of the base model, the whole model is written, adapter and all in
    one; the resident model is used up by that, and forgotten. The folder's README.md says so.

    Args:
        resident: The model, with the parameters to write.
        folder: Replaced, if it is there.
        own: It is one site's own; else what stays at the sites has its initial values in it.
    """
    beside = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    shutil.rmtree(beside, ignore_errors=True)
    _save(resident, beside, own=own)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)


def _save(resident: Resident, folder: Path, *, own: bool) -> None:
    loaded, notes = resident.loaded, []
    model = loaded.model
    if loaded.exchange.is_base_moved:
        forget_models()
        model = model.merge_and_unload()
        notes.append(
            "This is a whole model, to be loaded by transformers alone: training changed frozen "
            "weights of the base model too, and the adapter was merged into them."
        )
    if own:
        notes.append("This is one site's own model: its records are in it, and it may say them.")
    elif kept := loaded.exchange.own_layout.entries:
        notes.append(
            f"{len(kept)} parameters stay at each site and have their initial values here, such as "
            f"`{kept[0][0]}`: this is what a site starts from, and not what its own model says."
        )
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    if notes:
        with open(folder / "README.md", "a", encoding="utf-8") as readme:  # PEFT wrote its card
            readme.write("\n".join(f"\n{note}\n" for note in notes))
