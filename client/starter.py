"""Starter: the site.toml that `intramural client init` writes for people to edit."""

_SITE = """\
# What NAME decides for itself. Nobody else reads this file; its limits win, and only tighten.
# Edit it, then run `intramural check site.toml`.

[site]
name = "NAME"

[data]
path = "notes.csv"                # .csv, .jsonl or .parquet; relative to this file
text = "note"                     # column that holds the text
label = "label"                   # classification: column that holds the label
# response = "answer"             # generation: column that holds the response
# person = "patient_id"           # a person's records stay on one side of the splits

[model]
"models/base" = "models/base"     # where the base model that the federation names lies here

[policy]
require_privacy = true            # refuse a federation without [privacy]
epsilon_run = 8.0                 # the most one run may cost
epsilon_lifetime = 10.0           # the most this data set ever spends, over all runs
exchange = ["lora", "head"]       # what may leave
records_min = 200                 # refuse to train on fewer
approve = "ask"                   # a person approves every new federation.toml

[compute]
device = "auto"
"""


def site_toml(name: str) -> str:
    """Return a site.toml to edit."""
    return _SITE.replace("NAME", name)
