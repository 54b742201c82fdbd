"""Refuses an operator of this repository where a model would not run it.

Some models of transformers, such as Bloom, compute their own softmax instead of asking transformers' table of attention
functions. transformers takes any registered name for them, and they compute softmax under it.
"""

from functools import wraps
from typing import Any

from transformers import PreTrainedModel

from flame.models.attention import IMPLEMENTATIONS


def _require_interface(model: PreTrainedModel, requested: object) -> None:
    names = requested.values() if isinstance(requested, dict) else [requested]
    ours = [name for name in names if name in IMPLEMENTATIONS]
    if ours and not model._can_set_attn_implementation():
        raise ValueError(
            f"attn_implementation {ours[0]!r} has no effect on {type(model).__name__}: it does not use transformers' "
            "attention interface and would compute softmax; take a model that does, such as Llama"
        )


def require_attention_interface() -> None:
    """Makes every model of transformers raise ValueError for an operator that it would ignore."""
    adjust, set_ = (
        PreTrainedModel._check_and_adjust_attn_implementation,
        PreTrainedModel.set_attn_implementation,
    )
    if hasattr(adjust, "__wrapped__"):
        return

    @wraps(adjust)
    def adjusted(
        self: PreTrainedModel, attn_implementation: str | None, *args: Any, **kwargs: Any
    ) -> str:
        _require_interface(self, attn_implementation)
        return adjust(self, attn_implementation, *args, **kwargs)

    @wraps(set_)
    def set_implementation(
        self: PreTrainedModel, attn_implementation: str | dict, *args: Any, **kwargs: Any
    ) -> None:
        _require_interface(self, attn_implementation)
        set_(self, attn_implementation, *args, **kwargs)

    PreTrainedModel._check_and_adjust_attn_implementation = adjusted
    PreTrainedModel.set_attn_implementation = set_implementation
