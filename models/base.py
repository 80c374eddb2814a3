"""Base models: where one lies on this machine, and the digest of what it holds."""

import importlib.util
import os
import shutil
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from intramural.core.canonical import digest_file, digest_json
from intramural.core.errors import ModelError

DIGESTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
"""What decides a model's behaviour: weights, configuration, tokenizer."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A base model on this machine's disk."""

    name: str
    """As the federation calls it."""
    folder: Path
    """Holds config.json, *.safetensors and the tokenizer."""

    @property
    def digest(self) -> str:
        """Digest over names and contents of the model's files; independent of where it lies."""
        return _digest(self.folder)


@lru_cache(maxsize=8)
def _digest(folder: Path) -> str:
    files = {path.name: path for pattern in DIGESTED for path in folder.glob(pattern)}
    return digest_json({name: digest_file(path) for name, path in files.items()})


def resolve_base(name: str, *, places: dict[str, str] | None = None) -> Base:
    """Find a base model: the site's own map first, then a folder, a package, the hub's cache.

    Args:
        name: A folder, an installed model package, or a hub id.
        places: The site's folders by name, from `[model]` in site.toml.

    Raises:
        ModelError: It is nowhere, or lacks a configuration or safetensors weights. Weights in
            pickle form (.bin, .pt) are not read: unpickling can run code.
    """
    place = (places or {}).get(name, name)
    folder = Path(place).expanduser()
    if not folder.is_dir():
        folder = _package_folder(place) or _hub_folder(place)
    return Base(name=name, folder=_checked(folder, name))


def _checked(folder: Path, name: str) -> Path:
    if not (folder / "config.json").is_file():
        raise ModelError(f"model {name!r}: no config.json in {folder}; name a model folder")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model {name!r}: no .safetensors weights in {folder}; save it with "
            "save_pretrained(..., safe_serialization=True)"
        )
    return folder.resolve()


def _package_folder(name: str) -> Path | None:
    """Return the model folder inside an installed package, without importing the package."""
    module = name.replace("-", "_")
    if not module.isidentifier():
        return None
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        return None
    root = Path(spec.submodule_search_locations[0])
    for config in sorted(root.glob("**/config.json")):
        if any(config.parent.glob("*.safetensors")):
            return config.parent
    for weights in sorted(root.glob("*.gguf")):
        return _converted(weights)
    raise ModelError(f"model {name!r}: the package of that name carries no weights")


def _hub_folder(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(DIGESTED)))
    except Exception as error:  # noqa: BLE001 (the hub raises a dozen kinds; all mean "not here")
        raise ModelError(
            f"model {name!r}: not a folder, not an installed package, and the hub gave "
            f"{type(error).__name__}; map it to a folder in [model] of site.toml"
        ) from None


def cache_folder() -> Path:
    """Return where converted models are kept: $INTRAMURAL_CACHE, or ~/.cache/intramural."""
    return Path(os.environ.get("INTRAMURAL_CACHE", "~/.cache/intramural")).expanduser()


def _converted(weights: Path) -> Path:
    """Return a plain folder made from a GGUF file; made once, since reading GGUF takes 20 s."""
    target = cache_folder() / f"{weights.stem}-{digest_file(weights)[7:23]}"
    if (target / "config.json").is_file():
        return target
    try:
        import accelerate  # noqa: F401 (transformers reads GGUF only with it)
        import gguf  # noqa: F401
    except ImportError:
        raise ModelError(
            f"{weights.name} must be converted once: pip install 'intramural[gguf]'"
        ) from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quiet_transformers()
    folder, file = str(weights.parent), weights.name
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype="float32")
    for mark in ("hf_quantizer", "quantization_method"):  # it no longer is quantised
        if hasattr(model, mark):
            delattr(model, mark)
    model.is_quantized = False
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    model.save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    try:
        beside.replace(target)
    except OSError:  # another process was quicker
        shutil.rmtree(beside)
    return target


def quiet_transformers() -> None:
    """Keep transformers from drawing bars, and from announcing a new head as an error."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
