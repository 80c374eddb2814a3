"""Flower's entry point of the coordinator."""

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from intramural.server.run import plan_from_config, run_federation
from intramural.server.watcher import LogWatcher

# A plain assignment: flwr finds `app` by reading the syntax tree, and an annotated one is missed.
app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation that the run's configuration holds."""
    plan = plan_from_config(dict(context.run_config))
    watcher = LogWatcher(logging.getLogger("intramural.server"))
    home = str(context.run_config.get("coordinator", ""))
    if home:
        from intramural.server.deployed import run_order  # here: a simulation has no keys

        run_order(plan, grid, Path(home), watcher=watcher)
    else:
        run_federation(plan, grid, watcher=watcher)
