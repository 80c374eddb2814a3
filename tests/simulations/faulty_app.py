"""The real ClientApp, but node 1 raises in round 1 and node 2 is slow: on any engine."""

import json
import time

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from intramural.client import app as real
from intramural.core.wire import to_letter

SLOW_S = 0.3
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train, or fail."""
    site, body = (
        int(context.node_config["partition-id"]),
        json.loads(to_letter(message.content).header),
    )
    if site == 0 and body["body"]["round"] == 1:
        raise RuntimeError("out of memory")
    if site == 1:
        time.sleep(SLOW_S)
    return real.train(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate."""
    return real.evaluate(message, context)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Greet."""
    return real.query(message, context)
