"""Flower's messages carry the identity of a ServerApp's process; here every test has one."""

import pytest
from flwr.clientapp import ClientApp

from intramural.simulations.inprocess import InProcessGrid


@pytest.fixture(autouse=True, scope="session")
def server_app_identity() -> None:
    """Make a grid: its constructor takes the identity."""
    InProcessGrid(ClientApp(), 1, run_config={})
    return None
