"""Fixtures of all tests: the tiny models, made once."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random two-layer BERT."""
    from tests.tiny_models import save_bert  # here: it imports torch, which takes seconds

    return save_bert(tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a random two-layer Llama with a chat template."""
    from tests.tiny_models import save_llama

    return save_llama(tmp_path_factory.mktemp("llama"))
