"""Makes a model's ``config.json`` say that it runs an operator of this repository.

transformers reads ``attn_implementation`` from a ``config.json`` but does not write it, so weights trained under softpick
would silently be loaded into softmax. With the field written, a plain ``from_pretrained`` runs the operator again if
`flame.models` has been imported, and is refused by name if not. ``attn_implementation=...`` on loading wins.
"""

from functools import wraps
from typing import Any

from transformers import PretrainedConfig

from flame.models.attention import IMPLEMENTATIONS


def implementation_of(config: PretrainedConfig) -> str | dict[str, str | None] | None:
    """The ``attn_implementation`` that ``config`` runs now; None if it runs none of `IMPLEMENTATIONS`.

    A dictionary, as ``from_pretrained`` takes it, where parts of a model (``text_config``) differ.
    """
    own = config._attn_implementation
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    parts = {key: part._attn_implementation for key, part in parts.items() if part is not None}
    if not {own, *parts.values()} & IMPLEMENTATIONS.keys():
        return None
    return {"": own, **parts} if any(part != own for part in parts.values()) else own


def save_implementations() -> None:
    """Makes every configuration of transformers write what `implementation_of` says, if anything.

    ``softpick_transformer`` is left out: its ``attn_impl`` says it.
    """
    write = PretrainedConfig.to_diff_dict
    if hasattr(write, "__wrapped__"):
        return

    @wraps(write)
    def to_diff_dict(self: PretrainedConfig) -> dict[str, Any]:
        implementation = None if hasattr(self, "attn_impl") else implementation_of(self)
        saved = {} if implementation is None else {"attn_implementation": implementation}
        return write(self) | saved

    PretrainedConfig.to_diff_dict = to_diff_dict
