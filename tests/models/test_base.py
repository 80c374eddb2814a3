"""Base models: where one is found, and what is said when it is not."""

from pathlib import Path

import huggingface_hub.constants
import pytest

from intramural.core.errors import ModelError
from intramural.models.base import resolve_base
from tests.models.builders import bench, chapters, folder_of
from tests.tiny import federation


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


def test_a_site_s_own_map_comes_first(bert: Path) -> None:
    base = resolve_base("minilm", places={"minilm": str(bert)})
    assert (base.name, base.folder) == ("minilm", bert.resolve())


def test_a_package_s_folder_is_found_without_importing_it(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "tiny_bert_package"
    folder_of(bert, package / "model")
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve_base("tiny-bert-package").folder == (package / "model").resolve()


def test_the_digest_follows_contents_and_not_the_place(bert: Path, tmp_path: Path) -> None:
    same = resolve_base(str(folder_of(bert, tmp_path / "same")))
    assert same.digest == resolve_base(str(bert)).digest
    other = folder_of(bert, tmp_path / "other")
    weights = other / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert resolve_base(str(other)).digest != same.digest


def test_a_folder_without_a_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no config\.json in .*; name a model folder"):
        resolve_base(str(tmp_path))


def test_a_folder_without_weights_is_refused(bert: Path, tmp_path: Path) -> None:
    folder = folder_of(bert, tmp_path / "bare", leave_out=".safetensors")
    with pytest.raises(ModelError, match=r"no \.safetensors weights in .*save_pretrained"):
        resolve_base(str(folder))


def test_pickled_weights_are_not_read(bert: Path, tmp_path: Path) -> None:
    folder = folder_of(bert, tmp_path / "pickled", leave_out=".safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    with pytest.raises(ModelError, match=r"no \.safetensors weights"):
        resolve_base(str(folder))


@pytest.mark.parametrize("name", ["no-such-model-package", "nobody/no-model", "a/b/c/d"])
def test_an_unknown_name_is_refused_with_the_three_places_looked_at(name: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve_base(name)
    message = str(caught.value)
    assert f"model {name!r}: not a folder, not an installed package, and the hub" in message
    assert "map it to a folder in [model] of site.toml" in message
    assert "\n" not in message


def test_a_package_without_weights_is_refused() -> None:
    with pytest.raises(ModelError, match="the package of that name carries no weights"):
        resolve_base("intramural")


def test_a_base_of_another_digest_is_refused(bert: Path) -> None:
    wanted = "sha256:" + "0" * 64
    with pytest.raises(ModelError, match=f"the federation wants {wanted}; install that version"):
        bench(federation(bert, model={"digest": wanted}), chapters(1))
    digest = resolve_base(str(bert)).digest
    bench(federation(bert, model={"digest": digest}), chapters(1))


def test_weights_that_are_not_whole_are_refused_in_one_line(bert: Path, tmp_path: Path) -> None:
    folder = folder_of(bert, tmp_path / "cut")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelError, match=r"cannot load: .*; check its folder") as caught:
        bench(federation(folder), chapters(1))
    assert "\n" not in str(caught.value)
