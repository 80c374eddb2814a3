"""Fixtures of all tests: the tiny models, made once."""

import signal
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """Have Ctrl-C reach what tests start: a shell's background has it ignored, and so have they."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


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
