"""The attention operators as transformers' models call them.

Causal attention over a growing cache, without padding: what these operators cannot do right is refused
here by name, since transformers would otherwise drop the mask and compute something else.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from flame.errors import UsageError

with warnings.catch_warnings():
    # upstream warns on every machine without a GPU; `require_device` says what follows from that
    warnings.filterwarnings("ignore", message="Triton is not supported on current platform")
    import fla.ops.attn.softpick as softpick_ops
    from fla.ops.attn.softpick import NORMALIZERS

OPERATORS: dict[str, Callable[..., Any]] = {
    name: getattr(softpick_ops, name)
    for prefix in ("parallel", "naive")
    for name in (f"{prefix}_{normalizer}_attn" for normalizer in NORMALIZERS)
}
"""Operator by name, ``parallel_<normalizer>_attn`` in Triton and ``naive_<normalizer>_attn`` in PyTorch."""

# transformers' own implementations, all of them softmax
_SOFTMAX_IMPLEMENTATIONS = (
    "eager",
    "sdpa",
    "flash_attention_2",
    "flash_attention_3",
    "flex_attention",
)


def normalizer_of(name: str) -> str:
    """The normaliser that an operator or a transformers implementation computes.

    Raises:
        ValueError: No operator has that name.
    """
    if name in _SOFTMAX_IMPLEMENTATIONS:
        return "softmax"
    if name not in OPERATORS:
        raise ValueError(f"attn_impl must be one of {', '.join(OPERATORS)}; got {name!r}")
    return name.removeprefix("parallel_").removeprefix("naive_").removesuffix("_attn")


def require_device(name: str, device_type: str) -> None:
    """Raises UsageError where an operator cannot run on a device."""
    if name.startswith("parallel_") and device_type != "cuda":
        raise UsageError(
            f'attn_impl "{name}" is a Triton kernel and needs a GPU, but this machine has none that torch '
            f'sees; on a CPU use "{name.replace("parallel_", "naive_", 1)}" in --model.config'
        )


def _attention_forward(operator: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,  # [B, HQ, T, K]
        key: torch.Tensor,  # [B, H, S, K]
        value: torch.Tensor,  # [B, H, S, V]
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if attention_mask is not None:
            raise NotImplementedError(f"{operator.__name__} takes no attention mask")
        if dropout:
            raise NotImplementedError(f"{operator.__name__} has no dropout, got {dropout}")
        if not kwargs.get("is_causal", getattr(module, "is_causal", True)):
            raise NotImplementedError(
                f"{operator.__name__} is causal; is_causal=False is not possible"
            )
        for name in ("softcap", "s_aux"):
            if kwargs.get(name) is not None:
                raise NotImplementedError(f"{operator.__name__} does not support {name}")
        # of packed sequences, as transformers passes them to flash attention
        cu_seqlens = kwargs.get("cu_seq_lens_q")
        if cu_seqlens is not kwargs.get("cu_seq_lens_k"):
            raise NotImplementedError(
                f"{operator.__name__} packs queries and keys alike: cu_seq_lens_q and cu_seq_lens_k must be "
                "one tensor"
            )
        o = operator(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            scaling,
            cu_seqlens,
            window_size=sliding_window,
        )
        return o, None

    return forward


def _causal_mask(
    *,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    attention_mask: torch.Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> None:
    """No mask: the operators mask by position. Refuses what position alone does not tell."""
    if attention_mask is not None and not attention_mask.all():
        raise NotImplementedError("softpick attention in transformers does not take padding yet")
    if isinstance(q_offset, torch.Tensor) or q_offset + q_length != kv_length:
        raise NotImplementedError("softpick attention in transformers needs a DynamicCache")
    if not allow_is_causal_skip:
        raise NotImplementedError(
            "softpick attention in transformers takes plain causal masks only"
        )


def register_operators() -> None:
    """Registers every operator with transformers, under its name."""
    for name, operator in OPERATORS.items():
        AttentionInterface.register(name, _attention_forward(operator))
        AttentionMaskInterface.register(name, _causal_mask)
