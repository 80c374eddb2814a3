"""Flower's side of `benchmarks/round_floor.py`: a client that trains nothing."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Send the arrays back, changed by a little so that no two replies share a byte."""
    (arrays,) = message.content.array_records.values()
    (vector,) = arrays.to_numpy_ndarrays()
    vector = vector + np.float32(1e-3 * (context.node_id % 97))
    content = RecordDict(
        {"arrays": ArrayRecord([vector]), "metrics": MetricRecord({"num-examples": 1})}
    )
    return Message(content, reply_to=message)
