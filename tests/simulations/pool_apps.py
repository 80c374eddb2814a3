"""Apps for the pool's workers, without torch: they answer a vector, and misbehave on demand."""

import os
import signal
import time

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from intramural.core.wire import FLAT, VECTOR, encode_vector

APP = "tests.simulations.pool_apps:app"
ORDER = "order"
app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Return the vector plus the node's number, after what the message's order says."""
    order, record = message.content[ORDER], message.content[VECTOR]
    assert isinstance(order, ConfigRecord)
    assert isinstance(record, ArrayRecord)  # not by `array_records`, which makes a reference cycle
    node = context.node_id
    time.sleep(float(str(order.get("sleep_s", 0.0))))
    if order.get("raise") == node:
        raise ValueError("CANARY: a record's text")
    if order.get("die") == node:
        os.kill(os.getpid(), signal.SIGKILL)
    vector = np.frombuffer(record[FLAT].data, dtype="<f4")
    seen = context.state.config_records.get("seen", ConfigRecord({"count": 0, "pids": []}))
    told = ConfigRecord({"count": int(str(seen["count"])) + 1, "pid": os.getpid()})
    told["writable"] = vector.flags.writeable
    told["threads"] = os.environ.get("OMP_NUM_THREADS", "")
    if order.get("remember"):
        context.state["seen"] = ConfigRecord({"count": told["count"]})
        context.state["kept"] = encode_vector(vector * node)
    reply = RecordDict({VECTOR: encode_vector(vector + node), "told": told})
    return Message(reply, reply_to=message)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Return what the node's state holds."""
    return Message(RecordDict(dict(context.state.items())), reply_to=message)


@app.evaluate()
def give_back(message: Message, context: Context) -> Message:
    """Return the content, and of which type its arrays' bytes are."""
    arrays = message.content.array_records["a"].values()
    types = " ".join(type(array.data).__name__ for array in arrays)
    content = RecordDict({"a": message.content["a"], "types": ConfigRecord({"all": types})})
    return Message(content, reply_to=message)
