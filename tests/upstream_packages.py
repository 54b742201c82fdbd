"""Our kernels without upstream's package around them."""

import sys
from pathlib import Path
from types import ModuleType


def skip() -> None:
    """Stands in for the packages around ours, whose `__init__` imports all of flash-linear-attention for seconds.

    For a process of its own, before it imports `fla`.
    """
    root = Path(__file__).parents[1]
    for name in ("fla", "fla.ops", "fla.ops.attn"):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [str(root.joinpath(*name.split(".")))]
