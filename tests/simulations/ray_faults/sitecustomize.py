"""Put first on PYTHONPATH, this makes site-1's app raise in round 1 and site-2's slow, everywhere.

Flower's Ray actors run the installed app and take no other, so the installed one is changed as it
is imported.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

APP = "intramural.client.app"
SLOW_S = 0.3


class Faulty(importlib.abc.MetaPathFinder):
    """Finds the app where the other finders do, and changes it once it is there."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != APP:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        honest = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            honest(module)
            change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def change(module: Any) -> None:
    """Have the app's training fail or dawdle, outside all that catches errors in it."""
    honest = module._respond

    def respond(message: Any, context: Any) -> Any:
        site = int(context.node_config["partition-id"])
        header = json.loads(message.content["intramural"]["header"])
        if header["kind"] == "TrainRequest":
            if site == 0 and header["body"]["round"] == 1:
                raise RuntimeError("out of memory")
            if site == 1:
                time.sleep(SLOW_S)
        return honest(message, context)

    module._respond = respond


sys.meta_path.insert(0, Faulty())
