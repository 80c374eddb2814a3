"""Starter: the files that `intramural server init` writes for people to edit."""

import tomli_w

from intramural.server.settings import Coordinator

_COORDINATOR = """\
# Where this coordinator listens. The sites find `host` and `port` in their kits and in the
# certificate: after changing them run `intramural server renew`, and send new kits.
"""

_FEDERATION = """\
# What the sites of NAME learn together. Every site approves this file before it trains.
# Edit it, then run `intramural check federation.toml`.

[federation]
name = "NAME"
rounds = 20
seed = 0

[model]
base = "models/base"              # a folder, an installed model package, or a hub id
max_length = 128                  # tokens; longer texts are cut

[task]
kind = "classification"           # or "generation", without labels
labels = ["first", "second"]

[exchange]
kind = "lora"                     # lora: adapter and head travel; head: less; full: every weight
rank = 8
alpha = 16
target_modules = ["query", "value"]

[training]
optimizer = "adamw"
learning_rate = 5e-4
batch_size = 32                   # records a step
local_steps = 10                  # steps a site makes each round

[strategy]
rule = "fedavg"
weights = "equal"                 # a weight by records would tell how many there are

[sites]
min = 3                           # a round waits for so many sites
quorum = 0.8                      # share of the cohort that closes a round after the deadline
deadline_s = 3600

[privacy]                         # without this table nothing is claimed, and sites refuse
unit = "record"                   # or "person"
epsilon = 8.0                     # over all rounds; see `intramural privacy plan`
delta = 1e-5
clip_norm = 1.0
nominal_records = 2000            # a public constant; never a site's own count
"""


def coordinator_toml(settings: Coordinator) -> str:
    """Return coordinator.toml, with every key written out."""
    return _COORDINATOR + tomli_w.dumps({"coordinator": settings.model_dump(mode="json")})


def federation_toml(name: str) -> str:
    """Return a federation.toml to edit."""
    return _FEDERATION.replace("NAME", name)
